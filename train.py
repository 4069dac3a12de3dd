"""Trains every recipe with one loop, read from top to bottom.

    python train.py --help                                     the recipes
    python train.py vae --help                                 one recipe's settings
    python train.py vae --steps 2000 --out runs/vae            train; stop with Ctrl-C, which saves first
    python train.py vae --out runs/vae --resume latest         go on exactly where it stopped
    torchrun --standalone --nproc_per_node=2 train.py vae      the same on two GPUs (or CPU processes); --fsdp shards

The run folder then holds log.jsonl, loss.png, samples/step-000500.png, checkpoints/step-000500/ and model/, the
finished weights in the official layout. What a recipe must have is listed in minipic/methods/__init__.py.
"""

import dataclasses
import importlib
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from minipic import checkpoint, training
from minipic.common import InputError, computes_bf16, enough_memory, from_argv, random
from minipic.image import loss_curve
from minipic.weights import replacing, writable

RECIPES = {name: f"minipic.methods.{name}"
           for name in ("judge", "clip", "vae", "t2i", "dreambooth", "inversion", "controlnet", "edit",
                        "onepic")}


def main(argv=None):
    """Read the command line and train. Returns the exit code: 0 finished or stopped on request, 2 cannot go on."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(__doc__ + "\nRecipes:")
            for name, module in RECIPES.items():
                print(f"    {name:10} {importlib.import_module(module).__doc__.strip().splitlines()[0]}")
            return 0
        if name not in RECIPES:
            raise InputError(f"unknown recipe {name!r}; the first word must be one of {', '.join(RECIPES)}")
        recipe = importlib.import_module(RECIPES[name])
        config = from_argv(recipe.Recipe, flags, f"train.py {name}")
        out = config.out or f"runs/{name}"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = dataclasses.replace(config, out=out, save=config.save or f"{out}/model",
                                     precision=config.precision or ("bf16" if computes_bf16(device) else "fp32"))
        with training.Stop() as stop, enough_memory("try a smaller --batch, a larger --accumulate, --checkpointing"):
            train(name, recipe, config, stop)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, or a path that cannot be used
        print(f"train.py: {error}; make room or choose another path, and go on with --resume latest", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized() and dist.get_backend() == "nccl":  # taking Gloo's down can hang in PyTorch 2.6
            dist.destroy_process_group()
    return 0


def train(name, recipe, config, stop):
    """Train `recipe` (a module of minipic/methods) with the settings `config`; files go to config.out."""
    rank, world, device = training.start_processes(config)
    settings, say = {"recipe": name, **dataclasses.asdict(config)}, print if rank == 0 else lambda line: None
    say("\n".join(f"{key:14} {value}" for key, value in {**settings, "device": device, "processes": world}.items()))

    if source := checkpoint.choose(config.resume, Path(config.out, "checkpoints"), say):
        checkpoint.check(source, settings)
    for flag in ("out", "save"):  # not found out after minutes of preparing data, or hours of training
        writable(f"--{flag} {settings[flag]}", settings[flag])
    run, batch_of = build(recipe, config, device)
    say(f"training {sum(p.numel() for p in run.params.values()):,} of "
        f"{sum(p.numel() for p in run.model.parameters()):,} weights")
    start, rows = resume(run, config, source, rank, say)

    saved, logged, clock = start, start, time.perf_counter()
    bar = tqdm(range(start, config.steps), name, initial=start, total=config.steps, disable=rank > 0,
               mininterval=0.2 if sys.stderr.isatty() else 10)  # seconds; a log file needs fewer lines
    for step in bar:
        rate, numbers = training.learning_rate(config, step), []
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["times"]

        for micro, indices in enumerate(training.share(config, step, rank, world)):
            batch = {key: value.to(device) if torch.is_tensor(value) else value
                     for key, value in batch_of(step, indices).items()}
            training.seed(random(config.seed, "loss", indices[0]).initial_seed(), device)  # for dropout and the like
            training.synchronize(run, micro == config.accumulate - 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, extra = run.loss(batch)
            (loss / config.accumulate).backward()
            numbers.append([loss, *extra.values()])

        norm, table = training.clip(run, config.clip), training.gather(numbers, rank, world, device)
        training.refuse_nan(config, step, table, norm, saved)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.update(step)

        done, last = step + 1, step + 1 == config.steps
        if rank == 0 and (done % config.log_every == 0 or last):
            now, means = time.perf_counter(), dict(zip(["loss", *extra], table.mean((0, 1)).tolist()))
            training.log(config, rows, {"step": done, **means, "lr": rate, "gradient_norm": norm,
                                        "samples_per_s": round((done - logged) * config.batch / (now - clock), 1)})
            bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
            logged, clock = done, now
        stopped = training.gather([[bool(stop.signal)]], rank, world, device).any() and not last
        if done % config.save_every == 0 or last or stopped:
            save(run, done, settings, rank)
            saved = done
        if stopped:
            bar.close()
            return say(f"stopped by {stop.signal or 'a signal'} after step {done}, saved; go on with --resume latest")
        if config.sample_every and (done % config.sample_every == 0 or last):
            draw(recipe, run, done, config, rows, rank)

    with training.finished(run):
        if rank == 0:
            recipe.export(run.model, Path(config.save), config)
    say(f"finished weights: {config.save}")


def build(recipe, config, device):
    """Model, optimizer, average and data of a recipe. Returns (training.Run, its function of step and indices)."""
    training.seed(config.seed, device)
    model = recipe.build(config)
    ids = {id(p) for p in recipe.setup(model, config)}
    names = {name for name, p in model.named_parameters() if id(p) in ids}
    fast = config.precision == "bf16" and not config.fsdp  # see layouts.order; FSDP shards no other order
    model.to(device, memory_format=torch.channels_last if fast else torch.preserve_format).train()
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    able = [module for module in model.modules() if hasattr(module, "checkpointing")]
    if config.checkpointing and not able:
        raise InputError("--checkpointing: this recipe's model cannot recompute its activations; leave the flag out")
    for module in able:
        module.checkpointing = config.checkpointing
    batch_of = recipe.data(model, config)
    loss = training.distribute(training.Loss(model, recipe.loss, config), config)
    params = {name: p for name, p in model.named_parameters() if name in names}  # sharding has replaced them
    optimizer = training.optimizer_of(params, config, recipe.rates(config) if hasattr(recipe, "rates") else {})
    return training.Run(model, loss, params, optimizer, training.EMA(params, config.ema)), batch_of


def resume(run, config, source, rank, say):
    """Load the checkpoint `source`, if any. Returns (steps done, rows of the log so far)."""
    folder, start = Path(config.out, "checkpoints"), checkpoint.load(source, run) if source else 0
    say(f"going on from {source}" if source else f"starting in {config.out}")
    training.wait()  # others may still be reading what the first process tidies
    if rank > 0:
        return start, []
    checkpoint.tidy(folder, config.keep, start)
    return start, training.start_log(config, start)


def save(run, done, settings, rank):
    """Write a checkpoint, then remove those it makes superfluous."""
    folder, state = Path(settings["out"], "checkpoints"), checkpoint.state_of(run)  # shards come from every process
    if rank == 0:
        checkpoint.write(folder, done, state, settings)
        checkpoint.tidy(folder, settings["keep"], done)


def draw(recipe, run, done, config, rows, rank):
    """Draw the recipe's sample grid with the averaged weights, and the loss curve."""
    with training.finished(run):
        if rank == 0:
            with replacing(Path(config.out, f"samples/step-{done:06d}.png")) as part:
                recipe.sample(run.model, config).save(part)
            if rows:
                with replacing(Path(config.out, "loss.png")) as part:
                    loss_curve(rows).save(part)


if __name__ == "__main__":
    sys.exit(main())
