"""Checkpoints that outlive a kill: a run's exact state -> OUT/checkpoints/step-000500/ and back, bit for bit.

A folder holds model, ema and optimizer as .safetensors, config.json, and manifest.json with the sha256 of the others.
It is written under a temporary name and renamed when it is complete and on the disk, so a name is a promise.
The files are the same for any number of processes, sharded or not.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from minipic.common import InputError
from minipic.weights import flush, save_weights, sha256, write_json

# Settings that a resumed run may change: they decide how long, where and on what, not what is trained.
FREE = ("steps", "scenes", "cache", "out", "save", "resume", "accumulate", "checkpointing", "fsdp", "save_every",
        "keep", "sample_every", "log_every")


def whole(tensor):
    """The whole tensor on the CPU; when it is sharded, every process must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


@contextmanager
def gathered(model, params, here):
    """Inside, the process that is `here` has whole parameters in place of its shards, and FSDP leaves it alone: the
    model can run, and be saved, without the others. `params`: {name: parameter}. Every process must enter."""
    shards = {name: p for name, p in params.items() if isinstance(p, DTensor)}
    hooks = {module: (module._forward_pre_hooks, module._forward_hooks) for module in model.modules()
             if isinstance(module, FSDPModule)}

    def put(name, p):
        place, _, child = name.rpartition(".")
        setattr(model.get_submodule(place), child, p)
    for name, p in shards.items():
        full = p.full_tensor()
        if here:
            put(name, nn.Parameter(full, requires_grad=False))
    for module in hooks:
        module._forward_pre_hooks, module._forward_hooks = {}, {}
    yield
    for module, (before, after) in hooks.items():
        module._forward_pre_hooks, module._forward_hooks = before, after
    for name, p in shards.items():
        put(name, p)


def fill(target, value):
    """Copy a whole CPU tensor into `target`, which may be sharded or on another device."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def tensors_of(run):
    """All tensors that a `training.Run` must remember, {file: {name: tensor}}. Frozen weights come from the recipe."""
    moments = {f"{name}.{key}": value for name, p in run.params.items()
               for key, value in run.optimizer.state[p].items()}
    return {"model": run.params | dict(run.model.named_buffers()), "ema": run.ema.values, "optimizer": moments}


def state_of(run):
    """`tensors_of` a run, whole and on the CPU; every process must call it."""
    return {file: {name: whole(tensor) for name, tensor in group.items()} for file, group in tensors_of(run).items()}


def check(folder, config):
    """InputError naming a setting that decides what is trained and is not the checkpoint's own, or too few steps."""
    saved = json.loads((folder / "config.json").read_text())
    for key, value in json.loads(json.dumps(config)).items():
        if key not in FREE and saved.get(key) != value:
            raise InputError(f"--resume: {folder} was trained with {key}={saved.get(key)!r}, not {value!r}; "
                             "use the same value, or start a new run in another --out")
    if config["steps"] < (done := step_of(folder)):
        raise InputError(f"--steps {config['steps']} is less than the {done} steps of {folder}; choose more")


@torch.no_grad()
def load(folder, run):
    """Fill a run from a checkpoint; returns the steps done."""
    files = {file: load_file(folder / f"{file}.safetensors") for file in ("model", "ema", "optimizer")}
    blank = {"step": lambda p: torch.zeros((), device=p.device),  # fused AdamW wants it beside the weights
             "exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}  # made at the first step
    for name, p in run.params.items():
        if state := {key: make(p) for key, make in blank.items() if f"{name}.{key}" in files["optimizer"]}:
            run.optimizer.state[p] = state
    for file, targets in tensors_of(run).items():
        values = files[file]
        wrong = sorted(targets.keys() ^ values.keys()) or [n for n in targets if targets[n].shape != values[n].shape]
        if wrong:
            raise InputError(f"{folder}/{file}.safetensors does not fit this recipe's model: see {wrong[0]!r}")
        for name, target in targets.items():
            fill(target, values[name])
    return step_of(folder)


def write(folder, step, state, config):
    """Write a run's state to folder/step-NNNNNN. Raises InputError with path and size when the disk refuses."""
    final, part = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    try:
        part.mkdir(parents=True)
        for name, tensors in state.items():
            save_weights(tensors, part / f"{name}.safetensors")
        write_json(config, part / "config.json")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(part.iterdir())}
        write_json({"step": step, "files": files}, part / "manifest.json")
        if final.exists():  # damaged, and skipped when this run was resumed
            remove(final)
        os.replace(part, final)
        flush(folder)
    except (OSError, InputError) as error:
        shutil.rmtree(part, ignore_errors=True)
        size = sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())
        raise InputError(f"cannot write {final} ({size:,} bytes): {error}; earlier checkpoints are untouched, "
                         "make room and go on with --resume latest") from error


def finished(folder):
    """{step: path} of the checkpoints in a folder that have their final name, oldest first."""
    return dict(sorted((int(path.name[5:]), path) for path in folder.glob("step-*") if path.name[5:].isdecimal()))


def tidy(folder, keep, step=math.inf):
    """Remove all but the newest `keep` checkpoints up to `step`, and what a kill left unfinished."""
    old = [path for number, path in finished(folder).items() if number <= step][:-keep]
    for path in [*old, *folder.glob("step-*.tmp")]:
        remove(path)


def remove(path):
    """Delete a checkpoint; a kill on the way leaves a rest that is named as unfinished."""
    part = path if path.suffix == ".tmp" else path.with_suffix(".old.tmp")
    os.replace(path, part)
    shutil.rmtree(part)


def damage(folder):
    """Why a checkpoint cannot be used, in words; empty when it is good."""
    try:
        for name, file in json.loads((folder / "manifest.json").read_text())["files"].items():
            if (size := (folder / name).stat().st_size) != file["bytes"]:
                return f"{name} has {size:,} bytes instead of {file['bytes']:,}"
            if sha256(folder / name) != file["sha256"]:
                return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    return ""


def step_of(folder):
    """Steps done when a (good) checkpoint was written."""
    return json.loads((folder / "manifest.json").read_text())["step"]


def choose(resume, folder, say):
    """The checkpoint that `--resume` means, or None to start afresh; `folder` holds this run's own checkpoints.

    `say` prints a line. Raises InputError rather than start afresh when asked to go on, or mix two runs in a folder.
    """
    own = finished(folder)
    if not resume:
        if own:
            raise InputError(f"{folder} already holds checkpoints; add --resume latest, or choose another --out")
        return None
    if resume == "latest":
        for part in sorted(folder.glob("step-*.tmp")):
            say(f"skipping {part}: unfinished")
        for path in reversed(own.values()):
            if not (why := damage(path)):
                return path
            say(f"skipping {path}: {why}")
        raise InputError(f"--resume latest: no usable checkpoint in {folder}; leave the flag out to start afresh")
    path = Path(resume)
    if why := damage(path):
        raise InputError(f"--resume {path}: {why}; give a checkpoint folder, or latest")
    if own and path.resolve().parent != folder.resolve():
        raise InputError(f"--resume {path}: {folder} already holds another run's checkpoints; choose another --out")
    later = [other for step, other in own.items() if step > step_of(path)]
    if later:
        raise InputError(f"--resume {path}: the run went on to {later[-1]}; choose another --out, or remove that")
    return path
