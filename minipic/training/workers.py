"""Work done ahead by other processes, PyTorch's DataLoader's: batches, pictures of the world."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from minipic.common import InputError, ParameterError, message_of

if os.name != "nt":  # Windows has no fork either
    import resource

MOST_WORKERS = 8  # that are chosen without being asked for
OPEN_FILES = 1 << 16


class NumberedWork(Dataset):
    """work(number) as a dataset. A mistake of the user is a result like others.

    Raised here, it would come with the stack trace of another process; `in_order` raises it.
    """

    def __init__(self, work: Callable[[int], object]):
        self.work = work

    def __getitem__(self, number: int) -> object:
        try:
            return self.work(number)
        except (InputError, OSError) as error:
            return InputError(message_of(error))


def in_order(
        work: Callable[[int], object], numbers: Sequence[int], workers: int | None,
        pin_memory: bool = False) -> Iterator[object]:
    """work(number) for each of the numbers, in their order, computed ahead by so many processes.

    0 or None: here, when it is asked for. The processes are copies of this one (fork), so `work`
    may read whatever is in memory. It must compute on the CPU, and its result must depend on the
    number alone.
    pin_memory: put tensors where a GPU can fetch them by itself.
    """
    if not workers:
        yield from map(work, numbers)
        return
    allow_open_files()
    loader = DataLoader(
        NumberedWork(work), sampler=numbers, batch_size=None, collate_fn=as_it_is,
        num_workers=workers, multiprocessing_context="fork", worker_init_fn=obey_parent,
        generator=torch.Generator(),  # by default it takes a number from PyTorch's own generator
        pin_memory=pin_memory)
    with own_child_handler():
        results = iter(loader)
    for _ in numbers:
        with lost_worker():
            result = next(results)
        if isinstance(result, InputError):
            raise result
        yield result


@contextlib.contextmanager
def own_child_handler() -> Iterator[None]:
    """Keep DataLoader from handling SIGCHLD, for it would raise in the middle of anything.

    It also looks every five seconds whether its workers live, while it waits for one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)


def allow_open_files():
    """Raise the soft limit of open files: every tensor on its way from a worker is one.

    At the limit, a worker would lose its result without a word, and this process wait for ever.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def as_it_is(result: object) -> object:
    return result


def obey_parent(worker: int):
    """Let signals stop the parent alone, which then ends its workers.

    A terminal sends Ctrl-C to all of a group, and batch systems send SIGTERM so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A thread that hands out tensors would print that the parent has hung up. What goes wrong in
    # the work does not come here; DataLoader passes it on.
    sys.excepthook = no_words


def no_words(*error: object):
    """Say nothing."""


@contextlib.contextmanager
def lost_worker() -> Iterator[None]:
    """Inside, an InputError says that a worker was killed."""
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        # A dead worker has also closed the pipe through which it hands out tensors.
        said = str(error)
        is_lost = said.startswith("DataLoader worker") or not isinstance(error, RuntimeError)
        if not is_lost or said.startswith("Caught "):  # that was raised by the work
            raise
        raise ParameterError(
            "workers", "one of these processes was killed, perhaps for lack of memory; try fewer, "
            "and resume the latest checkpoint") from error


def choose_workers(device: torch.device, processes: int) -> int:
    """Workers for each training process: none on a CPU, whose cores compute the networks."""
    if device.type != "cuda" or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(MOST_WORKERS, cores // processes - 1))


def check_workers(workers: int):
    """ParameterError where this system cannot copy a process."""
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise ParameterError("workers", "needs fork, which this system does not have; give 0")
