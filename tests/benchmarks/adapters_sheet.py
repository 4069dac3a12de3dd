"""Figures of the adapters that ship: the commands of minipic/README.md, drawn.

    python tests/benchmarks/adapters_sheet.py

Writes tutorials/figures/papers.png of those with --adapter, and adapters.png of the others.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

import sample  # noqa: E402
from minipic.figures import image_grid  # noqa: E402
from minipic.image import open_picture  # noqa: E402


def commands():
    """The arguments of minipic/README.md's sample.py commands that use weights/adapters."""
    arguments = []
    for line in (ROOT / "minipic" / "README.md").read_text(encoding="utf-8").splitlines():
        is_drawing = line.startswith("    python sample.py") and "weights/adapters" in line
        if is_drawing and "runs/" not in line:  # those of a reader's own training are not here
            _, _, *rest = shlex.split(line)
            arguments.append(rest)
    return arguments


def draw_all(commands: list[list[str]], columns: int) -> Image.Image:
    """What each command is given, if it is given a picture, and what it draws."""
    pictures, labels = [], []
    for arguments in commands:
        for option, value in zip(arguments, arguments[1:]):
            if option in ("--control", "--source"):
                pictures.append(open_picture(ROOT / value))
                labels.append("given")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "drawn.png")
            flags = ["--n", "1", "--device", "cpu", "--out", str(path)]
            if code := sample.main([*arguments, *flags]):
                sys.exit(code)
            pictures.append(open_picture(path))
        labels.append(label_of(arguments))
    return image_grid(pictures, labels, columns=columns)


def label_of(arguments: list[str]) -> str:
    """The adapter's folder, the task and the prompt."""
    words = [] if arguments[0].startswith("--") else [arguments[0]]
    for option, value in zip(arguments, arguments[1:]):
        if option == "--task":
            words.insert(0, f"{value}:")
        if option == "--adapter":
            words.insert(0, f"{Path(value).name},")
    return " ".join(words).strip(",: ")


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = ROOT / "tutorials" / "figures"
    others = [words for words in commands() if "--adapter" not in words]
    draw_all(others, columns=2 * len(others)).save(figures / "adapters.png", optimize=True)
    of_papers = [words for words in commands() if "--adapter" in words]
    draw_all(of_papers, columns=6).save(figures / "papers.png", optimize=True)


if __name__ == "__main__":
    main()
