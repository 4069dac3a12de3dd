"""The papers, one file each: what a paper changes, how to train it, and how to draw with it.

`train.py` relies on these names in a recipe (minipic/recipes) and in a paper:

    Settings
        a flat dataclass on top of training.settings.TrainSettings; its fields are flags
    build(config)
        the model (nn.Module), from nothing or from files
    setup(model, config)
        replaces parts; returns the list of parameters that train. train.py freezes all others
    lr_scale(config)
        may be left out: {parameter: its learning rate as a multiple of the others'}
    data(model, config)
        an object with batch(step, indices) -> dict, and with what `sample` and `export` need to
        know. `indices` are sample numbers; all that is random for sample i comes from
        common.rng(config.seed, purpose, i). With --workers another process calls it, on the CPU.
        It may also have finish(batch), which adds what the model has to compute, on its device
    loss(model, batch, config)
        a scalar, or (scalar, {name: value to log})
    sample(model, config, data)
        a picture (PIL) that shows how far the training has come
    export(model, folder, config, data)
        writes the finished weights

A paper also says how to draw with what it trained. `sample.py --adapter PATH` looks up the paper's
name in the file's metadata (key "paper", see `find_adapter`) and uses

    DrawOptions
        a dataclass of the paper's own flags for drawing; it may be empty
    load_adapter(pipeline, path)
        adds what was trained to a Pipeline; returns what drawing needs to know of it
    tasks(path)
        may be left out: the names that the task can have, as the flag's choices
    prompt_for(adapter, prompt, task)
        the text that the model reads for a prompt
    plan(pipeline, adapter, settings, sources, task, options)
        checks what is asked for; returns settings with size and sampler filled in, and the
        (width, height) that the model draws for one picture
    draw(pipeline, adapter, settings, sources, task, options, on_step)
        a list of settings.n PIL pictures
    UNCONDITIONAL
        may be left out: whether it also draws without a prompt

`settings` is a draw_settings.DrawSettings, `sources` a list of PIL pictures that are given, `task`
a name or None; `on_step(x, x0)` is called after every step. Networks may still be on the disk: a
`network` for Pipeline.denoise looks up `pipeline.unet` when it is called, not before.

A new paper is one new file here and its name in PAPERS.
"""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from minipic.common import InputError, ParameterError, find_file
from minipic.weights.configs import config_from_json
from minipic.weights.files import read_header

PAPERS = {  # name: module
    "onepic": "minipic.papers.onepic",
    "mtu": "minipic.papers.mtu",
    "indomain": "minipic.papers.indomain",
    "specialist": "minipic.papers.specialist",
    "onediffusion": "minipic.papers.onediffusion",
}


def load_paper(name: str) -> ModuleType:
    """The module of a paper."""
    return importlib.import_module(PAPERS[name])


def find_adapter(path: str | Path) -> tuple[str, Path]:
    """(name of the paper, file) of what a paper's training saved: a .safetensors file or a folder.

    Raises ParameterError where no paper of this project has made it.
    """
    path = find_file(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        _, metadata = read_header(file)
        for name in PAPERS:
            # Files from before there was the key "paper" have one that is called like the paper.
            if metadata.get("paper") == name or name in metadata:
                return name, file
    raise ParameterError(
        "adapter", f"{path} was made by none of the papers here ({', '.join(PAPERS)}); give an "
        "ordinary LoRA as lora, a ControlNet as controlnet")


def metadata_of(paper: str, trained_as: Any) -> dict[str, str]:
    """The metadata of a file that a paper saves. trained_as: a dataclass, which drawing needs."""
    return {"paper": paper, paper: json.dumps(asdict(trained_as))}


def from_metadata(cls: type, paper: str, path: Path, choices: dict | None = None) -> Any:
    """The `trained_as` of `metadata_of`, of the class `cls`. InputError where it is damaged.

    choices: {field: the values that it can have}, of fields that have choices.
    """
    try:
        _, metadata = read_header(path)
        return config_from_json(cls, dict(json.loads(metadata[paper])), choices or {}, path)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: its metadata does not say how it was trained; it is damaged or was not made "
            f"by train.py {paper}") from None
