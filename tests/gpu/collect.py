"""What the scripts of this folder brought: check it, pack it, and put it in its place.

    python tests/gpu/collect.py OUT               JSON of benchmarks to tests/benchmarks, weights to runs/make
    python tests/gpu/collect.py --check OUT       the tests of 1_check.sh as check.json
    python tests/gpu/collect.py --pack FOLDER OUT, --unpack OUT FOLDER     a folder as parts of 15 MB, and back
"""

import argparse
import io
import shutil
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from record import record  # noqa: E402

PART = 15 << 20  # bytes


def check(out: Path) -> int:
    """Write check.json of the tests' report. Returns 1 if a test failed."""
    if not (out / "check.xml").exists():
        print("no check.xml: the tests were stopped before their end")
        return 1
    suite = ElementTree.parse(out / "check.xml").getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = []
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    record(out / "check", {**counts, "failed": failed})
    print(counts, *failed, sep="\n")
    return int(bool(failed))


def pack(folder: Path, out: Path):
    """A folder as OUT/parts/00, 01, ..., each of at most PART bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, arcname=".")
    parts = out / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    packed = buffer.getvalue()
    for number, start in enumerate(range(0, len(packed), PART)):
        (parts / f"{number:02}").write_bytes(packed[start:start + PART])


def unpack(out: Path, folder: Path):
    """The folder that was packed; nothing where there are no parts."""
    parts = sorted((out / "parts").glob("[0-9][0-9]"))
    if not parts:
        return
    packed = b"".join(part.read_bytes() for part in parts)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def collect(out: Path):
    """Put the benchmarks' JSON files and the weights in their places."""
    for path in sorted(out.glob("benchmarks/*.json")):
        shutil.copyfile(path, ROOT / "tests" / "benchmarks" / path.name)
        print(path.name)
    if (out / "check.json").exists():
        shutil.copyfile(out / "check.json", ROOT / "tests" / "benchmarks" / "check.json")
    unpack(out, ROOT / "runs" / "make")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--unpack", action="store_true")
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    if options.check:
        return check(options.folders[0])
    if options.pack:
        pack(*options.folders)
    elif options.unpack:
        unpack(*options.folders)
    else:
        collect(options.folders[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
