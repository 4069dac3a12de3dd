"""Coursework for instructors: hands out assignments, and grades what comes back.

    python tutorials/course.py release --out FOLDER --only a3,a4
    python tutorials/course.py grade SUBMISSIONS --seed 2026 --out GRADES

SUBMISSIONS holds a folder or a .zip for each student. tutorials/coursework/README.md describes
both.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from coursework.checks import assignment_names  # noqa: E402 - needs the paths
from coursework.grade import grade  # noqa: E402
from coursework.release import release  # noqa: E402
from minipic.common import InputError, message_of  # noqa: E402


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hand_out = commands.add_parser("release", help="make the folder for students")
    hand_out.add_argument("--out", type=Path, required=True, help="a new folder")
    marks = commands.add_parser("grade", help="grade submissions")
    marks.add_argument(
        "submissions", type=Path, help="a folder with a folder or .zip for each student"
    )
    marks.add_argument(
        "--out", type=Path, default=Path("grades"), help="a new folder for the results"
    )
    marks.add_argument(
        "--seed", type=int, required=True, help="of the random inputs; keep it to yourself"
    )
    marks.add_argument("--seconds", type=int, default=60, help="limit of time for a task")
    marks.add_argument("--memory", type=int, default=2000, help="limit of memory, in MB")
    marks.add_argument("--jobs", type=int, default=2, help="submissions to run at a time")
    for command in (hand_out, marks):
        command.add_argument(
            "--only", default="", help="assignments, such as a3,a4; all if left out"
        )
        command.add_argument("--variant", help="the variant of the assignments that is handed out")
    options = parser.parse_args(arguments)
    try:
        names = chosen(options.only)
        if options.command == "release":
            release(options.out, names, options.variant)
        else:
            grade(
                options.submissions,
                options.out,
                names,
                options.seed,
                options.variant,
                options.seconds,
                options.memory,
                options.jobs,
            )
    except InputError as error:
        print(f"course.py: {message_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def chosen(only: str) -> list[str]:
    """The names in a list such as "a3,a4"."""
    names = [name.strip().lower() for name in only.split(",") if name.strip()] or assignment_names()
    for name in names:
        if name not in assignment_names():
            raise InputError(
                f"--only: there is no assignment {name!r}; "
                f"choose from {', '.join(assignment_names())}"
            )
    return names


if __name__ == "__main__":
    main()
