"""A newcomer's two commands, timed: a fresh clone, a fresh environment. Writes first_run.json beside.

    python tests/benchmarks/first_run.py

It installs from the package index that pip is set up for, and takes about six minutes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

ROOT = Path(__file__).parents[2]


def run(folder: Path, *command: str) -> float:
    """Run a command there; returns its seconds."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return time.perf_counter() - start


def disk_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e9


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        clone, venv = scratch / "minipic", scratch / "minipic" / ".venv"
        run(scratch, "git", "clone", "--quiet", str(ROOT), str(clone))
        run(clone, sys.executable, "-m", "venv", str(venv))
        python, pip = str(venv / "bin" / "python"), [str(venv / "bin" / "pip"), "install", "--quiet", "-r"]
        results = {"install s": run(clone, *pip, "requirements.txt")}
        results["disk GB"] = disk_gb(clone)
        results["draw s"] = run(clone, python, "sample.py", "a small red sphere left of a large blue cube")
        run(clone, *pip, "tests/requirements.txt")
        results["tests s"] = run(clone, python, "-m", "pytest", "-q")
        print(results, record("first_run", results))
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
