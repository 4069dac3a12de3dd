"""The contract of papers: a new one is one file and one name in a table, and nothing else changes.

A toy paper is written, trained through train.py, and drawn with through sample.py.
"""

import dataclasses
import inspect
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

import sample
import train
from minipic.image import open_picture, read_saved_settings
from minipic.papers import PAPERS, find_adapter, load_paper
from minipic.pipeline import DrawSettings
from minipic.training.settings import TrainSettings
from minipic.weights import read_weights, save_weights
from minipic.weights.files import read_header
from tiny import PROMPT, picture

TOY = '''"""A toy paper: it learns one number for each channel, which is added to what the UNet predicts."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from minipic.latents import LatentData, denoising_loss, load_pipeline, world_pairs
from minipic.pipeline import DrawSettings
from minipic.training.flags import option
from minipic.training.settings import PairSettings
from minipic.weights import read_weights, save_weights


@dataclass
class Settings(PairSettings):
    """Learn the numbers."""
    steps: int = option(100)

@dataclass
class DrawOptions:
    strength_of_toy: float = option(1.0, "how much of the numbers is added")

def build(config):
    pipeline = load_pipeline(config, frozen=True)
    pipeline.numbers = nn.Parameter(torch.zeros(1, 4, 1, 1))
    return pipeline

def setup(pipeline, config):
    return [pipeline.numbers]

def data(pipeline, config):
    return LatentData(pipeline, world_pairs("edit", pipeline, config, 0, config.scenes), config)

def with_numbers(pipeline, numbers):
    def network(*given):
        return pipeline.unet(*given) + numbers
    return network

def loss(pipeline, batch, config):
    return denoising_loss(pipeline, batch, config, with_numbers(pipeline, pipeline.numbers))

def sample(pipeline, config, data):
    return draw(pipeline, pipeline.numbers, DrawSettings("a cube", steps=2), [])[0]

def export(pipeline, folder, config, data):
    save_weights({"numbers": pipeline.numbers}, folder / "toy.safetensors", {"paper": "toy"})

def load_adapter(pipeline, path):
    return read_weights(path)["numbers"]

def prompt_for(adapter, prompt, task):
    return f"{prompt}, as a toy"

def plan(pipeline, adapter, settings, sources, task, options):
    settings, _ = pipeline.plan(replace(settings, image=sources[0] if sources else None))
    return settings, settings.size

def draw(pipeline, adapter, settings, sources, task=None, options=DrawOptions(), on_step=lambda x, x0: None):
    settings, _ = plan(pipeline, adapter, settings, sources, task, options)
    drawing = pipeline.prepare(replace(settings, prompt=prompt_for(adapter, settings.prompt, task)))
    for x, x0 in pipeline.denoise(drawing, with_numbers(pipeline, options.strength_of_toy * adapter)):
        on_step(x, x0)
    return pipeline.decode(x)
'''


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """All that a new paper needs: its file, and its name in the table."""
    folder = tmp_path_factory.mktemp("papers")
    (folder / "toy_paper.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(PAPERS, "toy", "toy_paper")
        yield
    del sys.modules["toy_paper"]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> Path:
    """The run folder of the toy's training."""
    out = tmp_path_factory.mktemp("run")
    flags = ["--model", str(tiny.folder()), "--scenes", "4", "--batch", "2", "--steps", "2", "--lr", "0.5",
             "--warmup", "0", "--ema", "0", "--precision", "fp32", "--out", str(out)]
    assert train.main(["toy", *flags]) == 0
    return out


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test runs in a folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("photo.png")
    picture(2).save("other.png")


def run(*flags) -> int:
    """The exit code of `sample.py FLAGS` with the random tiny model, two steps."""
    return sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", *map(str, flags)])


def pixels(path: str) -> bytes:
    return open_picture(path).tobytes()


def drawn(numbers: torch.Tensor, prompt: str = f"{PROMPT}, as a toy", n: int = 1) -> list[Image.Image]:
    """What the pipeline draws from photo.png if `numbers` are added to every prediction."""
    model = tiny.model()

    def network(*given):
        return model.unet(*given) + numbers

    drawing = model.prepare(DrawSettings(prompt, steps=2, image=picture(1), n=n))
    *_, (x, _) = model.denoise(drawing, network)
    return model.decode(x)


# Training and drawing -----------------------------------------------------------------------------

def test_it_trains(trained):
    for name in ("log.jsonl", "loss.png", "samples/step-000002.png", "checkpoints/step-000002/manifest.json"):
        assert (trained / name).exists()
    _, metadata = read_header(trained / "model" / "toy.safetensors")
    assert metadata["paper"] == "toy"
    numbers = read_weights(trained / "model" / "toy.safetensors")["numbers"]
    assert numbers.shape == (1, 4, 1, 1) and numbers.abs().min() > 0.1  # Adam moves each by the learning rate
    assert find_adapter(trained / "model") == ("toy", trained / "model" / "toy.safetensors")


def test_train_lists_it(capsys):
    assert train.main(["--help"]) == 0
    assert "    toy           A toy paper: it learns one number" in capsys.readouterr().out


def test_its_flags_reach_draw(trained):
    numbers = read_weights(trained / "model" / "toy.safetensors")["numbers"]
    adapter = ["--adapter", trained / "model", "--source", "photo.png", "--n", "1"]
    for strength in (2.0, 1.0, 0.0):
        given = [] if strength == 1 else ["--strength-of-toy", strength]
        assert run(*adapter, *given, "--out", f"{strength}.png") == 0
        assert pixels(f"{strength}.png") == drawn(strength * numbers)[0].tobytes()
    assert run("--image", "photo.png", "--n", "1", "--out", "plain.png") == 0
    pictures = {pixels(f"{name}.png") for name in ("2.0", "1.0", "0.0", "plain")}
    assert len(pictures) == 4  # the plain one differs from that of strength 0 in its prompt
    assert pixels("0.0.png") == tiny.model().generate(f"{PROMPT}, as a toy", steps=2, image=picture(1))[0].tobytes()


def test_from_draws_it_again_bit_for_bit_and_given_flags_win(trained):
    flags = ["--adapter", trained / "model", "--source", "photo.png", "--strength-of-toy", "2"]
    assert run(*flags, "--n", "2", "--seed", "3", "--out", "first") == 0
    kept = read_saved_settings("first/grid.png")
    assert (kept["adapter"], kept["source"], kept["strength_of_toy"]) == (str(trained / "model"), ["photo.png"], 2.0)
    assert sample.main(["--from", "first/grid.png", "--device", "cpu", "--out", "again"]) == 0
    for name in ("picture.png", "picture-0002.png", "grid.png"):
        assert pixels(f"again/{name}") == pixels(f"first/{name}")
    again = ["--from=first/picture.png", "--device", "cpu", "--out"]
    assert sample.main([*again, "weak.png", "--strength-of-toy", "0.5"]) == 0
    assert sample.main([*again, "other-source.png", "--source", "other.png"]) == 0
    assert len({pixels(name) for name in ("first/picture.png", "weak.png", "other-source.png")}) == 3


def test_on_step_and_the_number_of_pictures_at_once(trained, monkeypatch, capsys):
    """The film has the steps, and what memory does not hold at once is drawn in parts."""
    monkeypatch.setattr("minipic.pipeline.PIXELS_AT_ONCE", 2 * 64 * 64)
    flags = ["--adapter", trained / "model", "--source", "photo.png", "--strength", "1"]
    assert run(*flags, "--n", "3", "--film", "film.png") == 0
    assert open_picture("film.png").width == 2 * 192 + 3 * 8  # two steps
    assert run(*flags, "--n", "1", "--seed", "2", "--out", "third.png") == 0
    assert pixels("third.png") == pixels("pictures/picture-0003.png")
    assert "2/2" in capsys.readouterr().err


def help_of(*flags) -> list[str]:
    with pytest.raises(SystemExit) as exit:
        sample.main([*map(str, flags), "--help"])
    assert exit.value.code == 0


def test_help_of_an_adapter_lists_its_flags(trained, capsys):
    help_of("--adapter", trained / "model")
    with_adapter = capsys.readouterr().out
    help_of()
    without = capsys.readouterr().out
    lines = with_adapter.splitlines()
    heading = lines.index("this adapter:")
    assert lines[heading + 1].split() == "--strength-of-toy X how much of the numbers is added [1.0]".split()
    added = lines[heading:heading + 3]
    assert with_adapter.replace("\n".join(added) + "\n", "") == without and max(map(len, lines)) <= 80


# Mistakes -----------------------------------------------------------------------------------------

def test_its_flags_are_unknown_without_it(capsys):
    assert run("--strength-of-toy", "2") == 2
    assert "--strength-of-toy: no such flag" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    ("--adapter lora.safetensors", "lora.safetensors was made by none of the papers here (PAPERS)"),
    ("--adapter lora.safetensors", "give an ordinary LoRA as lora, a ControlNet as controlnet"),
    ("--adapter foreign.safetensors", "foreign.safetensors was made by none of the papers here"),
    ("--adapter empty", "empty was made by none of the papers here"),
    ("--adapter nowhere.safetensors", "nowhere.safetensors: cannot read it (No such file or directory)"),
    ("--adapter photo.png", "photo.png is damaged or not a safetensors file; expected a .safetensors file"),
    ("--adapter TOY --strength-of-toy much", "--strength-of-toy: invalid float value: 'much'"),
    ("--adapter TOY --strenght-of-toy 1", "--strenght-of-toy: no such flag; did you mean --strength-of-toy?"),
    ("--adapter TOY --source nowhere.png", "nowhere.png: no such picture"),
    ("--adapter TOY --size 60x64", "--size: 60x64: width and height must be multiples of 8"),
    ("--from tampered.png", "tampered.png: its setting strength_of_toy is 'much', which no flag can give")])
def test_a_mistake_is_one_sentence(flags, words, trained, capsys):
    save_weights({"a": torch.zeros(2)}, "lora.safetensors")
    save_weights({"a": torch.zeros(2)}, "foreign.safetensors", {"paper": "another"})
    Path("empty").mkdir()
    settings = {**vars(sample.Settings()), "prompt": PROMPT, "adapter": str(trained / "model")}
    sample.save_new(picture(), "tampered.png", settings | {"strength_of_toy": "much"})
    assert run(*flags.replace("TOY", str(trained / "model")).split()) == 2
    error = capsys.readouterr().err
    words = words.replace("PAPERS", ", ".join(PAPERS))
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and words in error
    assert not Path("pictures/picture.png").exists()


def test_an_adapter_given_as_the_model_is_told_so(trained, capsys):
    assert sample.main([PROMPT, "--model", str(trained / "model"), "--strength-of-toy", "2"]) == 2
    assert capsys.readouterr().err == (
        f"sample.py: --model: {trained / 'model'} is no model but was made by train.py toy; give it with --adapter\n")


def test_an_adapter_in_the_folder_one_stands_in_is_no_model(trained, monkeypatch, tmp_path):
    for file in (trained / "model").glob("*.safetensors"):
        shutil.copyfile(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    config, paper = sample.read_flags([PROMPT])
    assert config.model == "weights/tiny" and paper is None


def test_an_adapter_may_lie_among_other_files(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "folder")
    save_weights({"a": torch.zeros(2)}, tmp_path / "folder" / "a.safetensors")
    assert find_adapter(tmp_path / "folder") == ("toy", tmp_path / "folder" / "toy.safetensors")


# The table ----------------------------------------------------------------------------------------

RECIPE_CONTRACT = {  # function: its parameters
    "build": ["config"],
    "setup": ["model", "config"],
    "data": ["model", "config"],
    "loss": ["model", "batch", "config"],
    "sample": ["model", "config", "data"],
    "export": ["model", "folder", "config", "data"],
}
CONTRACT = RECIPE_CONTRACT | {
    "load_adapter": ["pipeline", "path"],
    "prompt_for": ["adapter", "prompt", "task"],
    "plan": ["pipeline", "adapter", "settings", "sources", "task", "options"],
    "draw": ["pipeline", "adapter", "settings", "sources", "task", "options", "on_step"],
}


@pytest.mark.parametrize("name", [*PAPERS, "toy"])
def test_every_paper_has_what_the_contract_lists(name):
    """The same number of parameters: how a paper calls them is its own affair."""
    paper = load_paper(name)
    assert paper.__doc__.strip()
    assert isinstance(paper.Settings(), TrainSettings) and dataclasses.is_dataclass(paper.DrawOptions())
    for function, parameters in CONTRACT.items():
        signature = inspect.signature(getattr(paper, function))
        assert len(signature.parameters) == len(parameters), function


def test_the_contract_is_what_the_room_documents():
    text = sys.modules["minipic.papers"].__doc__
    for function, parameters in CONTRACT.items():
        assert f"\n    {function}({', '.join(parameters)})\n" in text
    assert "\n    Settings\n" in text and "\n    DrawOptions\n" in text
