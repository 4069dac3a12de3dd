"""Trains every recipe and every paper with one loop, read from top to bottom.

    python train.py --help                    the recipes and the papers
    python train.py vae --help                the settings of one
    python train.py vae --steps 2000          train; Ctrl-C saves, then stops
    python train.py vae --resume latest       go on exactly where it stopped
    torchrun --standalone --nproc_per_node=2 train.py vae --fsdp
                                              on two GPUs or CPU processes

The run folder (runs/vae, or --out) then holds log.jsonl, loss.png, samples/,
checkpoints/ and model/, the finished weights. What a recipe must have is listed
in minipic/papers/__init__.py.
"""

import dataclasses
import importlib
import os
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from minipic.common import (
    InputError, choose_threads, computes_bf16, enough_memory, message_of, rng)
from minipic.figures import loss_curve
from minipic.papers import PAPERS
from minipic.training import checkpoint
from minipic.training.export import check_overwriting, clear_leftovers, exporting
from minipic.training.flags import from_argv
from minipic.training.inputs import check_inputs, digest_inputs
from minipic.training.lock import locked
from minipic.training.optimizer import (
    EMA, build_optimizer, clip_gradients, learning_rate, set_learning_rate)
from minipic.training.processes import (
    Loss, anyone, distribute, end_processes, gather_numbers, sample_indices, say,
    seed_everything, start_processes, synchronize_gradients, wait_for_everyone)
from minipic.training.run import (
    Clock, Numbers, Run, Stopped, StopSignal, append_log, check_finite, lasting_output, start_log,
    whole_and_averaged)
from minipic.training.settings import TrainSettings
from minipic.training.workers import check_workers, choose_workers, in_order
from minipic.weights.files import check_writable, replacing

RECIPES = {
    name: f"minipic.recipes.{name}" for name in (
        "t2i", "dreambooth", "inversion", "controlnet", "edit", "clip", "vae", "judge")}


def main(argv: list[str] | None = None) -> int:
    """Read the command line and train.

    Returns the exit code: 0 finished or stopped on request, 2 cannot go on.
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    with lasting_output(), StopSignal() as stop:
        return run_command(name, flags, stop)


def run_command(name: str, flags: list[str], stop: StopSignal) -> int:
    """Train what `name` and its flags ask for, or say in one sentence why not."""
    modules = RECIPES | PAPERS
    try:
        if name in ("-h", "--help"):
            print_recipes()
            return 0
        if name not in modules:
            raise InputError(
                f"unknown recipe {name!r}; the first word must be one of {', '.join(modules)}")
        recipe = importlib.import_module(modules[name])
        config = fill_in_defaults(from_argv(recipe.Settings, flags, f"train.py {name}"), name)
        remedy = "try a smaller --batch, a larger --gradient-accumulation, --gradient-checkpointing"
        rank, world_size, device = start_processes(config)
        check_writable(f"--out {config.out}", config.out)
        with locked(config.out), enough_memory(remedy):
            train(name, recipe, config, stop, rank, world_size, device)
        return 0
    except Stopped:  # the signal came in the last moment of what it may interrupt
        print(f"stopped by {stop.name}; --resume latest goes on from the last checkpoint")
        return 0
    except InputError as error:
        print(f"train.py: {message_of(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, or a path that cannot be used
        print(
            f"train.py: {error}; make room or choose another path, and go on with "
            "--resume latest", file=sys.stderr)
        return 2
    finally:
        end_processes()


def print_recipes():
    """The recipes and the papers, each with the first line of its file."""
    print(__doc__)
    for title, modules in (("Recipes", RECIPES), ("Papers", PAPERS)):
        print(f"{title}:")
        for name, module in modules.items():
            first_line = importlib.import_module(module).__doc__.strip().splitlines()[0]
            label = f"    {name:14}"
            indent = " " * len(label)
            print(textwrap.fill(first_line, 79, initial_indent=label, subsequent_indent=indent))


def fill_in_defaults(config: TrainSettings, name: str) -> TrainSettings:
    """The settings with what was left empty: the folders, and what is fast on this device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = config.out or f"runs/{name}"
    save = config.save or f"{out}/model"
    precision = config.precision or ("bf16" if computes_bf16(device) else "fp32")
    workers = config.workers
    if workers is None:
        workers = choose_workers(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    check_workers(workers)
    return dataclasses.replace(config, out=out, save=save, precision=precision, workers=workers)


def train(
        name: str, recipe: ModuleType, config: TrainSettings, stop: StopSignal, rank: int,
        world_size: int, device: torch.device):
    """Train `recipe`, a module of minipic/recipes or minipic/papers, with the settings `config`.

    rank, world_size, device: see `start_processes`.
    """
    clock = Clock(config.minutes, time.monotonic())
    settings = {"recipe": name, **dataclasses.asdict(config)}
    for key, value in {**settings, "device": device, "processes": world_size}.items():
        say(f"{key:22} {value}")

    with stop.at_once(in_group=True):
        source, inputs = check_folders(config, settings, rank)
        run, data = build(recipe, config, device)
        trained = sum(param.numel() for param in run.params.values())
        total = sum(param.numel() for param in run.model.parameters())
        say(f"training {trained:,} of {total:,} weights")
        start, rows = resume(run, config, source, rank)
        clock.start_training(source)
    if stop.interrupted:
        say(f"stopped by {stop.name} before training began; nothing is lost")
        return

    def prepare(step: int) -> list[tuple[list[int], dict]]:
        """The micro-batches of a step, each with the numbers of its samples."""
        batches = []
        for indices in sample_indices(config, step, rank, world_size):
            batches.append((indices, data.batch(step, indices)))
        return batches

    on_gpu = device.type == "cuda"
    time_share = clock.share()
    steps = range(start, config.steps)
    if start and time_share == 1:  # the time was over before: only the export is left
        steps = range(start, start)
    prepared = in_order(prepare, steps, config.workers, pin_memory=on_gpu)
    done = saved = logged = start
    unchecked = []  # Numbers of the latest steps
    stopped = False
    if config.minutes:
        spent = clock.times()["minutes_spent"]
        say(f"--minutes {config.minutes:g}: the learning rate follows the time, "
            f"{spent:.2f} have passed")
    logged_at = time.perf_counter()
    seconds = 0.2 if sys.stderr.isatty() else 10  # between updates of the bar; few in a log file
    bar = tqdm(
        steps, name, initial=start, total=config.steps, disable=rank > 0, mininterval=seconds)
    for step in bar:
        lr = learning_rate(config, step, time_share)
        set_learning_rate(run.optimizer, lr)

        # Forward and backward. Only buffers change before the step is complete.
        buffers = [buffer.clone() for buffer in run.model.buffers()]
        with stop.at_once():
            batches = next(prepared)
            values, columns = compute_gradients(run, data, config, batches, device)
        if stop.interrupted:
            for buffer, value in zip(run.model.buffers(), buffers):
                buffer.copy_(value)
            stopped = True
            break

        # Step. Nothing here waits for a GPU.
        gradient_norm = clip_gradients(run.params, config.max_grad_norm)
        table = gather_numbers(values, rank, world_size, device)
        unchecked.append(Numbers(step, table, gradient_norm))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.update(step)

        # Check, log, save, draw.
        done = step + 1
        time_share = clock.share()
        is_last = done == config.steps or time_share == 1
        logs = done % config.log_every == 0 or is_last
        saves = done % config.save_every == 0 or is_last
        draws = config.sample_every and (done % config.sample_every == 0 or is_last)
        if logs or saves or draws:
            check_finite(config, unchecked, saved)
            unchecked.clear()
        if logs and rank == 0:
            now = time.perf_counter()
            means = dict(zip(columns, table.mean((0, 1)).tolist()))
            speed = round((done - logged) * config.batch / (now - logged_at), 1)
            row = {
                "step": done, **means, "lr": lr, "gradient_norm": float(gradient_norm),
                "samples_per_s": speed}
            if config.minutes:
                row["time_share"] = time_share
            append_log(config.out, rows, row)
            bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
            logged = done
            logged_at = now
        if saves:
            save(run, done, settings | clock.times(), inputs, rank)
            saved = done
        stopped = anyone(bool(stop.name))
        if draws and not stopped:
            with stop.at_once():
                draw(recipe, run, done, config, data, rows, rank)
            stopped = stop.interrupted
        if stopped or is_last:
            break
    prepared.close()

    if not stopped:
        with stop.at_once(), whole_and_averaged(run):
            if rank == 0:
                with exporting(config) as folder:
                    recipe.export(run.model, folder, config, data)
        stopped = stop.interrupted
    bar.close()
    if not stopped:
        if done < config.steps:
            say(
                f"--minutes {config.minutes:g}: the time is over after step {done} of "
                f"{config.steps}")
        say(f"finished weights: {config.save}")
        return
    if done > saved:
        check_finite(config, unchecked, saved)
        save(run, done, settings | clock.times(), inputs, rank)
    reason = stop.name or "a signal"
    say(f"stopped by {reason} after step {done}, saved; go on with --resume latest")


def check_folders(
        config: TrainSettings, settings: dict, rank: int) -> tuple[Path | None, dict[str, str]]:
    """Clear and check the folders, before minutes of preparing data.

    Returns (the checkpoint to go on from, if any; the digests of the run's inputs).
    """
    check_writable(f"--save {config.save}", config.save)
    if rank == 0:
        clear_leftovers(config)
    wait_for_everyone()
    source = checkpoint.find_checkpoint(config.resume, Path(config.out, "checkpoints"), say)
    if source:
        checkpoint.check_settings(source, settings)

    # The first process reads all files, and the others learn whether it found fault with them.
    inputs, fault = {}, None
    try:
        if rank == 0:
            inputs = digest_inputs(config)
            if source:
                check_inputs(source, inputs, config.allow_data_change, say)
            check_overwriting(config)
    except (InputError, OSError) as error:
        fault = error
    if anyone(fault is not None):
        raise fault or InputError("stopped, for the reason that the first process gives")
    return source, inputs


def compute_gradients(
        run: Run, data: object, config: TrainSettings, batches: list[tuple[list[int], dict]],
        device: torch.device) -> tuple[list[list], list[str]]:
    """Forward and backward of one step, in parts that fit into memory, one for each of `batches`.

    batches: (numbers of its samples, what data.batch gave) for each of these parts.
    Returns for each of them [loss, values to log], and the names of these.
    """
    numbers = []
    for micro, (indices, batch) in enumerate(batches):
        batch = to_device(batch, device)
        # Seeded by the first sample's number, so that dropout is the same after a resume.
        seed_everything(rng(config.seed, "loss", indices[0]).initial_seed(), device)
        synchronize_gradients(run.loss, on=micro == config.gradient_accumulation - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            if hasattr(data, "finish"):
                data.finish(batch)
            loss, logged_values = run.loss(batch)
        (loss / config.gradient_accumulation).backward()
        numbers.append([loss, *logged_values.values()])
        columns = ["loss", *logged_values]  # the same names in every micro-batch
    return numbers, columns


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch, and of batches in it, on the device; the rest as it is.

    Timesteps `t` stay on the CPU, where a schedule looks them up.
    """
    moved = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            value = to_device(value, device)
        elif torch.is_tensor(value) and key != "t":
            value = value.to(device, non_blocking=True)
        moved[key] = value
    return moved


def build(recipe: ModuleType, config: TrainSettings, device: torch.device) -> tuple[Run, object]:
    """Model, optimizer, average and data of a recipe. Returns (Run, data)."""
    seed_everything(config.seed, device)
    model = recipe.build(config)
    on_cpu = device.type == "cpu"  # otherwise a CPU only prepares the pictures
    choose_threads(sum(param.nbytes for param in model.parameters()) if on_cpu else 0)
    # `setup` returns the parameters to train; all others are frozen below.
    trained = {id(param) for param in recipe.setup(model, config)}
    names = {name for name, param in model.named_parameters() if id(param) in trained}

    # Channels-last is the fast order for convolutions in 16 bits (see weights/parts.py). FSDP
    # does not shard it.
    memory_format = torch.preserve_format
    if config.precision == "bf16" and not config.fsdp:
        memory_format = torch.channels_last
    model.to(device, memory_format=memory_format).train()
    for name, param in model.named_parameters():
        param.requires_grad_(name in names)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)

    data = recipe.data(model, config)
    loss = distribute(Loss(model, recipe.loss, config), config)
    # Sharding has replaced the parameters.
    params = {name: param for name, param in model.named_parameters() if name in names}
    lr_scale = recipe.lr_scale(config) if hasattr(recipe, "lr_scale") else {}
    optimizer = build_optimizer(params, config, lr_scale)
    return Run(model, loss, params, optimizer, EMA(params, config.ema)), data


def enable_gradient_checkpointing(model: torch.nn.Module):
    """Recompute activations in the backward pass, in the networks of a model that can."""
    networks = []
    for module in model.modules():
        if hasattr(module, "enable_gradient_checkpointing"):
            networks.append(module)
    if not networks:
        raise InputError(
            "--gradient-checkpointing: this recipe's model cannot recompute its activations; "
            "leave the flag out")
    for network in networks:
        network.enable_gradient_checkpointing()


def resume(
        run: Run, config: TrainSettings, source: Path | None,
        rank: int) -> tuple[int, list[dict]]:
    """Load the checkpoint `source`, if any. Returns (steps done, rows of the log so far)."""
    folder = Path(config.out, "checkpoints")
    start = checkpoint.load_checkpoint(source, run) if source else 0
    say(f"going on from {source}" if source else f"starting in {config.out}")
    wait_for_everyone()  # others may still be reading what the first process removes
    if rank > 0:
        return start, []
    checkpoint.remove_old(folder, config.keep, start)
    return start, start_log(config.out, start)


def save(run: Run, done: int, settings: dict, inputs: dict, rank: int):
    """Write a checkpoint, then remove those that it makes superfluous."""
    folder = Path(settings["out"], "checkpoints")
    state = checkpoint.run_state(run)  # shards come from every process
    if rank == 0:
        checkpoint.write_checkpoint(folder, done, state, settings, inputs)
        checkpoint.remove_old(folder, settings["keep"], done)


def draw(
        recipe: ModuleType, run: Run, done: int, config: TrainSettings, data: object,
        rows: list[dict], rank: int):
    """Draw the recipe's sample grid with the averaged weights, and the loss curve."""
    with whole_and_averaged(run):
        if rank == 0:
            with replacing(Path(config.out, f"samples/step-{done:06d}.png")) as temporary:
                recipe.sample(run.model, config, data).save(temporary)
            if rows:
                with replacing(Path(config.out, "loss.png")) as temporary:
                    loss_curve(rows).save(temporary)


if __name__ == "__main__":
    sys.exit(main())
