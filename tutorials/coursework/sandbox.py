"""Runs the tasks of a submission inside limits, and writes the answers; started by grade.py in a
process of its own.

    python sandbox.py FOLDER SEED MEGABYTES NUMBER...

It judges nothing, and holds nothing that is worth reading. Python's audit events refuse files
outside of FOLDER and of Python itself, the network and other programs, and each refusal is written
down. This is a fence against what students' code does, by mistake or by design. It is no prison:
code that is hostile to the computer itself belongs into a container.
"""

import importlib.util
import os
import resource
import sys
from pathlib import Path

PACKAGES = (  # which open files and libraries when they are imported: before the fence
    "numpy",
    "PIL.Image",
    "PIL.PngImagePlugin",
    "safetensors.torch",
    "tokenizers",
    "torch",
    "tqdm.auto",
    "triton.language",
    "triton.runtime.interpreter",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROCESSES = Path(os.sep, "proc")
SYSTEM_FILES = (  # what libraries read of the system
    os.devnull,
    str(Path(os.sep, "dev", "urandom")),
    str(PROCESSES / "cpuinfo"),
    str(PROCESSES / "meminfo"),
    str(Path(os.sep, "sys", "devices")),
)
CHANGES_FILES = (
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
)
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.kill",
    "pty.spawn",
    "ctypes.",
    "http.",
    "urllib.",
    "ftplib.",
    "smtplib.",
)


def limit_memory(megabytes: int):
    """What the process has now, and so much more."""
    pages = int((PROCESSES / "self" / "statm").read_text().split()[0])
    size = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))


def put_up_fence(folder: Path, report: list[int]):
    """Refuse what a submission has no business with. report: the file descriptor to which refusals
    are written."""
    inside = os.path.realpath(folder)
    weights = os.path.realpath(folder / "weights")
    readable = [inside, weights]
    readable += [
        os.path.realpath(path) for path in {sys.prefix, sys.base_prefix, *sys.path[1:]} if path
    ]

    def refuse(what):
        os.write(report[0], f"{what}\n".encode(errors="replace")[:500])
        raise PermissionError(f"not allowed here: {what}")

    def is_in(path, folders):
        path = os.path.realpath(os.fsdecode(path))
        return any(path == folder or path.startswith(folder + os.sep) for folder in folders)

    def watch(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            writes = bool(flags & WRITES)
            system = os.path.realpath(os.fsdecode(path)).startswith(SYSTEM_FILES)
            if not is_in(path, [inside] if writes else readable) and not (system and not writes):
                refuse(f"{'writing' if writes else 'reading'} {os.fsdecode(path)}")
        elif event in CHANGES_FILES:
            for path in arguments:
                if isinstance(path, (str, bytes)) and not is_in(path, [inside]):
                    refuse(f"changing {os.fsdecode(path)}")
        elif event.startswith(FORBIDDEN):
            refuse(f"{event} {arguments[:1]}")

    sys.addaudithook(watch)


def main():
    folder = Path(sys.argv[1]).resolve()
    seed = int(sys.argv[2])
    megabytes = int(sys.argv[3])
    numbers = sys.argv[4:]
    for name in PACKAGES:
        if importlib.util.find_spec(name.split(".")[0]) is not None:  # not everybody has triton
            importlib.import_module(name)
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.randn(8, 8).std()  # starts what PyTorch starts late
    out = folder / "out"
    report = [2]
    os.chdir(folder)
    sys.path[0] = str(folder)
    limit_memory(megabytes)
    put_up_fence(folder, report)

    from coursework.checks import (
        Answer,
        Exercise,
        describe,
        load_assignment,
        only_values,
        run,
        save_answers,
    )

    for number in numbers:
        report[0] = os.open(out / f"{number}.refused", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            assignment = load_assignment(number.split(".")[0].lower())
            (task,) = [task for task in assignment.TASKS if task.number == number]
            answers = run(only_values(task, identities=True), seed)
            if isinstance(task, Exercise) and answers[-1].error is None:
                save_answers(
                    {number: answers}, out / f"{number}.quick"
                )  # drawing may end the process
                answers = run(task, seed)
        except (Exception, SystemExit) as error:  # the student's files cannot be imported
            answers = [Answer("contract", "", error=describe(error))]
        save_answers({number: answers}, out / "unfinished")
        os.rename(out / "unfinished", out / f"{number}.safetensors")


if __name__ == "__main__":
    main()
