"""Checkpoints that survive a kill: a run's exact state, bit for bit.

A checkpoint is a folder, such as OUT/checkpoints/step-000500/. It has model, ema and optimizer as
.safetensors files, config.json, inputs.json, and manifest.json with the sha256 of the others. It is
written under a temporary name, and renamed when it is complete and on the disk. So a folder with a
final name was complete once, and its manifest tells whether it still is. The manifest itself needs
no hash: all that it says can be compared with the folder. The files are the same for any number of
processes, sharded or not.

Whoever writes or removes here holds the lock of the run folder (lock.py). So every unfinished
checkpoint is of this run, and of a process that lives no longer.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from minipic.common import InputError, ParameterError, check_ordinary, real_path
from minipic.training.fsdp import copy_into, full_tensor
from minipic.training.run import Run
from minipic.weights import save_weights
from minipic.weights.files import flush, read_json, sha256, write_json

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.json")
UNFINISHED = re.compile(r"step-\d+(\.old)?\.tmp")

# Settings that a resumed run may change. They decide how long it trains, where, how fast and on how
# many scenes, but not what is trained.
MAY_CHANGE = (
    "steps", "scenes", "out", "save", "overwrite", "resume", "gradient_accumulation",
    "gradient_checkpointing", "fsdp", "save_every", "keep", "sample_every", "log_every",
    "allow_data_change", "workers", "minutes")
# Earlier names of settings, in checkpoints that were written under them.
RENAMED = {
    "clip": "max_grad_norm", "schedule": "lr_schedule", "drop": "caption_dropout",
    "side": "resolution", "prior": "class_prompt", "prior_pictures": "num_class_images",
    "prior_weight": "prior_loss_weight", "like": "initializer_token", "vectors": "num_vectors"}


# ---- the state of a run --------------------------------------------------------------------------

def run_tensors(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """{file: {name: tensor}} of all that a checkpoint holds: the run's own tensors, perhaps shards.

    Frozen weights are not among them, because the recipe builds them again.
    """
    optimizer = {}
    for name, param in run.params.items():
        for key, value in run.optimizer.state[param].items():
            optimizer[f"{name}.{key}"] = value
    return {
        "model": run.params | dict(run.model.named_buffers()),
        "ema": run.ema.values,
        "optimizer": optimizer,
    }


def run_state(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """`run_tensors`, whole and on the CPU. Every process must call it, to give its own shards."""
    state = {}
    for file, tensors in run_tensors(run).items():
        state[file] = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    return state


# ---- writing -------------------------------------------------------------------------------------

def write_checkpoint(
        folder: Path, step: int, state: dict[str, dict[str, torch.Tensor]], config: dict,
        inputs: dict[str, str]):
    """Write a run's state to folder/step-NNNNNN.

    step: steps done. state: from `run_state`. config: the settings of the run. inputs: the files
    that it reads, from `inputs.digest_inputs`.
    Raises InputError, with the path and the size, if the disk refuses.
    """
    final = folder / f"step-{step:06d}"
    unfinished = folder / f"step-{step:06d}.tmp"
    try:
        unfinished.mkdir(parents=True)
        for name, tensors in state.items():
            save_weights(tensors, unfinished / f"{name}.safetensors")
        write_json(config, unfinished / "config.json")
        write_json(inputs, unfinished / "inputs.json")
        files = {}
        for path in sorted(unfinished.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_json({"step": step, "files": files}, unfinished / "manifest.json")
        if final.exists():  # it was damaged, and skipped when this run was resumed
            remove(final)
        os.replace(unfinished, final)
        flush(folder)
    except (OSError, InputError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        size = 0
        for tensors in state.values():
            size += sum(tensor.nbytes for tensor in tensors.values())
        raise InputError(
            f"cannot write {final} ({size:,} bytes): {error}; earlier checkpoints are untouched, "
            "make room and resume the latest") from error


def remove_old(folder: Path, keep: int, step: int):
    """Remove all but the newest `keep` checkpoints up to `step`, and any unfinished ones."""
    checkpoints = complete_checkpoints(folder)
    up_to_step = [path for number, path in checkpoints.items() if number <= step]
    for path in up_to_step[:-keep]:
        remove(path)
    for path in unfinished_checkpoints(folder):
        remove(path)


def remove(path: Path):
    """Delete a checkpoint. What a kill in the middle leaves has the name of an unfinished one."""
    if path.suffix != ".tmp":
        unfinished = path.with_suffix(".old.tmp")
        os.replace(path, unfinished)
        path = unfinished
    shutil.rmtree(path)


# ---- finding and checking ------------------------------------------------------------------------

def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: path} of the checkpoints in a folder that have their final name, oldest first."""
    checkpoints = {}
    for path in sorted(folder.glob("step-*")):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            checkpoints[int(number)] = path
    return dict(sorted(checkpoints.items()))


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """What kills have left in a folder of checkpoints."""
    return [path for path in sorted(folder.glob("step-*")) if UNFINISHED.fullmatch(path.name)]


def find_damage(folder: Path) -> str:
    """Why a checkpoint cannot be used, in words; empty if it is good."""
    try:
        check_ordinary(folder / "manifest.json")
        manifest = json.loads((folder / "manifest.json").read_text())
        step = manifest["step"]
        files = manifest["files"]
        if real_path(folder).name != f"step-{step:06d}":
            return f"manifest.json is of step {step}"
        for name in FILES:
            if name not in files:
                return f"{name} is not in manifest.json"
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
            if sha256(folder / name) != expected["sha256"]:
                return f"{name} does not match its sha256"
        for path in folder.iterdir():
            if path.name not in files and path.name != "manifest.json":
                return f"{path.name} is not in manifest.json"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        return "manifest.json cannot be read"
    return ""


def steps_done(folder: Path) -> int:
    """Steps that a run had done when it wrote a (good) checkpoint."""
    return json.loads((folder / "manifest.json").read_text())["step"]


def find_checkpoint(resume: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None to start afresh.

    resume: a checkpoint's folder, "latest", or "" to start afresh. folder: holds this run's own
    checkpoints. say: prints a line.
    Raises InputError rather than start afresh when asked to go on, or mix two runs in a folder.
    """
    own = complete_checkpoints(folder)
    if not resume:
        if own:
            raise ParameterError(
                "out", f"{folder} already holds checkpoints; resume the latest, or choose another "
                "folder")
        return None
    if resume == "latest":
        return find_latest(folder, own, say)
    check_given_checkpoint(Path(resume), folder, own)
    return Path(resume)


def find_latest(folder: Path, own: dict[int, Path], say: Callable[[str], None]) -> Path:
    """The newest good one of a run's `own` checkpoints; says which are skipped, and why."""
    for path in unfinished_checkpoints(folder):
        say(f"skipping {path}: unfinished")
    for path in reversed(own.values()):
        damage = find_damage(path)
        if not damage:
            return path
        say(f"skipping {path}: {damage}")
    raise ParameterError(
        "resume", f"no usable checkpoint in {folder}; leave it out to start afresh")


def check_given_checkpoint(path: Path, folder: Path, own: dict[int, Path]):
    """InputError if the run with the checkpoints `own` in `folder` cannot go on from `path`."""
    damage = find_damage(path)
    if damage:
        raise ParameterError("resume", f"{path}: {damage}; give a checkpoint folder, or latest")
    if own and real_path(path).parent != real_path(folder):
        raise ParameterError(
            "resume", f"{path}: {folder} already holds another run's checkpoints; "
            "choose another folder for this one")
    later = [other for step, other in own.items() if step > steps_done(path)]
    if later:
        raise ParameterError(
            "resume", f"{path}: the run went on to {later[-1]}; "
            "choose another folder for this run, or remove that")


def check_settings(folder: Path, config: dict):
    """Check that a run may go on from the checkpoint in `folder` with the settings `config`.

    Raises InputError if a setting that decides what is trained differs, or the steps are too few.
    """
    saved = {}
    for key, value in read_json(folder / "config.json").items():
        saved[RENAMED.get(key, key)] = value
    may_change = list(MAY_CHANGE)
    if (folder / "inputs.json").exists():
        may_change += ["data", "model"]  # their files are compared instead, see training/inputs.py
    as_saved = json.loads(json.dumps(config))  # tuples become lists, as in the file
    for key, value in as_saved.items():
        if key not in may_change and saved.get(key) != value:
            raise ParameterError(
                "resume", f"{folder} was trained with {key}={saved.get(key)!r}, not {value!r}; "
                "use the same value, or start a new run in another folder")
    if config["steps"] < steps_done(folder):
        raise ParameterError(
            "steps", f"{config['steps']} is less than the {steps_done(folder)} steps of {folder}; "
            "choose more")


# ---- loading -------------------------------------------------------------------------------------

@torch.no_grad()
def load_checkpoint(folder: Path, run: Run) -> int:
    """Fill a run from a checkpoint. Returns the steps done.

    Raises InputError if the checkpoint is of another model.
    """
    saved = {}
    for file in ("model", "ema", "optimizer"):
        saved[file] = load_file(folder / f"{file}.safetensors")
    create_optimizer_state(run, saved["optimizer"])
    for file, targets in run_tensors(run).items():
        values = saved[file]
        misfits = sorted(targets.keys() ^ values.keys())
        if not misfits:
            misfits = [name for name in targets if targets[name].shape != values[name].shape]
        if misfits:
            raise InputError(
                f"{folder}/{file}.safetensors does not fit this recipe's model: see {misfits[0]!r}")
        for name, target in targets.items():
            copy_into(target, values[name])
    return steps_done(folder)


def create_optimizer_state(run: Run, saved: dict[str, torch.Tensor]):
    """Make the zeros that AdamW makes at its first step, for the parameters that are in `saved`.

    saved: {"parameter.key": value}; `load_checkpoint` copies the values.
    """
    for name, param in run.params.items():
        state = {}
        if f"{name}.step" in saved:
            # Fused AdamW wants the count of steps on the parameter's device.
            state["step"] = torch.zeros((), device=param.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            if f"{name}.{moment}" in saved:
                state[moment] = torch.zeros_like(param)
        if state:
            run.optimizer.state[param] = state
