"""Finished weights: put in place all at once, and never over weights that another run has made."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minipic.common import ParameterError
from minipic.training.lock import alone_in
from minipic.training.settings import TrainSettings
from minipic.weights.files import (
    finish_replacing, read_json, remove_folder, replacing_folder, sha256, write_json)

# What `replacing` writes in a run folder before it gives it its name.
TEMPORARY = re.compile(r"part-\d+-(log\.jsonl|loss\.png|exported\.json|step-\d+\.png)")


def check_overwriting(config: TrainSettings):
    """ParameterError where config.save holds weights that git tracks or that are not of this run.

    config.overwrite: it may replace them.
    """
    if config.overwrite:
        return
    exported = exported_hashes(config)
    for path in weights_in(Path(config.save)):
        is_own = exported and sha256(path) in exported
        if not is_own or is_tracked(path):
            owner = "git tracks" if is_own else "this run has not made"
            raise ParameterError(
                "overwrite", f"needed to replace what {owner}, such as {path}; add it, or choose "
                "another folder to save in")


def is_tracked(path: Path) -> bool:
    """Whether git tracks a file. Without git nothing is tracked."""
    if not shutil.which("git"):
        return False
    command = ["git", "-C", str(path.parent), "ls-files", "--error-unmatch", path.name]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextmanager
def exporting(config: TrainSettings) -> Iterator[Path]:
    """Gives a folder for the finished weights, which then appear in config.save all at once.

    Raises ParameterError where another run has saved its own there since this one began.
    """
    with alone_in(config.save):
        check_overwriting(config)
        with replacing_folder(config.save, owner_word(config)) as temporary:
            yield temporary
            # Noted before: if a kill comes now, the run still knows the new weights as its own.
            hashes = exported_hashes(config)
            hashes += [sha256(path) for path in weights_in(temporary)]
            write_json({"sha256": sorted(set(hashes))}, record_of(config))


def clear_leftovers(config: TrainSettings):
    """Remove or complete what a kill has left of this run, but for checkpoints.

    The caller holds the lock of the run folder.
    """
    for folder in (Path(config.out), Path(config.out, "samples")):
        for path in folder.glob("part-*"):
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
    with alone_in(config.save):  # another run may be saving there
        finish_replacing(Path(config.save))
    remove_folder(Path(config.save, f"part-{owner_word(config)}"))


def owner_word(config: TrainSettings) -> str:
    """A word that stands for this run folder: the beginning of a hash of its path."""
    return hashlib.sha256(os.fsencode(os.path.realpath(config.out))).hexdigest()[:8]


def record_of(config: TrainSettings) -> Path:
    """Where a run keeps the hashes of all weights that it has exported."""
    return Path(config.out, "exported.json")


def exported_hashes(config: TrainSettings) -> list[str]:
    """The sha256 of every file of weights that this run has exported so far."""
    record = record_of(config)
    return read_json(record).get("sha256") or [] if record.exists() else []


def weights_in(folder: Path) -> list[Path]:
    """The files of weights of a model: in its folder, and in those of its parts."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")])
