"""UNets that see a picture besides x, for InstructPix2Pix and inpainting.

Their drawings are those of diffusers; their files, their flags and the recipe.
"""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import single_files
import tiny
import torch
from safetensors.torch import load_file

import sample
import train
from minipic.image import open_picture, read_saved_settings, to_tensor
from minipic.models.unet import UNet, UNetConfig
from minipic.pipeline import DrawSettings, Pipeline
from minipic.recipes import edit, t2i
from minipic.weights import save_weights, single_file
from minipic.weights.configs import read_config
from minipic.weights.files import read_json
from minipic.weights.parts import load_part
from minipic.world.tasks import TASKS
from pipelines import SEED, assert_same, final, final64, load64, peer_latents
from tiny import NEGATIVE, PROMPT, mask, picture

INPAINT = dict(image=picture(), mask=mask())


@functools.cache
def folder(channels: int, kind: str = "sdxl") -> Path:
    """The folder of a tiny model with random weights whose UNet takes so many channels."""
    model = Pipeline.load(tiny.folder(kind))
    model.unet = peers.fill(UNet(replace(model.unet.config, in_channels=channels)))
    name = f"StableDiffusion{'XL' * model.is_sdxl}{single_file.WIDER[channels]}Pipeline"
    # For some pipelines, diffusers looks at its own version.
    model.index = model.index | {"_class_name": name, "_diffusers_version": "0.30.0"}
    path = Path(tempfile.mkdtemp())
    model.save(path)
    return path


@functools.cache
def wide(channels: int, kind: str = "sdxl") -> Pipeline:
    """That model, loaded once in a test run. No test may change it."""
    return Pipeline.load(folder(channels, kind))


# Values -------------------------------------------------------------------------------------------

CASES = {  # name: (channels, kind of model, settings of the drawing)
    "edit": (8, "sdxl", dict(edit=picture(), negative=NEGATIVE)),
    "edit, no negative, ancestral":
        (8, "sdxl", dict(edit=picture(), sampler="euler_ancestral", image_guidance=1.2)),
    "edit, one size of another":
        (8, "sdxl", dict(edit=picture().resize((64, 48)), image_guidance=4.0, guidance_rescale=0.7)),
    "edit, no guidance": (8, "sdxl", dict(edit=picture(), guidance=1.0, image_guidance=1.0)),
    "edit, sd15": (8, "sd15", dict(edit=picture(), negative=NEGATIVE, guidance=7.5)),
    "mask": (9, "sdxl", dict(**INPAINT, strength=0.7, negative=NEGATIVE)),
    "mask, all": (9, "sdxl", dict(**INPAINT, strength=1.0, sampler="dpmpp_2m")),
    "mask, no guidance": (9, "sdxl", dict(**INPAINT, strength=1.0, guidance=1.0)),
    "mask, sd15": (9, "sd15", dict(**INPAINT, strength=0.7, negative=NEGATIVE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_final_latents_equal_diffusers(case):
    channels, kind, settings = CASES[case]
    given = dict(negative_prompt=settings.get("negative"), guidance_scale=settings.get("guidance", 5.0))
    if "edit" in settings:
        given |= dict(image=settings["edit"], image_guidance_scale=settings.get("image_guidance", 1.5))
        if "guidance_rescale" in settings:
            given["guidance_rescale"] = settings["guidance_rescale"]
        if kind == "sdxl":
            given["width"], given["height"] = settings["edit"].size
    else:
        given |= dict(image=[settings["image"]] * 2, mask_image=[settings["mask"]] * 2, height=64, width=64,
                      strength=settings["strength"])
    path = folder(channels, kind)
    name = read_json(path / "model_index.json")["_class_name"]
    expected = peer_latents(name, path, settings.get("sampler", "euler"), **given)
    assert_same(final64(load64(path), **settings), expected)


@pytest.mark.slow
def test_official_inpainting_says_how_its_weights_were_averaged():
    averaging = {  # by diffusers' EMAModel.save_pretrained
        "decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.6667,
        "update_after_step": 0, "use_ema_warmup": False}
    values = read_json(folder(9) / "unet" / "config.json")
    config = wide(9).unet.config
    assert read_config(UNetConfig, values | averaging) == read_config(UNetConfig, values) == config


@torch.no_grad()
@pytest.mark.parametrize("guidance, image_guidance", [(5.0, 1.5), (5.0, 1.0), (5.0, 5.0), (1.0, 2.0), (0.0, 0.0)])
def test_two_guidances_are_the_papers(guidance, image_guidance):
    """Equation 3 there. Below 1 either is off, that is 1; if both are, one prediction is enough."""
    model = wide(8)
    settings, grid = model.plan(DrawSettings(
        PROMPT, NEGATIVE, guidance=guidance, image_guidance=image_guidance, edit=picture()))
    cond, uncond = model.encode(PROMPT, NEGATIVE)
    x, latent = (peers.numbers((1, 4, 16, 16), seed).float() for seed in (1, 2))
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def answer(text, latent):
        return model.unet(torch.cat([x, latent], dim=1), 300.0, text.context, text.pooled, sizes)

    neither, image, both = answer(uncond, 0 * latent), answer(uncond, latent), answer(cond, latent)
    expected = neither + max(image_guidance, 1) * (image - neither) + max(guidance, 1) * (both - image)

    batch_sizes = []
    hook = model.unet.register_forward_hook(lambda module, args, result: batch_sizes.append(len(args[0])))
    branches = model.guidance_branches(model.stage(settings, grid, cond, uncond), settings)
    found = model.predictor(branches, 1, extra=latent)(x, torch.tensor(300.0))
    hook.remove()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert batch_sizes == [1 if guidance == 0.0 else 3]
    assert (both - image).abs().max() > 0.01 and (image - neither).abs().max() > 0.01


def test_an_edit_may_start_from_a_picture_and_keep_a_part():
    settings = dict(edit=picture(1), steps=3, seed=SEED, strength=1.0)
    free = final(wide(8), **settings, image=picture())
    kept = final(wide(8), **settings, image=picture(), mask=mask())
    plain = final(wide(8), **settings)
    assert (kept - free).abs().max() > 0.1 and (plain - free).abs().max() > 0.1
    lazy = Pipeline.load(folder(8), lazy=True)
    assert torch.equal(final(lazy, **settings), plain)


# Files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [8, 9])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_single_files_are_as_wide_as_their_first_weight(family, channels, tmp_path):
    parts, index, scheduler = single_files.tiny(family)
    config = replace(parts["unet"].config, in_channels=channels)
    networks = single_files.networks(parts | {"unet": replace(parts["unet"], config=config)})
    save_weights(single_files.single_file(family, networks), tmp_path / "one.safetensors")
    source = single_file.from_single_file(tmp_path / "one.safetensors", parts, index, scheduler)
    unet = load_part(source.parts["unet"])
    assert torch.equal(unet.conv_in.weight, networks["unet"].conv_in.weight) and unet.config == config
    name = f"StableDiffusion{'XL' * (family == 'sdxl')}{single_file.WIDER[channels]}Pipeline"
    assert source.index["_class_name"] == name


# sample.py ----------------------------------------------------------------------------------------

def run(model: Path, *flags: str) -> int:
    """The exit code of `sample.py FLAGS` with this model, two steps."""
    return sample.main([PROMPT, "--model", str(model), "--device", "cpu", "--steps", "2", "--n", "1", *flags])


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The test runs in a folder with two pictures and a mask."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("p.png")
    mask().save("m.png")
    picture(2).crop((0, 0, 64, 48)).save("flat.png")


def test_flags_reach_the_pipeline_and_come_back_with_from(inside):
    assert run(folder(8), "--edit", "flat.png", "--image-guidance", "2.5", "--out", "first.png") == 0
    expected, = wide(8).generate(PROMPT, steps=2, edit=open_picture("flat.png"), image_guidance=2.5)
    assert open_picture("first.png").tobytes() == expected.tobytes() and expected.size == (64, 48)
    assert read_saved_settings("first.png")["edit"] == "flat.png"
    assert sample.main(["--from", "first.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == expected.tobytes()
    assert run(folder(9), "--image", "p.png", "--mask", "m.png", "--out", "filled.png") == 0
    expected, = wide(9).generate(PROMPT, steps=2, image=open_picture("p.png"), mask=open_picture("m.png"))
    assert open_picture("filled.png").tobytes() == expected.tobytes()


WRONG = {  # channels and flags: words of the refusal
    (4, "--edit p.png"): "--edit: this model was not trained to edit",
    (9, "--edit p.png --image p.png --mask m.png"): "--edit: this model was not trained to edit",
    (8, ""): "--edit: this model edits pictures; name one",
    (8, "--image p.png --mask m.png"): "--edit: this model edits pictures; name one",
    (8, "--edit nowhere.png"): "nowhere.png: no such picture",
    (8, "--edit p.png --image-guidance -1"): "--image-guidance: choose 1 (off) to about 2, not -1.0",
    (8, "--edit p.png --image-guidance nan"): "--image-guidance: invalid float value: 'nan'",
    (8, "--edit p.png --image-guidance much"): "--image-guidance: invalid float value: 'much'",
    (8, "--edit p.png --size 60x64"): "--size: 60x64: width and height must be multiples of 8",
    (9, ""): "--mask: this model fills in parts of pictures; give an image and the mask of the part",
    (9, "--image p.png"): "--mask: this model fills in parts of pictures",
    (9, "--image flat.png --mask m.png"): "--mask: has 64x64 pixels and the image 64x48",
    (4, "--refiner FOLDER8"): "--refiner: its UNet sees a picture besides the one that it draws",
}


@pytest.mark.parametrize("channels, flags", WRONG)
def test_a_wrong_value_is_one_sentence(channels, flags, inside, capsys):
    model = tiny.folder() if channels == 4 else folder(channels)
    assert run(model, *flags.replace("FOLDER8", str(folder(8))).split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1
    assert WRONG[channels, flags] in output.err
    assert not output.out and not list(Path().glob("pictures/*.png"))


# The recipe ---------------------------------------------------------------------------------------

def config_of(**settings) -> edit.Settings:
    return edit.Settings(**{"model": str(tiny.folder()), "precision": "fp32", "scenes": 6, **settings})


@torch.no_grad()
def test_new_channels_change_no_bit_at_first():
    model = edit.build(config_of())
    assert model.unet.config.in_channels == model.unet.conv_in.in_channels == 8
    assert model.unet.conv_in.weight.shape == (16, 8, 3, 3) and model.extra_input == "edit"
    cond, _ = tiny.model().encode(PROMPT)
    x, latent = (peers.numbers((2, 4, 16, 16), seed).float() for seed in (1, 2))
    given = 300.0, cond.context.expand(2, -1, -1), cond.pooled.expand(2, -1), torch.ones(2, 6)
    assert torch.equal(model.unet(torch.cat([x, latent], dim=1), *given), tiny.model().unet(x, *given))
    again = edit.build(config_of(model=str(folder(8))))  # one that edits already goes on as it is
    assert torch.equal(again.unet.conv_in.weight, wide(8).unet.conv_in.weight)


def test_pairs_are_the_worlds_and_the_source_is_the_mode_unscaled():
    config = config_of(caption_dropout=0.0)
    pipeline = edit.build(config)
    pipeline.vae.quant_conv.weight.data[4:] = 0  # no variance: x0 is the mean itself
    pipeline.vae.quant_conv.bias.data[4:] = -30
    batch = edit.data(pipeline, config).batch(0, range(8))
    pairs, rows = TASKS["edit"](0, range(6)), batch["rows"]
    assert batch["captions"] == [pairs.prompts[row] for row in rows]
    with torch.no_grad():
        before, _ = pipeline.vae.encode(pairs.source[rows])
        after, _ = pipeline.vae.encode(pairs.target[rows])
    assert batch["source"].shape == batch["x0"].shape == (8, 4, 16, 16)
    close = 0.03 * before.abs().max()  # latents are encoded and kept in 16 bits
    assert (batch["source"] - before).abs().max() < close < (after - before).abs().max() / 3
    wanted = pipeline.vae.scale(after)
    assert (batch["x0"] - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_a_share_lacks_the_picture_a_share_the_instruction_and_a_share_both():
    """5% each in the paper, the default; here 20%, so that few samples show it."""
    config = config_of(caption_dropout=0.4)
    data = edit.data(edit.build(config), config)
    batch = data.batch(0, range(2000))
    has_text = torch.tensor([bool(text) for text in batch["captions"]])
    has_picture = batch["source"].flatten(1).any(1)
    for share, which in ((0.4, has_text & has_picture), (0.2, has_text & ~has_picture),
                         (0.2, ~has_text & has_picture), (0.2, ~has_text & ~has_picture)):
        assert abs(which.float().mean().item() - share) < 0.03
    again = data.batch(5, range(1000, 1004))  # of a sample alone, whatever the step
    assert torch.equal(again["source"], batch["source"][1000:1004])


def test_loss_begins_as_t2i_and_every_weight_of_the_unet_gets_a_gradient():
    config = config_of()
    pipeline = edit.build(config)
    params, batch = edit.setup(pipeline, config), edit.data(pipeline, config).batch(0, range(4))
    first = edit.loss(pipeline, batch, config)
    assert torch.equal(first, t2i.loss(tiny.model(), batch, t2i.Settings()))
    assert {id(param) for param in params} == {id(param) for param in pipeline.unet.parameters()}
    pipeline.requires_grad_(False)
    optimizer = torch.optim.AdamW([param.requires_grad_() for param in params], 1e-3)
    for _ in range(8):
        last = edit.loss(pipeline, batch, config)
        optimizer.zero_grad()
        last.backward()
        optimizer.step()
    assert all(param.grad is not None for param in params) and last < first
    assert pipeline.unet.conv_in.weight.grad[:, 4:].abs().max() > 0


@pytest.mark.parametrize("times", [1, 10])
def test_the_new_channels_learn_faster(tmp_path, times):
    flags = ["--model", str(tiny.folder()), "--out", str(tmp_path), "--scenes", "4", "--batch", "2", "--steps", "1",
             "--lr", "0.001", "--warmup", "0", "--ema", "0", "--sample-every", "0", "--input-lr", str(times)]
    assert train.main(["edit", *flags]) == 0
    after = load_file(tmp_path / "checkpoints" / "step-000001" / "model.safetensors")
    new_channels = after["unet.conv_in.weight"][:, 4:]
    change = after["unet.conv_out.weight"] - tiny.model().unet.conv_out.weight
    # Adam's first step is the learning rate.
    assert new_channels.abs().max().item() == pytest.approx(0.001 * times, rel=0.01)
    assert change.abs().max().item() == pytest.approx(0.001, rel=0.1)


@pytest.mark.slow
def test_from_the_command_to_a_picture(tmp_path):
    flags = ["--model", str(tiny.folder()), "--out", str(tmp_path), "--scenes", "4", "--batch", "2", "--steps", "2"]
    with tiny.short_drawings():
        assert train.main(["edit", *flags, "--gradient-checkpointing"]) == 0  # in bf16 where the CPU has it
    assert (tmp_path / "samples" / "step-000002.png").exists()
    trained, example = tmp_path / "model", tmp_path / "model" / "example.png"
    name = read_json(trained / "model_index.json")["_class_name"]
    assert name == "StableDiffusionXLInstructPix2PixPipeline"
    assert run(trained, "--edit", str(example), "--out", str(tmp_path / "drawn.png")) == 0
    given = open_picture(example)
    assert (to_tensor(given) - TASKS["edit"](0, [4]).source[0]).abs().max() < 0.01
    model = load64(trained)
    assert model.unet.conv_in.weight[:, 4:].abs().max() > 0
    expected = peer_latents(name, trained, image=given, guidance_scale=5.0)
    assert_same(final64(model, edit=given), expected)


@pytest.mark.parametrize("flags, words", [
    ("edit --resolution 60", "--resolution: must be a multiple of 16"),
    ("edit --caption-dropout 0.7", "--caption-dropout: must be at most 0.6"),
    ("edit --caption-dropout -1", "--caption-dropout: must be at least 0"),
    ("edit --model FOLDER9", "takes 9 channels, which this recipe cannot train"),
    ("t2i --model FOLDER8", "takes 8 channels, which this recipe cannot train"),
    ("controlnet --model FOLDER8", "takes 8 channels, which this recipe cannot train"),
    ("inversion --data . --model FOLDER9", "takes 9 channels, which this recipe cannot train")])
def test_what_cannot_be_trained_is_refused(flags, words, capsys, tmp_path):
    for channels in (8, 9):
        flags = flags.replace(f"FOLDER{channels}", str(folder(channels)))
    assert train.main([*flags.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error
