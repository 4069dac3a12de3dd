"""sample.py: it draws what the pipeline draws, and can draw its pictures again from themselves.

A mistake is answered in one sentence.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, PngImagePlugin

import sample
from minipic.common import printable
from minipic.diffusion.schedule import Schedule
from minipic.image import open_picture, read_saved_settings
from minipic.kernels import casting
from minipic.pipeline import Pipeline
from minipic.weights import save_weights

PROMPT = "a small red sphere"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test runs in an empty folder with a picture and two masks."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Image.fromarray(pixels[..., 0]).save("mask.png")
    Image.new("L", (32, 32), 255).save("small.png")
    Image.new("L", (64, 64)).save("black.png")


def run(*flags: str) -> int:
    """The exit code of `sample.py FLAGS` with the random tiny model on the CPU, three steps."""
    return sample.main(["--model", str(tiny.folder()), "--device", "cpu", "--steps", "3", *flags])


def names_of(pattern: str = "pictures/*.png") -> list[str]:
    return sorted(path.name for path in Path().glob(pattern))


def same(path: str, picture: Image.Image) -> bool:
    return np.array_equal(np.asarray(open_picture(path)), np.asarray(picture))


def drawn(prompt: str = PROMPT, **settings) -> list[Image.Image]:
    """What the pipeline of `run` draws."""
    return tiny.model().generate(prompt, **{"steps": 3, **settings})


def error_of(capsys) -> str:
    """The one line that sample.py has written instead of drawing."""
    output = capsys.readouterr()
    line = output.err.rpartition("\r")[2]  # before it a progress bar may have been drawn and cleared
    assert line.startswith("sample.py: ") and line.count("\n") == 1 and line.endswith("\n")
    assert not output.out and not names_of()
    return line.removeprefix("sample.py: ").removesuffix("\n")


# Drawing ------------------------------------------------------------------------------------------

def test_pictures_a_grid_and_their_settings_are_written(capsys):
    assert run(PROMPT, "--negative", "blue", "--seed", "5", "--n", "2") == 0
    assert names_of() == ["grid.png", "picture-0002.png", "picture.png"]
    expected = drawn(negative="blue", seed=5, n=2)
    assert same("pictures/picture.png", expected[0]) and same("pictures/picture-0002.png", expected[1])
    output = capsys.readouterr()
    assert output.out == "pictures/grid.png\n"
    assert output.err.count("0/3") == output.err.count("3/3") == 1  # one bar
    kept = read_saved_settings("pictures/picture-0002.png")
    assert (kept["prompt"], kept["seed"], kept["n"], kept["sampler"], kept["size"]) == (PROMPT, 6, 1, "euler", "64x64")
    assert Image.open("pictures/picture.png").info["parameters"].startswith(
        f"{PROMPT}\nNegative prompt: blue\nSteps: 3, Sampler: euler, CFG scale: 5.0, Seed: 5, Size: 64x64, Model: ")


def test_nothing_is_overwritten():
    for seed in ("1", "2"):
        assert run(PROMPT, "--n", "1", "--seed", seed, "--out", "cat.png", "--film", "film.png") == 0
    assert names_of("[cf]*.png") == ["cat-0002.png", "cat.png", "film-0002.png", "film.png"]
    assert same("cat.png", drawn(seed=1)[0]) and same("cat-0002.png", drawn(seed=2)[0])


@pytest.mark.parametrize("ending", [pytest.param("jpg", marks=pytest.mark.slow), "JPEG", "webp"])
def test_the_ending_of_out_decides_the_format(ending, capsys):
    assert run(PROMPT, "--n", "1", "--out", f"cat.{ending}") == 0
    assert run(PROMPT, "--n", "2", "--out", f"cat.{ending}") == 0
    assert names_of("cat*") == [f"cat-0002.{ending}", f"cat-0003.{ending}", f"cat-grid.{ending}", f"cat.{ending}"]
    assert capsys.readouterr().out == f"cat.{ending}\ncat-grid.{ending}\n"
    difference = np.int16(open_picture(f"cat.{ending}")) - np.int16(drawn()[0])
    assert np.abs(difference).mean() < 30  # these formats lose a little
    assert sample.main(["--from", f"cat.{ending}", "--device", "cpu", "--out", "again.png"]) == 0
    assert same("again.png", drawn()[0])


def test_a_folder_may_be_called_like_a_picture():
    Path("cat.jpg").mkdir()
    assert run(PROMPT, "--n", "1", "--out", "cat.jpg") == run(PROMPT, "--n", "1", "--out", "v1.5") == 0
    assert names_of("*/*") == ["picture.png", "picture.png"]


def test_a_random_seed_is_printed_and_kept(capsys):
    seeds = set()
    for name in ("a.png", "b.png"):
        assert run(PROMPT, "--n", "2", "--seed", "-1", "--out", name) == 0
        seed = read_saved_settings(name)["seed"]
        assert f"sample.py: seed {seed}\n" in capsys.readouterr().err
        assert same(name, drawn(seed=seed, n=2)[0])
        seeds |= {seed, read_saved_settings(name.replace(".", "-0002."))["seed"]}
    assert len(seeds) == 4


def test_after_the_largest_seed_comes_0():
    assert run(PROMPT, "--n", "2", "--seed", str(2**64 - 1), "--out", "a.png") == 0
    assert [read_saved_settings(name)["seed"] for name in ("a.png", "a-0002.png")] == [2**64 - 1, 0]
    expected = drawn(seed=2**64 - 1, n=2)
    assert same("a.png", expected[0]) and same("a-0002.png", expected[1])
    largest, zero = drawn(seed=2**64 - 1)[0], drawn(seed=0)[0]
    assert np.abs(np.int16(expected[0]) - np.int16(largest)).max() <= 1  # other batch sizes round differently
    assert np.abs(np.int16(expected[1]) - np.int16(zero)).max() <= 1


def test_white_on_a_transparent_layer_is_a_mask():
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[8:24, 16:48] = 255
    Image.fromarray(layer).save("layer.png")
    flags = ["--image", "photo.png", "--strength", "1", "--n", "1", "--out"]
    assert run(PROMPT, *flags, "layered.png", "--mask", "layer.png") == 0
    Image.fromarray(layer[..., 3]).save("grey.png")
    assert run(PROMPT, *flags, "grey mask.png", "--mask", "grey.png") == 0
    assert same("layered.png", open_picture("grey mask.png"))
    assert same("layered.png", drawn(image=open_picture("photo.png"), strength=1.0, mask=Image.fromarray(layer))[0])


def test_a_large_picture_is_drawn_at_the_size_of_the_model(recwarn):
    Image.open("photo.png").resize((400, 300)).save("large.png")
    assert run(PROMPT, "--n", "1", "--image", "large.png", "--out", "fitted.png") == 0
    assert read_saved_settings("fitted.png")["size"] == "72x48"  # 64 x 64 pixels, in multiples of 8
    assert [str(warning.message) for warning in recwarn] == [
        "the image of 400x300 pixels is drawn as 72x48, about as many as the model was trained for; name a size to "
        "change that"]
    assert open_picture("fitted.png").size == (72, 48)


@pytest.mark.parametrize("picture, size, cut", [
    ((64, 64), None, False), ((75, 50), None, False), ((64, 64), "64x48", True), ((400, 300), "64x48", False),
    ((403, 300), "64x48", False), ((200, 300), "64x64", True), ((16, 5), None, True)])
def test_a_picture_of_another_shape_is_cut_and_that_is_said(picture, size, cut, recwarn):
    Image.open("photo.png").resize(picture).save("given.png")
    flags = ["--size", size] if size else []
    assert run(PROMPT, "--n", "1", "--steps", "2", "--image", "given.png", *flags) == 0
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == cut and all("has another shape than" in message for message in messages)


def test_processes_share_the_prompts(monkeypatch):
    Path("prompts.txt").write_text("\ufeffa red cube\n\n  a blauwe kegel, é \r\na cone\n", encoding="utf-8")
    prompts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(PROMPT, "--prompts", "prompts.txt", "--n", "1", "--steps", "1", "--out", f"by{rank}") == 0
        for name in ("picture.png", "picture-0002.png"):
            prompts.append(read_saved_settings(f"by{rank}/{name}")["prompt"])
    assert prompts == [PROMPT, "a blauwe kegel, é", "a red cube", "a cone"]


def test_the_film_ends_with_the_picture():
    assert run(PROMPT, "--n", "2", "--film", "film.png") == 0
    film, picture = open_picture("film.png"), open_picture("pictures/picture.png")
    enlarged = np.asarray(picture.resize((192, 192), Image.Resampling.BICUBIC))
    pixels = np.asarray(film)
    x = film.width - 192 - 8
    y, = (y for y in range(film.height - 191) if np.array_equal(pixels[y, x:x + 192], enlarged[0]))
    assert np.array_equal(pixels[y:y + 192, x:x + 192], enlarged)
    assert film.width == 3 * 192 + 4 * 8


def other_vae() -> Pipeline:
    """The same model with another VAE, written to the folder "other"."""
    other = Pipeline.load(tiny.folder())
    other.vae.post_quant_conv.weight.data *= -1
    other.save("other")
    return other


@pytest.mark.slow
def test_flags_reach_the_pipeline():
    photo, mask = Image.open("photo.png"), Image.open("mask.png")
    cases = {
        ("--image", "photo.png", "--strength", "0.7"): dict(image=photo, strength=0.7),
        ("--image", "photo.png", "--mask", "mask.png", "--strength", "1"): dict(image=photo, mask=mask, strength=1.0),
        ("--size", "48x64"): dict(size=(48, 64)),
        ("--original-size", "32x48", "--crop", "4,6", "--target-size", "16x8"):
            dict(original_size=(32, 48), crop=(4, 6), target_size=(16, 8)),
        ("--refiner", str(tiny.folder("refiner")), "--steps", "5"): dict(refiner=tiny.model("refiner"), steps=5),
        ("--negative", ""): dict(negative=""),
    }
    plain = drawn()[0]
    for i, (flags, settings) in enumerate(cases.items()):
        assert run(PROMPT, "--n", "1", "--out", f"{i}.png", *flags) == 0
        expected = drawn(**settings)[0]
        assert same(f"{i}.png", expected) and expected.tobytes() != plain.tobytes(), flags
    other = other_vae()
    assert run(PROMPT, "--n", "1", "--out", "vae.png", "--vae", "other/vae") == 0
    assert same("vae.png", other.generate(PROMPT, steps=3)[0]) and not same("vae.png", plain)


def test_loras_reach_the_pipeline_and_come_back_with_from():
    for i in range(2):
        name = f"unet.mid_block.attentions.0.transformer_blocks.{i}.attn2.to_out.0"
        save_weights({f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)},
                     f"{i}.safetensors")
    loras = ["--lora", "0.safetensors:-0.5", "--lora", "1.safetensors"]
    assert run(PROMPT, "--n", "1", "--guidance", "0", *loras, "--out", "lora.png") == 0
    pipeline = Pipeline.load(tiny.folder(), lora=[("0.safetensors", -0.5), "1.safetensors"])
    assert same("lora.png", pipeline.generate(PROMPT, steps=3, guidance=0)[0])
    assert not same("lora.png", drawn(guidance=0)[0])
    assert sample.main(["--from", "lora.png", "--out", "again.png"]) == 0
    assert same("again.png", open_picture("lora.png"))


def test_many_pictures_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr("minipic.pipeline.PIXELS_AT_ONCE", 2 * 64 * 64)
    assert run(PROMPT, "--n", "3", "--size", "64x64") == 0
    together = drawn(n=3)
    names = ("picture.png", "picture-0002.png", "picture-0003.png")
    for name, expected in zip(names, together):  # other batch sizes round differently
        assert np.abs(np.int16(open_picture(f"pictures/{name}")) - np.int16(expected)).max() <= 1


@pytest.mark.slow
def test_as_a_program_from_another_folder():
    """Where there is no weights/tiny: the one beside the package is used."""
    command = [sys.executable, str(ROOT / "sample.py"), "red cube AND blue cube", "--device=cpu"]
    done = subprocess.run([*command, "--steps", "2", "--n", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "pictures/picture.png\n") and "2/2" in done.stderr
    letters = "sample.py: 'AND' is read as letters; a sum of prompts is not supported\n"
    assert done.stderr.startswith(letters) and done.stderr.count("letters") == 1  # once, not for each encoder
    with pytest.warns(UserWarning, match="read as letters"):
        expected, = Pipeline.load(ROOT / "weights/tiny").generate("red cube AND blue cube", steps=2)
    assert same("pictures/picture.png", expected)
    added = ["--vae", "weights/tiny", "--embedding", "weights/adapters/ring.safetensors", "--controlnet",
             "weights/adapters/edges", "--control", "weights/adapters/edges/example.png", "--n", "1", "--steps", "1"]
    assert sample.main(["a <ring>", "--device", "cpu", *added, "--out", "added.png"]) == 0
    wrong = subprocess.run([*command, "--steps", "-1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("sample.py: --steps: choose between")


@pytest.mark.slow
@pytest.mark.parametrize("encoding, name, shown", [
    ("ascii", "caf\u00e9.png", "caf\\xe9.png"), ("utf-8", "\udce9.png", "\\udce9.png")])
def test_a_path_that_the_terminal_cannot_spell_is_escaped(encoding, name, shown, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", f"{encoding}:strict")
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "a cube", "--model", str(tiny.folder()), "--device=cpu",
                           "--steps", "1", "--n", "1", "--out", name], capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, f"{shown}\n")
    assert Path(name).exists()


def start(*flags: str, **options) -> subprocess.Popen:
    """sample.py as a program that draws for minutes."""
    command = [sys.executable, str(ROOT / "sample.py"), PROMPT, "--steps", "1000", "--device", "cpu", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("number, is_drawing", [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_ends_it_in_one_line(number, is_drawing):
    """While it draws, and while PyTorch is being imported."""
    with start() as process:
        if is_drawing:
            assert process.stderr.read(len(PROMPT) + 1).endswith(PROMPT)  # the bar begins
        else:
            time.sleep(1)
        sent = time.perf_counter()
        process.send_signal(number)
        output, errors = process.communicate()
        assert time.perf_counter() - sent < 10  # about one; more on a busy machine
    assert process.returncode == 128 + number and not output
    *bar, last = errors.splitlines()
    assert last.strip() == f"sample.py: stopped by {number.name}"
    assert not any("Traceback" in line or "Error" in line for line in bar)


def test_a_closed_pipe_ends_it_quietly():
    with start("--steps", "1", "--n", "1") as process:
        process.stdout.close()
        assert "Error" not in process.stderr.read()
    assert names_of() == ["picture.png"]


# Settings kept in a picture -----------------------------------------------------------------------

def test_from_recreates_a_picture_and_given_flags_win(capsys):
    assert run(PROMPT, "--seed", "5", "--n", "2", "--sampler", "dpmpp_2m", "--guidance=3", "--out", "first") == 0
    capsys.readouterr()
    assert sample.main(["--from", "first/picture-0002.png"]) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"sample.py: first/picture-0002.png: takes prompt=('{PROMPT}',), n=1, seed=6, size='64x64'")
    assert "guidance=3.0, sampler='dpmpp_2m'" in said
    assert same("pictures/picture.png", open_picture("first/picture-0002.png"))
    assert sample.main(["--from=first/grid.png", "--out", "second"]) == 0
    assert names_of("second/*") == names_of("first/*")
    for name in names_of("first/*"):
        assert same(f"second/{name}", open_picture(f"first/{name}"))
    assert sample.main(["--steps", "2", "--from", "first/picture.png", "a blue cube", "--out", "third"]) == 0
    expected, = drawn("a blue cube", seed=5, sampler="dpmpp_2m", guidance=3.0, steps=2)
    assert same("third/picture.png", expected)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> dict:
    """The settings that a picture keeps."""
    path = tmp_path_factory.mktemp("kept") / "picture.png"
    assert run(PROMPT, "--n", "1", "--steps", "1", "--out", str(path)) == 0
    return read_saved_settings(path)


def write_settings(settings: dict):
    """picture.png with these settings inside, as save_new writes them."""
    info = PngImagePlugin.PngInfo()
    info.add_text("minipic", json.dumps(settings))
    tiny.picture().save("picture.png", pnginfo=info)


@pytest.mark.parametrize("name, value", [
    ("seed", 2**64), ("seed", -2**64), ("steps", "many"), ("steps", 2.5), ("steps", True), ("n", [1]), ("n", {"a": 1}), ("seed", 10**30),
    ("guidance", float("nan")), ("guidance", "5"), ("size", 64), ("prompt", 3), ("prompt", [["a"]]), ("lora", [1]),
    ("lora", {"a": "b"}), ("control_scale", ["1"]), ("dtype", "fp8"), ("graph", 1), ("sampler", ["euler"]),
    ("adapter", ["a"]), ("lora_allow_partial", "yes")])
def test_a_setting_that_no_flag_can_give_is_refused(name, value, kept, capsys):
    write_settings({**kept, "graph": None, name: value})
    code = sample.main(["--from", "picture.png", "--device", "cpu"])
    if name == "graph":  # is not taken from a picture
        assert code == 0
        return
    assert code == 2
    assert error_of(capsys) == f"picture.png: its setting {name} is {value!r}, which no flag can give; leave --from out"


TOO_MUCH = {
    "n": (101, "asks for 101, more than 100; give --n"),
    "size": ("4096x2048", "asks for 8,388,608, more than 4,194,304; give --size"),
    "prompt": (["a cube"] * 101, "asks for 101, more than 100"),
    "lora": (["a.safetensors"] * 101, "asks for 101, more than 100; give --lora"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_picture_does_not_ask_for_much(name, kept, capsys):
    value, words = TOO_MUCH[name]
    write_settings({**kept, name: value})
    assert sample.main(["--from", "picture.png", "--device", "cpu"]) == 2
    assert f"picture.png: its setting {name} {words}" in error_of(capsys)
    if name == "size":
        assert sample.main(["--from", "picture.png", "--device", "cpu", "--size", "64x64"]) == 0


@pytest.mark.parametrize("address", [
    "//server/a", "\\\\server\\a", "/\\server/a", "\\\\?\\UNC\\server\\a", "http://server/a", "HTTPS://server/a",
    "file://server/a", "smb://server/a", "a\0b"])
def test_no_other_computer_is_asked_for_a_picture(address, kept, capsys):
    names = ["model", "vae", "refiner", "adapter", "image", "mask", "edit", "lora", "embedding", "controlnet", "control",
             "source"]
    for name in names:
        is_many = isinstance(getattr(sample.Settings(), name), tuple)
        write_settings({**kept, name: ["weights/tiny", address] if is_many else address})
        assert sample.main(["--from", "picture.png", "--device", "cpu"]) == 2
        assert f"picture.png: its setting {name} is {address!r}, and files of other" in error_of(capsys)
    write_settings({**kept, "refiner": address, "prompt": f"{address} painted"})
    assert sample.main(["--from", "picture.png", "--device", "cpu", "--refiner", "nowhere"]) == 2
    assert capsys.readouterr().err.endswith("sample.py: nowhere: no such file or folder; fetch official weights with "
                                            "weights/download.py\n")


@pytest.mark.parametrize("name", ["prompt", "negative", "model", "lora", "task", "size"])
def test_text_of_a_picture_does_not_reach_the_terminal_raw(name, kept, capsys):
    write_settings({**kept, name: "\x1b[2J\x1b]0;title\x07\u202e\nx"})
    sample.main(["--from", "picture.png", "--device", "cpu"])
    output = capsys.readouterr()
    text = output.out + output.err
    assert "\\x1b[2J" in text
    assert not set(text) & set("\x1b\x07\u202e") and "\nx" not in text


def test_a_negative_seed_of_older_pictures_is_the_one_that_pytorch_took(kept):
    write_settings({**kept, "seed": -3})
    assert sample.main(["--from", "picture.png", "--device", "cpu", "--out", "again.png"]) == 0
    noise = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (-3, 2**64 - 3)]
    assert torch.equal(*noise) and same("again.png", drawn(steps=1, seed=2**64 - 3)[0])


def test_settings_that_a_picture_lacks_or_that_are_gone_do_no_harm(kept):
    kept = {name: value for name, value in kept.items() if name not in ("guidance", "control_scale")}
    write_settings({**kept, "verify": False})
    assert sample.main(["--from", "picture.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert same("again.png", drawn(steps=1)[0])


# Mistakes -----------------------------------------------------------------------------------------

WRONG = {
    "--size 60x64": "--size: 60x64: width and height must be multiples of 8",
    "--size 64": "--size: 64: expected two whole numbers such as 64x64",
    "--size 0x0": "--size: 0x0: width and height must be multiples of 8, at least 8",
    "--size 99999999999999999999x8": "--size: 99999999999999999999x8: expected two whole numbers",
    "--vae=": "--vae: is empty; name a value or leave it out",
    "--controlnet=": "--controlnet: is empty",
    "--adapter=": "--adapter: is empty",
    "--from=": "--from: is empty",
    "--lora nothing.safetensors": "nothing.safetensors: cannot read it (No such file or directory)",
    "--lora a.safetensors:nan": "--lora: a.safetensors:nan: 'nan' is no number; write FILE:0.8",
    "--lora a.safetensors:1.2.3": "--lora: a.safetensors:1.2.3: '1.2.3' is no number; write FILE:0.8",
    "--sampler eular": "--sampler: 'eular' is unknown; choose one of ",
    "--steps 0": "--steps: choose between 1 and 1000, not 0",
    "--seed 99999999999999999999": "--seed: 99999999999999999999 is too large; choose below 18446744073709551616",
    "--guidance nan": "--guidance: invalid float value: 'nan'",
    "--guidance inf": "--guidance: invalid float value: 'inf'",
    "--steps many": "--steps: invalid int value: 'many'",
    "--seed -2": "--seed: choose 0 to 18446744073709551615, not -2",
    "--strength 0.5": "--strength: needs --image or --source; without it this does nothing",
    "--control photo.png": "--control: needs --controlnet",
    "--control-scale 1": "--control-scale: needs --controlnet",
    "--image-guidance 2": "--image-guidance: needs --edit",
    "--task edges": "--task: needs --adapter",
    "--lora-allow-partial": "--lora-allow-partial: needs --lora",
    "--negative x --guidance 1": "--negative: does nothing where --guidance is off",
    "--image photo.png --mask black.png": "--mask: hardly anything of it is white, so nothing would be drawn; paint white",
    "--out cat.gif": "--out: cat.gif: pictures are not written as .gif; choose .png, .jpg, .jpeg, .webp",
    "--n 0": "--n: choose 1 or more pictures, not 0",
    "--model nowhere": "nowhere: no such file or folder",
    f"--model {'a' * 300}": "File name too long",
    "--model photo.png": "photo.png is",
    "--vae nowhere": "nowhere",
    "--refiner nowhere": "nowhere",
    "--image nowhere.png": "nowhere.png: no such picture",
    "--image text.txt": "text.txt: expected a PNG, JPEG, WebP or similar picture",
    "--image photo.png --mask small.png": "--mask: has 32x32 pixels and the image 64x64",
    "--mask mask.png": "--mask: needs --image; without it this does nothing",
    "--image photo.png --strength 0": "--strength: choose above 0",
    "--image photo.png --strength 2": "--strength: choose above 0",
    "--device cpu --graph": "--graph: is for NVIDIA's GPUs",
    "--prompts latin.txt": "latin.txt, line 1: is not UTF-8; save it as UTF-8",
    "--prompts nowhere.txt": "nowhere.txt: cannot be read (No such file or directory)",
    "--prompts empty.txt": "--prompts: empty.txt: has no line with a prompt",
    "--prompts zero.txt": "zero.txt: is no text, or not in UTF-8",
    "--from photo.png": "photo.png: no minipic settings",
    "--from": "--from: expected one argument",
    "--from nowhere.png": "nowhere.png: no such picture",
    "--device gpu": "--device: gpu is not available here; use cpu",
    "--device meta": "--device: meta is not available here; use cpu",
    "--device hpu": "--device: hpu is not available here; use cpu",
    "--dtype fp8": "--dtype: invalid choice: 'fp8'",
    "--crop 3": "--crop: 3: expected two whole numbers such as 64,64",
    "--out text.txt": "--out text.txt: cannot write there",
    "--film film.txt": "--film: film.txt must be the name of a .png file",
    "--film text.txt/film.png": "--film text.txt/film.png: cannot write there",
    "--source photo.png": "--source: needs --adapter",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_value_is_one_sentence(flags, capsys):
    Path("text.txt").write_text("no picture")
    Path("empty.txt").write_text("\n \n")
    Path("zero.txt").write_bytes(b"a\0b\n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    assert run(PROMPT, *flags.split()) == 2
    assert WRONG[flags] in error_of(capsys)


NEAREST = {  # what people type who know other programs, or mistype: the flag that they mean
    "--cfg 7": "--guidance",
    "--cfg-scale=7": "--guidance",
    "--guidance_scale 7": "--guidance",
    "--guidence 3": "--guidance",
    "--height 512": "--size",
    "--width=512": "--size",
    "--num_inference_steps 20": "--steps",
    "--stepz 3": "--steps",
    "--Steps 3": "--steps",
    "--negative_prompt x": "--negative",
    "--num-images 2": "--n",
    "--denoising-strength 0.5": "--strength",
    "--ckpt a.safetensors": "--model",
    "--scheduler euler": "--sampler",
    "--init_image a.png": "--image",
    "--controlnet_conditioning_scale 1": "--control-scale",
    "--control_scale 1": "--control-scale",
    "--output_dir a": "--out",
    "--from_ a.png": "--from",
    "--from_file a.txt": "--prompts",
    "--n_iter 2": "--n",
    "--batch-size 2": "--n",
    "--ckpt_path a": "--model",
    "--precision full": "--dtype",
    "--outpath a": "--out",
}


@pytest.mark.parametrize("flags", NEAREST)
def test_a_wrong_flag_is_answered_with_the_nearest_right_one(flags, capsys):
    assert run(PROMPT, *flags.split()) == 2
    answer = f"no such flag; did you mean {NEAREST[flags]}? --help lists every flag"
    assert error_of(capsys) == f"{flags.split()[0]}: {answer}"


def test_a_prompt_needs_no_flag_and_other_mistakes_are_told_apart(capsys):
    assert run("--prompt", "a cat") == 2
    assert error_of(capsys) == '--prompt: the prompt is given without a flag, in quotes: "..."'
    for flag in ("--colour", "--lowvram", "--clip_skip"):  # nothing here is meant
        assert run(PROMPT, flag, "2") == 2
        assert error_of(capsys) == f"{flag}: no such flag; --help lists every flag"


def test_nothing_to_draw_is_said(capsys):
    assert run() == 2
    assert "nothing to draw; give a prompt" in error_of(capsys)
    Path("prompts.txt").write_text("\n\n")
    assert run("--prompts", "prompts.txt") == 2


def test_a_prompt_that_is_no_text_is_said(capsys):
    assert run("a red \udcff cube") == 2  # what Python makes of a byte that is no UTF-8
    assert "a prompt is not UTF-8" in error_of(capsys)


@pytest.mark.parametrize("words", [
    "CUDA out of memory. Tried to allocate 20.00 GiB", "can't allocate memory: 9 bytes", None])
def test_too_little_memory_is_one_sentence(words, capsys, monkeypatch):
    def denoise(*given, **more):
        raise MemoryError() if words is None else RuntimeError(f"first line: {words}\nand many others")

    monkeypatch.setattr(Pipeline, "denoise", denoise)
    assert run(PROMPT) == 2
    assert error_of(capsys) == "not enough memory; choose a smaller --size, or --dtype bf16"


def test_another_error_is_not_taken_for_too_little_memory(monkeypatch):
    def denoise(*given, **more):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(Pipeline, "denoise", denoise)
    with pytest.raises(RuntimeError):
        run(PROMPT)


# Devices ------------------------------------------------------------------------------------------

def test_a_folder_with_one_file_is_as_large_as_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "LARGE_MODEL", 10)
    monkeypatch.setattr(sample, "computes_bf16", lambda device: True)
    file = tmp_path / "one.safetensors"
    for size, dtype in ((11, "bf16"), (10, "fp32")):
        file.write_bytes(bytes(size))
        for path in (tmp_path, file):
            config = sample.Settings(model=str(path), device="cpu")
            assert sample.choose_device(config) == (torch.device("cpu"), dtype)


def test_the_size_of_a_model_beside_the_package_counts(monkeypatch):
    monkeypatch.setattr(sample, "LARGE_MODEL", 10)
    monkeypatch.setattr(sample, "computes_bf16", lambda device: True)
    assert sample.choose_device(sample.Settings(device="cpu")) == (torch.device("cpu"), "bf16")


@pytest.mark.parametrize("size, variable, threads", [
    (10, None, [1]), (11, None, []), (10, "4", [])])
def test_a_small_model_is_computed_by_one_thread(size, variable, threads, monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr("minipic.common.SMALL_MODEL", 10)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    (tmp_path / "one.safetensors").write_bytes(bytes(size))
    assert run(PROMPT, "--model", str(tmp_path)) == 2  # no model: the threads are chosen before it is read
    assert chosen == threads


@pytest.mark.parametrize("dtype, able, slow", [
    ("bf16", False, True), ("bf16", True, False), ("fp16", True, True), ("fp32", False, False), (None, False, False)])
def test_warns_of_arithmetic_that_the_cpu_lacks(dtype, able, slow, monkeypatch, recwarn):
    monkeypatch.setattr(sample, "computes_bf16", lambda device: able)
    sample.warn_if_slow(sample.Settings(dtype=dtype, device="cpu"), torch.device("cpu"))
    messages = [str(warning.message) for warning in recwarn]
    expected = f"--dtype {dtype}: this CPU computes it many times slower than fp32; leave it out"
    assert messages == ([expected] if slow else [])


def test_large_weights_stay_in_the_16_bits_of_their_file(monkeypatch, tmp_path):
    monkeypatch.setattr(casting, "LARGE", 1)
    tiny.model().save(tmp_path, torch.float16)
    dtypes, forward = set(), casting.Product.forward

    def watched_forward(ctx, x, weight, bias):
        dtypes.add((x.dtype, weight.dtype))
        return forward(ctx, x, weight, bias)

    monkeypatch.setattr(casting.Product, "forward", watched_forward)
    assert run(PROMPT, "--model", str(tmp_path), "--dtype", "fp32", "--steps", "1") == 0
    assert dtypes == {(torch.float32, torch.float16)}


def test_selftest_compares(capsys):
    assert run("--selftest") == 0
    assert "cpu in fp32 against the CPU in fp32: grey levels differ by 0.000 on average" in capsys.readouterr().out
    assert run("--selftest", "--dtype", "bf16") in (0, 1)  # a random model need not be robust
    assert "differ by 0.000" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_schedule_of_a_model_can_be_overridden():
    """For files that do not say how they are to be drawn; the refiner keeps what it predicts."""
    for flags, changes in {
            ("--spacing", "trailing"): dict(spacing="trailing"), ("--karras",): dict(karras=True),
            ("--zero-snr", "--spacing", "trailing"): dict(zero_snr=True, spacing="trailing"),
            ("--prediction", "v_prediction"): dict(prediction="v_prediction")}.items():
        for refiner in (None, "refiner"):
            name = f"{flags[0][2:]}-{refiner}.png"
            more = ["--refiner", str(tiny.folder("refiner")), "--steps", "5"] if refiner else []
            assert run(PROMPT, "--n", "1", "--out", name, *flags, *more) == 0
            first = Pipeline.load(tiny.folder())
            first.schedule = first.schedule.override(**changes)
            settings = {"steps": 3}
            if refiner:
                second = Pipeline.load(tiny.folder("refiner"))
                same_grid = {key: changes.get(key) for key in ("spacing", "karras")}
                second.schedule = second.schedule.override(**same_grid)
                settings = {"steps": 5, "refiner": second}
            expected = first.generate(PROMPT, **settings)[0]
            assert same(name, expected) and expected.tobytes() != drawn()[0].tobytes(), flags
    assert sample.main(["--from", "spacing-None.png", "--out", "again.png"]) == 0
    assert same("again.png", open_picture("spacing-None.png"))


def test_few_steps_with_a_single_file_are_warned_of(recwarn, tmp_path):
    (tmp_path / "model.safetensors").touch()
    for values, warned in (
            ({"steps": 4}, True), ({"steps": 9}, False), ({"steps": 4, "spacing": "leading"}, False),
            ({"steps": 4, "model": "."}, False)):
        config = sample.Settings(**{"model": "model.safetensors", **values})
        sample.warn_if_few_steps(config, Schedule())
        messages = [str(warning.message) for warning in recwarn.list]
        assert any("--spacing trailing" in message for message in messages) == warned
        recwarn.clear()
    sample.warn_if_few_steps(sample.Settings(model="model.safetensors", steps=1), Schedule(timestep_spacing="trailing"))
    assert not recwarn.list


# The command line ---------------------------------------------------------------------------------

def test_a_text_cannot_steer_the_terminal():
    assert printable("é 猫 🫐 ~") == "é 猫 🫐 ~"
    assert printable("\x1b[2J\n\t\x9b\u202e\udcff") == r"\x1b[2J\n\t\x9b\u202e\udcff"


def test_a_lora_may_lie_in_any_folder():
    assert sample.split_file("a.safetensors/b.safetensors:0.8") == ("a.safetensors/b.safetensors", "0.8")
    assert sample.split_file("B.SafeTensors:0.8") == ("B.SafeTensors", "0.8")
    assert sample.split_file("C:\\loras\\b.safetensors") == ("C:\\loras\\b.safetensors", "")
    assert sample.split_file("word.safetensors:<a/b>") == ("word.safetensors", "<a/b>")
    assert sample.split_file("other") == ("other", "")


def test_help_fits_a_terminal(capsys):
    with pytest.raises(SystemExit) as exit:
        sample.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 0
    assert len(lines) <= 75 and max(map(len, lines)) <= 80
    for field in dataclasses.fields(sample.Settings):
        assert field.metadata["help"] and field.metadata["group"] + ":" in lines
        flag = field.name if field.name == "prompt" else "--" + field.name.strip("_").replace("_", "-")
        assert any(line.split()[:1] in ([flag], [flag + ","]) for line in lines), flag


def test_the_last_of_a_repeated_flag_counts():
    assert sample.find_flag("--adapter", ["--adapter", "a", "x", "--adapter=b"]) == "b"
    assert sample.find_flag("--adapter", ["--adapter=b", "--adapter", "a"]) == "a"
    assert sample.find_flag("--adapter", ["a", "--adapter"]) is None
