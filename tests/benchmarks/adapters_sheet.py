"""The figure of the adapters that ship: the commands of minipic/README.md, drawn, as tutorials/figures/adapters.png.

    python tests/benchmarks/adapters_sheet.py
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from minipic.figures import image_grid  # noqa: E402
from minipic.image import open_picture  # noqa: E402


def commands():
    """The arguments of minipic/README.md's sample.py commands that use weights/adapters."""
    arguments = []
    for line in (ROOT / "minipic" / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("    python sample.py") and "weights/adapters" in line:
            _, _, *rest = shlex.split(line)
            arguments.append(rest)
    return arguments


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pictures, labels = [], []
    for arguments in commands():
        for option, value in zip(arguments, arguments[1:]):
            if option == "--control":
                pictures.append(open_picture(ROOT / value))
                labels.append(Path(value).parent.name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "drawn.png")
            if code := sample.main([*arguments, "--n", "1", "--device", "cpu", "--out", str(path)]):
                sys.exit(code)
            pictures.append(open_picture(path))
        labels.append(arguments[0])
    figure = image_grid(pictures, labels, columns=len(pictures))
    figure.save(ROOT / "tutorials" / "figures" / "adapters.png", optimize=True)


if __name__ == "__main__":
    main()
