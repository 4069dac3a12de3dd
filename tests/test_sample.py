"""sample.py: it draws what the pipeline draws, and can draw its pictures again from themselves.

A mistake is answered in one sentence.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, PngImagePlugin

import sample
from minipic.image import open_picture, read_settings
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
    Image.new("L", (32, 32)).save("small.png")


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
    assert output.out == "pictures/grid.png\n" and "3/3" in output.err  # progress
    kept = read_settings("pictures/picture-0002.png")
    assert (kept["prompt"], kept["seed"], kept["n"], kept["sampler"], kept["size"]) == (PROMPT, 6, 1, "euler", "64x64")
    assert Image.open("pictures/picture.png").info["parameters"].startswith(
        f"{PROMPT}\nNegative prompt: blue\nSteps: 3, Sampler: euler, CFG scale: 5.0, Seed: 5, Size: 64x64, Model: ")


def test_nothing_is_overwritten():
    for seed in ("1", "2"):
        assert run(PROMPT, "--n", "1", "--seed", seed, "--out", "cat.png", "--film", "film.png") == 0
    assert names_of("[cf]*.png") == ["cat-0002.png", "cat.png", "film-0002.png", "film.png"]
    assert same("cat.png", drawn(seed=1)[0]) and same("cat-0002.png", drawn(seed=2)[0])


def test_processes_share_the_prompts(monkeypatch):
    Path("prompts.txt").write_text("\ufeffa red cube\n\n  a blauwe kegel, é \r\na cone\n", encoding="utf-8")
    prompts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(PROMPT, "--prompts", "prompts.txt", "--n", "1", "--steps", "1", "--out", f"by{rank}") == 0
        for name in ("picture.png", "picture-0002.png"):
            prompts.append(read_settings(f"by{rank}/{name}")["prompt"])
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


def test_as_a_program_from_another_folder():
    """Where there is no weights/tiny: the one beside the package is used."""
    command = [sys.executable, str(ROOT / "sample.py"), "red cube " * 40, "--device=cpu"]
    done = subprocess.run([*command, "--steps", "2", "--n", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "pictures/picture.png\n") and "2/2" in done.stderr
    cut = "sample.py: the prompt has 80 tokens and 75 fit; cut off: 'cube red cube red cube'\n"
    assert done.stderr.startswith(cut) and done.stderr.count("cut off") == 1  # once, not for each encoder
    with pytest.warns(UserWarning, match="75 fit"):
        expected, = Pipeline.load(ROOT / "weights/tiny").generate("red cube " * 40, steps=2)
    assert same("pictures/picture.png", expected)
    wrong = subprocess.run([*command, "--steps", "-1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("sample.py: --steps: choose between")


# Settings kept in a picture -----------------------------------------------------------------------

def test_from_recreates_a_picture_and_given_flags_win():
    assert run(PROMPT, "--seed", "5", "--n", "2", "--sampler", "dpmpp_2m", "--guidance=3", "--out", "first") == 0
    assert sample.main(["--from", "first/picture-0002.png"]) == 0
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
    return read_settings(path)


def write_settings(settings: dict):
    """picture.png with these settings inside, as save_new writes them."""
    info = PngImagePlugin.PngInfo()
    info.add_text("minipic", json.dumps(settings))
    tiny.picture().save("picture.png", pnginfo=info)


@pytest.mark.parametrize("name, value", [
    ("steps", "many"), ("steps", 2.5), ("steps", True), ("n", [1]), ("n", {"a": 1}), ("seed", 10**30),
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
    "--sampler eular": "--sampler: 'eular' is unknown; choose one of euler",
    "--steps 0": "--steps: choose between 1 and 1000, not 0",
    "--seed 99999999999999999999": "--seed: invalid int value: '99999999999999999999'",
    "--guidance nan": "--guidance: invalid float value: 'nan'",
    "--guidance inf": "--guidance: invalid float value: 'inf'",
    "--steps many": "--steps: invalid int value: 'many'",
    "--n 0": "--n: choose 1 or more pictures, not 0",
    "--model nowhere": "nowhere: no such file or folder",
    f"--model {'a' * 300}": "File name too long",
    "--model photo.png": "photo.png is",
    "--vae nowhere": "nowhere",
    "--refiner nowhere": "nowhere",
    "--image nowhere.png": "nowhere.png: no such picture",
    "--image text.txt": "text.txt: expected a PNG, JPEG, WebP or BMP picture",
    "--image photo.png --mask small.png": "--mask: has 32x32 pixels and the image 64x64",
    "--mask mask.png": "--mask: needs an image",
    "--image photo.png --strength 0": "--strength: choose above 0",
    "--image photo.png --strength 2": "--strength: choose above 0",
    "--device cpu --graph": "--graph: is for NVIDIA's GPUs",
    "--prompts latin.txt": "--prompts: latin.txt is not UTF-8",
    "--prompts nowhere.txt": "--prompts: nowhere.txt cannot be read",
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
}


@pytest.mark.parametrize("flags", NEAREST)
def test_a_wrong_flag_is_answered_with_the_nearest_right_one(flags, capsys):
    assert run(PROMPT, *flags.split()) == 2
    answer = f"no such flag; did you mean {NEAREST[flags]}? --help lists every flag"
    assert error_of(capsys) == f"{flags.split()[0]}: {answer}"


def test_a_prompt_needs_no_flag_and_other_mistakes_are_told_apart(capsys):
    assert run("--prompt", "a cat") == 2
    assert error_of(capsys) == '--prompt: the prompt is given without a flag, in quotes: "..."'
    assert run(PROMPT, "--colour", "red") == 2
    assert error_of(capsys) == "--colour: no such flag; --help lists every flag"


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


# The command line ---------------------------------------------------------------------------------

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
