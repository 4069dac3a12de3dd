"""sample.py: what it draws is the pipeline's, what it writes recreates itself, and a wrong value is one sentence."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample
from minipic.image import open_picture, read_settings
from minipic.layers import casting
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


def run(*flags):
    """The exit code of `sample.py FLAGS` with the random tiny model on the CPU, three steps."""
    return sample.main(["--model", str(tiny.folder()), "--device", "cpu", "--steps", "3", *flags])


def pictures(pattern="pictures/*.png"):
    return sorted(path.name for path in Path().glob(pattern))


def same(path, picture):
    return np.array_equal(np.asarray(open_picture(path)), np.asarray(picture))


def drawn(**settings):
    prompt = settings.pop("prompt", PROMPT)
    return Pipeline.load(tiny.folder()).generate(prompt, **{"steps": 3, **settings})


def test_pictures_a_grid_and_their_settings_are_written(capsys):
    assert run(PROMPT, "--negative", "blue", "--seed", "5", "--n", "2") == 0
    assert pictures() == ["grid.png", "picture-0002.png", "picture.png"]
    expected = drawn(negative="blue", seed=5, n=2)
    assert same("pictures/picture.png", expected[0]) and same("pictures/picture-0002.png", expected[1])
    output = capsys.readouterr()
    assert output.out == "pictures/grid.png\n" and "3/3" in output.err  # progress
    kept = read_settings("pictures/picture-0002.png")
    assert (kept["prompt"], kept["seed"], kept["n"], kept["sampler"], kept["size"]) == (PROMPT, 6, 1, "euler", "64x64")
    assert Image.open("pictures/picture.png").info["parameters"].startswith(
        f"{PROMPT}\nNegative prompt: blue\nSteps: 3, Sampler: euler, CFG scale: 5.0, Seed: 5, Size: 64x64, Model: ")


def test_from_recreates_a_picture_and_later_flags_win():
    assert run(PROMPT, "--seed", "5", "--n", "2", "--sampler", "dpmpp_2m", "--guidance=3", "--out", "first") == 0
    assert sample.main(["--from", "first/picture-0002.png"]) == 0
    assert same("pictures/picture.png", open_picture("first/picture-0002.png"))
    assert sample.main(["--from=first/grid.png", "--out", "second"]) == 0
    assert pictures("second/*") == pictures("first/*")
    assert all(same(f"second/{name}", open_picture(f"first/{name}")) for name in pictures("first/*"))
    assert sample.main(["--steps", "2", "--from", "first/picture.png", "a blue cube", "--out", "third"]) == 0
    assert same("third/picture.png", drawn(prompt="a blue cube", seed=5, sampler="dpmpp_2m", guidance=3.0, steps=2)[0])


def test_nothing_is_overwritten():
    for seed in ("1", "2"):
        assert run(PROMPT, "--n", "1", "--seed", seed, "--out", "cat.png", "--film", "film.png") == 0
    assert pictures("[cf]*.png") == ["cat-0002.png", "cat.png", "film-0002.png", "film.png"]
    assert same("cat.png", drawn(seed=1)[0]) and same("cat-0002.png", drawn(seed=2)[0])


def test_processes_share_the_prompts(monkeypatch):
    Path("prompts.txt").write_text("\ufeffa red cube\n\n  a blauwe kegel, é \r\na cone\n", encoding="utf-8")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(PROMPT, "--prompts", "prompts.txt", "--n", "1", "--out", f"by{rank}") == 0
    by = [[read_settings(f"by{rank}/{name}")["prompt"] for name in ("picture.png", "picture-0002.png")] for rank in (0, 1)]
    assert by == [[PROMPT, "a blauwe kegel, é"], ["a red cube", "a cone"]]


def test_the_film_ends_with_the_picture():
    assert run(PROMPT, "--n", "2", "--film", "film.png") == 0
    film, picture = open_picture("film.png"), open_picture("pictures/picture.png")
    wide, film_values = np.asarray(picture.resize((192, 192), Image.Resampling.BICUBIC)), np.asarray(film)
    x = film.width - 192 - 8
    y, = (y for y in range(film.height - 191) if np.array_equal(film_values[y, x:x + 192], wide[0]))
    assert np.array_equal(film_values[y:y + 192, x:x + 192], wide)
    assert film.width == 3 * 192 + 4 * 8


def test_flags_reach_the_pipeline():
    photo, mask = Image.open("photo.png"), Image.open("mask.png")
    Pipeline.load(tiny.folder("refiner")).save("refiner")
    other = Pipeline.load(tiny.folder())
    other.vae.post_quant_conv.weight.data *= -1
    other.save("other")
    cases = {
        ("--image", "photo.png", "--strength", "0.7"): dict(image=photo, strength=0.7),
        ("--image", "photo.png", "--mask", "mask.png", "--strength", "1"): dict(image=photo, mask=mask, strength=1.0),
        ("--size", "48x64"): dict(size=(48, 64)),
        ("--original-size", "32x48", "--crop", "4,6", "--target-size", "16x8"):
            dict(original_size=(32, 48), crop=(4, 6), target_size=(16, 8)),
        ("--refiner", "refiner", "--steps", "5"): dict(refiner=Pipeline.load("refiner"), steps=5),
        ("--negative", ""): dict(negative=""),
    }
    plain = drawn()[0]
    for i, (flags, settings) in enumerate(cases.items()):
        assert run(PROMPT, "--n", "1", "--out", f"{i}.png", *flags) == 0
        expected = drawn(**settings)[0]
        assert same(f"{i}.png", expected) and expected.tobytes() != plain.tobytes(), flags
    assert run(PROMPT, "--n", "1", "--out", "vae.png", "--vae", "other/vae") == 0
    assert same("vae.png", other.generate(PROMPT, steps=3)[0]) and not same("vae.png", plain)


def test_loras_reach_the_pipeline_and_come_back_with_from():
    for i in range(2):
        name = f"unet.mid_block.attentions.0.transformer_blocks.{i}.attn2.to_out.0"
        save_weights({f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)},
                     f"{i}.safetensors")
    assert run(PROMPT, "--n", "1", "--guidance", "0", "--lora", "0.safetensors:-0.5", "--lora", "1.safetensors", "--out", "lora.png") == 0
    pipeline = Pipeline.load(tiny.folder(), lora=[("0.safetensors", -0.5), "1.safetensors"])
    assert same("lora.png", pipeline.generate(PROMPT, steps=3, guidance=0)[0])
    assert not same("lora.png", drawn(guidance=0)[0])
    assert sample.main(["--from", "lora.png", "--out", "again.png"]) == 0
    assert same("again.png", open_picture("lora.png"))


def test_many_pictures_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr("minipic.pipeline.AT_ONCE", 2 * 64 * 64)
    assert run(PROMPT, "--n", "3", "--size", "64x64") == 0
    together = drawn(n=3)
    names = ("picture.png", "picture-0002.png", "picture-0003.png")
    for name, expected in zip(names, together):  # other batch sizes round differently
        assert np.abs(np.int16(open_picture(f"pictures/{name}")) - np.int16(expected)).max() <= 1


WRONG = {
    "--size 60x64": "--size 60x64: width and height must be multiples of 8",
    "--size 64": "--size 64: expected two whole numbers such as 64x64",
    "--size 0x0": "--size 0x0",
    "--size 99999999999999999999x8": "--size 99999999999999999999x8: expected two whole numbers",
    "--vae=": "--vae: is empty; name a value or leave it out",
    "--controlnet=": "--controlnet: is empty",
    "--from=": "--from: is empty",
    "--lora nothing.safetensors": "nothing.safetensors: cannot read it (No such file or directory)",
    "--lora a.safetensors:nan": "--lora a.safetensors:nan: 'nan' is no number; write FILE:0.8",
    "--lora a.safetensors:1.2.3": "--lora a.safetensors:1.2.3: '1.2.3' is no number; write FILE:0.8",
    "--sampler eular": "--sampler eular: unknown; choose one of euler",
    "--steps 0": "--steps 0",
    "--seed 99999999999999999999": "argument --seed: invalid int value: '99999999999999999999'",
    "--guidance nan": "argument --guidance: invalid float value: 'nan'",
    "--guidance inf": "argument --guidance: invalid float value: 'inf'",
    "--steps many": "argument --steps: invalid int value: 'many'",
    "--n 0": "--n 0",
    "--model nowhere": "nowhere: no such file or folder",
    f"--model {'a' * 300}": "File name too long",
    "--model photo.png": "photo.png is",
    "--vae nowhere": "nowhere",
    "--refiner nowhere": "nowhere",
    "--image nowhere.png": "nowhere.png: no such picture",
    "--image text.txt": "text.txt: expected a PNG, JPEG, WebP or BMP picture",
    "--image photo.png --mask small.png": "--mask has 32x32 pixels and --image 64x64",
    "--mask mask.png": "--mask: needs --image",
    "--image photo.png --strength 0": "--strength 0",
    "--device cpu --graph": "--graph: is for NVIDIA's GPUs",
    "--image photo.png --strength 2": "--strength 2",
    "--prompts latin.txt": "--prompts latin.txt: is not UTF-8",
    "--prompts nowhere.txt": "--prompts nowhere.txt: cannot be read",
    "--from photo.png": "photo.png: no minipic settings",
    "--from": "--from: expected one argument",
    "--device gpu": "--device gpu: not available here",
    "--device meta": "--device meta: not available here",
    "--device hpu": "--device hpu: not available here",
    "--dtype fp8": "argument --dtype: invalid choice: 'fp8'",
    "--crop 3": "--crop 3: expected two whole numbers such as 64,64",
    "--out text.txt": "--out text.txt: cannot write there",
    "--film film.txt": "--film film.txt: must be the name of a .png file",
    "--film text.txt/film.png": "--film text.txt/film.png: cannot write there",
    "--stepz 3": "unrecognized arguments: --stepz 3",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_value_is_one_sentence(flags, capsys):
    Path("text.txt").write_text("no picture")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    assert run(PROMPT, *flags.split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1 and WRONG[flags] in output.err
    assert not output.out and not pictures()


def test_nothing_to_draw_is_said(capsys):
    assert run() == 2 and "nothing to draw; give a prompt" in capsys.readouterr().err
    Path("prompts.txt").write_text("\n\n")
    assert run("--prompts", "prompts.txt") == 2


def test_a_prompt_that_is_no_text_is_said(capsys):
    assert run("a red \udcff cube") == 2  # what Python makes of a byte that is no UTF-8
    assert "a prompt is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 20.00 GiB", "can't allocate memory: 9 bytes",
                                   None])
def test_too_little_memory_is_one_sentence(words, capsys, monkeypatch):
    def steps(*given, **settings):
        raise MemoryError() if words is None else RuntimeError(f"first line: {words}\nand many others")
    monkeypatch.setattr(Pipeline, "steps", steps)
    assert run(PROMPT) == 2
    assert capsys.readouterr().err == "sample.py: not enough memory; choose a smaller --size, or --dtype bf16\n"
    words = "an illegal memory access"
    with pytest.raises(RuntimeError):
        run(PROMPT)


def test_a_folder_with_one_file_is_as_large_as_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "LARGE", 10)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    (tmp_path / "one.safetensors").write_bytes(bytes(11))
    assert [sample.choose(sample.Settings(model=str(path), device="cpu"), 0)[1]
            for path in (tmp_path, tmp_path / "one.safetensors")] == ["bf16", "bf16"]


@pytest.mark.parametrize("dtype, able, slow", [("bf16", False, True), ("bf16", True, False), ("fp16", True, True),
                                               ("fp32", False, False), (None, False, False)])
def test_warns_of_arithmetic_that_the_cpu_lacks(dtype, able, slow, monkeypatch, recwarn):
    monkeypatch.setattr(sample, "computes_bf16", lambda device: able)
    sample.choose(sample.Settings(model=str(tiny.folder()), dtype=dtype, device="cpu"), 0)
    assert [str(warning.message) for warning in recwarn] == [
        f"--dtype {dtype}: this CPU computes it many times slower than fp32; leave it out"] * slow


def test_large_weights_stay_in_the_16_bits_of_their_file(monkeypatch, tmp_path):
    monkeypatch.setattr(casting, "LARGE", 1)
    tiny.build(folder=tmp_path).save(tmp_path, torch.float16)
    found, product = set(), casting.Product.forward
    monkeypatch.setattr(casting.Product, "forward", lambda ctx, x, weight, bias: (
        found.add((x.dtype, weight.dtype)), product(ctx, x, weight, bias))[1])
    assert run(PROMPT, "--model", str(tmp_path), "--dtype", "fp32") == 0
    assert found == {(torch.float32, torch.float16)}


def test_a_lora_may_lie_in_any_folder():
    assert sample.cut("a.safetensors/b.safetensors:0.8") == ("a.safetensors/b.safetensors", "0.8")
    assert sample.cut("B.SafeTensors:0.8") == ("B.SafeTensors", "0.8")
    assert sample.cut("C:\\loras\\b.safetensors") == ("C:\\loras\\b.safetensors", "")
    assert sample.cut("word.safetensors:<a/b>") == ("word.safetensors", "<a/b>") and sample.cut("other") == ("other", "")


def test_selftest_compares(capsys):
    assert run("--selftest") == 0
    assert "cpu in fp32 against the CPU in fp32: grey levels differ by 0.000 on average" in capsys.readouterr().out
    assert run("--selftest", "--dtype", "bf16") in (0, 1)  # a random model need not be robust
    assert "differ by 0.000" not in capsys.readouterr().out


def test_every_setting_has_a_line_of_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(sample.Settings))


def test_as_a_program():
    command = [sys.executable, str(ROOT / "sample.py"), "red cube " * 40, "--model", str(tiny.folder()), "--device=cpu"]
    done = subprocess.run([*command, "--steps", "2", "--n", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "pictures/picture.png\n") and "2/2" in done.stderr
    cut = "sample.py: the prompt has 80 tokens and 75 fit; cut off: 'cube red cube red cube'\n"
    assert done.stderr.startswith(cut) and done.stderr.count("cut off") == 1  # once, not for each encoder
    wrong = subprocess.run([*command, "--steps", "-1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("sample.py: --steps -1: choose between")
