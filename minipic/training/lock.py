"""One run at a time in a folder: a lock, which the system releases when its process dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from minipic.common import ParameterError
from minipic.training.processes import anyone, is_main_process

if os.name == "nt":
    import msvcrt
else:
    import fcntl


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Inside, no other run can lock this folder: the file `.lock` in it, which stays there.

    The first of several processes locks for all. Raises ParameterError where another run has.
    """
    with open(Path(folder, ".lock"), "a") as file:
        if anyone(is_main_process() and not lock(file)):
            raise ParameterError(
                "out", f"{folder}: another run is training there; wait for its end, or choose "
                "another folder")
        yield


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Inside, no other process is inside with the same folder; waits until none is.

    It locks the file `.saving` in the folder, and removes it in the end.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, ".saving")
    file = open(path, "a")
    lock(file, wait=True)
    while not is_open(file, path):  # the process before has removed the file that we waited for
        file.close()
        file = open(path, "a")
        lock(file, wait=True)
    try:
        yield
    finally:
        if os.name != "nt":  # Windows removes no file that is open
            path.unlink(missing_ok=True)
        file.close()


def is_open(file: IO, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def lock(file: IO, wait: bool = False) -> bool:
    """Lock an open file until it is closed. Returns whether it was free, or waits until it is."""
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        return False
    return True
