"""UNets that see a picture beside x: diffusers' values of InstructPix2Pix and inpainting, files, flags, the recipe."""

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
from test_pipeline import SEED, assert_same, final, mask, mine, peer_latents, picture

import sample
import train
from minipic import layouts
from minipic.image import open_picture, read_settings, to_tensor
from minipic.methods import edit, t2i
from minipic.models.unet import UNet, UNetConfig
from minipic.pipeline import Pipeline
from minipic.weights import read_json, save_weights
from minipic.world.tasks import TASKS
from tiny import NEGATIVE, PROMPT

STEPS = 8
INPAINT = dict(image=picture(), mask=mask())


@functools.lru_cache
def folder(channels, kind="sdxl"):
    """The folder of a tiny model with random weights whose UNet takes so many channels."""
    model, path = tiny.build(kind), tempfile.mkdtemp()
    model.unet = peers.fill(UNet(replace(model.unet.config, in_channels=channels)))
    name = f"StableDiffusion{'XL' * model.sdxl}{layouts.WIDER[channels]}Pipeline"
    model.index = model.index | {"_class_name": name, "_diffusers_version": "0.30.0"}  # for some, diffusers asks for it
    model.save(path)
    return Path(path)


@functools.lru_cache
def wide(channels, kind="sdxl"):
    return Pipeline.load(folder(channels, kind))


# Values -----------------------------------------------------------------------------------------------------------

CASES = {  # name: (channels, kind of model, settings of Pipeline.steps)
    "edit": (8, "sdxl", dict(edit=picture(), negative=NEGATIVE)),
    "edit, no negative, ancestral": (8, "sdxl", dict(edit=picture(), sampler="euler_ancestral", image_guidance=1.2)),
    "edit, one size of another": (8, "sdxl", dict(edit=picture().resize((64, 48)), image_guidance=4.0, rescale=0.7)),
    "edit, no guidance": (8, "sdxl", dict(edit=picture(), guidance=1.0, image_guidance=1.0)),
    "edit, sd15": (8, "sd15", dict(edit=picture(), negative=NEGATIVE, guidance=7.5)),
    "mask": (9, "sdxl", dict(**INPAINT, strength=0.7, negative=NEGATIVE)),
    "mask, all": (9, "sdxl", dict(**INPAINT, strength=1.0, sampler="dpmpp_2m")),
    "mask, no guidance": (9, "sdxl", dict(**INPAINT, strength=1.0, guidance=1.0)),
    "mask, sd15": (9, "sd15", dict(**INPAINT, strength=0.7, negative=NEGATIVE))}


@pytest.mark.parametrize("case", CASES)
def test_final_latents_equal_diffusers(case):
    channels, kind, settings = CASES[case]
    given = dict(negative_prompt=settings.get("negative"), guidance_scale=settings.get("guidance", 5.0))
    if "edit" in settings:
        given |= dict(image=settings["edit"], image_guidance_scale=settings.get("image_guidance", 1.5))
        given |= {"guidance_rescale": settings["rescale"]} if "rescale" in settings else {}
        given |= dict(zip(("width", "height"), settings["edit"].size)) if kind == "sdxl" else {}
    else:
        given |= dict(image=[settings["image"]] * 2, mask_image=[settings["mask"]] * 2, height=64, width=64,
                      strength=settings["strength"])
    path = folder(channels, kind)
    expected = peer_latents(read_json(path / "model_index.json")["_class_name"], path, settings.get("sampler", "euler"),
                            num_inference_steps=STEPS, **given)
    found = final(wide(channels, kind), **{"steps": STEPS, "seed": SEED, "n": 2, **settings})
    assert_same(found, expected)


def test_official_inpainting_tells_how_its_weights_were_averaged():
    told = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.6667,
            "update_after_step": 0, "use_ema_warmup": False}  # by diffusers' EMAModel.save_pretrained
    values = read_json(folder(9) / "unet" / "config.json")
    assert UNetConfig.from_json(values | told) == UNetConfig.from_json(values) == wide(9).unet.config


@torch.no_grad()
@pytest.mark.parametrize("text, shown", [(5.0, 1.5), (5.0, 1.0), (5.0, 5.0), (1.0, 2.0), (0.0, 0.0)])
def test_two_guidances_are_the_papers(text, shown):
    """Equation 3 there; below 1 either is off, that is 1, and when both are the network is asked once."""
    model, asked = wide(8), []
    cond, uncond = model.encode(PROMPT, NEGATIVE)
    x, seen = (peers.numbers((1, 4, 16, 16), seed).float() for seed in (1, 2))
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def answer(words, beside):
        return model.unet(torch.cat([x, beside], dim=1), 300.0, words.context, words.pooled, sizes)
    neither, image, both = answer(uncond, 0 * seen), answer(uncond, seen), answer(cond, seen)
    expected = neither + max(shown, 1) * (image - neither) + max(text, 1) * (both - image)
    hook = model.unet.register_forward_hook(lambda module, args, result: asked.append(len(args[0])))
    predict = model.predictor(cond, uncond, ((64, 64), (0, 0), (64, 64)), 1, text, beside=seen, image_guidance=shown)
    found = predict(x, torch.tensor(300.0))
    hook.remove()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max() and asked == [1 if text == 0.0 else 3]
    assert (both - image).abs().max() > 0.01 and (image - neither).abs().max() > 0.01


def test_an_edit_may_start_from_a_picture_and_keep_a_part():
    settings = dict(edit=picture(1), steps=3, seed=SEED, strength=1.0)
    kept, free = (final(wide(8), **settings, image=picture(), mask=part) for part in (mask(), None))
    assert (kept - free).abs().max() > 0.1 and (final(wide(8), **settings) - free).abs().max() > 0.1
    lazy = Pipeline.load(folder(8), lazy=True)
    assert torch.equal(final(lazy, **settings), final(wide(8), **settings))


# Files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [8, 9])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_single_files_are_as_wide_as_their_first_weight(family, channels, tmp_path):
    parts, index, scheduler = single_files.tiny(family)
    config = replace(parts["unet"].config, in_channels=channels)
    networks = single_files.networks(parts | {"unet": replace(parts["unet"], config=config)})
    save_weights(single_files.single_file(family, networks), tmp_path / "one.safetensors")
    source = layouts.from_single_file(tmp_path / "one.safetensors", parts, index, scheduler)
    unet = layouts.load_part(source.parts["unet"])
    assert torch.equal(unet.conv_in.weight, networks["unet"].conv_in.weight) and unet.config == config
    assert source.index["_class_name"] == f"StableDiffusion{'XL' * (family == 'sdxl')}{layouts.WIDER[channels]}Pipeline"


# sample.py --------------------------------------------------------------------------------------------------------

def run(model, *flags):
    return sample.main([PROMPT, "--model", str(model), "--device", "cpu", "--steps", "2", "--n", "1", *flags])


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("p.png"), mask().save("m.png"), picture(2).crop((0, 0, 64, 48)).save("flat.png")


def test_flags_reach_the_pipeline_and_come_back_with_from(inside):
    assert run(folder(8), "--edit", "flat.png", "--image-guidance", "2.5", "--out", "first.png") == 0
    expected, = wide(8).generate(PROMPT, steps=2, edit=open_picture("flat.png"), image_guidance=2.5)
    assert open_picture("first.png").tobytes() == expected.tobytes() and expected.size == (64, 48)
    assert read_settings("first.png")["edit"] == "flat.png"
    assert sample.main(["--from", "first.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == expected.tobytes()
    assert run(folder(9), "--image", "p.png", "--mask", "m.png", "--out", "filled.png") == 0
    expected, = wide(9).generate(PROMPT, steps=2, image=open_picture("p.png"), mask=open_picture("m.png"))
    assert open_picture("filled.png").tobytes() == expected.tobytes()


WRONG = {  # channels and flags: words of the refusal
    (4, "--edit p.png"): "--edit: this model was not trained to edit",
    (9, "--edit p.png --image p.png --mask m.png"): "--edit: this model was not trained to edit",
    (8, ""): "this model edits pictures; name one with --edit",
    (8, "--image p.png --mask m.png"): "this model edits pictures; name one with --edit",
    (8, "--edit nowhere.png"): "nowhere.png: no such picture",
    (8, "--edit p.png --image-guidance -1"): "--image-guidance -1.0: choose 1",
    (8, "--edit p.png --image-guidance nan"): "--image-guidance: invalid float value: 'nan'",
    (8, "--edit p.png --image-guidance much"): "argument --image-guidance: invalid float",
    (8, "--edit p.png --size 60x64"): "--size 60x64: width and height must be multiples of 8",
    (9, ""): "this model fills in parts of pictures; name one with --image, and the part with --mask",
    (9, "--image p.png"): "this model fills in parts of pictures",
    (9, "--image flat.png --mask m.png"): "--mask has 64x64 pixels and --image 64x48",
    (4, "--refiner 8"): "--refiner: its UNet sees a picture"}


@pytest.mark.parametrize("channels, flags", WRONG)
def test_a_wrong_value_is_one_sentence(channels, flags, inside, capsys):
    model = tiny.folder() if channels == 4 else folder(channels)
    assert run(model, *(str(folder(8)) if flag == "8" else flag for flag in flags.split())) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1
    assert WRONG[channels, flags] in output.err
    assert not output.out and not list(Path().glob("pictures/*.png"))


# The recipe -------------------------------------------------------------------------------------------------------

def config_of(**settings):
    return edit.Recipe(**{"model": str(tiny.folder()), "precision": "fp32", "scenes": 6, **settings})


@torch.no_grad()
def test_new_channels_change_no_bit_at_first():
    model = edit.build(config_of())
    assert model.unet.config.in_channels == model.unet.conv_in.in_channels == 8
    assert model.unet.conv_in.weight.shape == (16, 8, 3, 3) and model.looks == "edit"
    cond, _ = mine().encode(PROMPT)
    x, seen = (peers.numbers((2, 4, 16, 16), seed).float() for seed in (1, 2))
    given = 300.0, cond.context.expand(2, -1, -1), cond.pooled.expand(2, -1), torch.ones(2, 6)
    assert torch.equal(model.unet(torch.cat([x, seen], dim=1), *given), mine().unet(x, *given))
    again = edit.build(config_of(model=str(folder(8))))  # one that edits already goes on as it is
    assert torch.equal(again.unet.conv_in.weight, wide(8).unet.conv_in.weight)


def test_pairs_are_the_worlds_and_the_source_is_the_mode_unscaled():
    config = config_of(drop=0.0)
    pipeline = edit.build(config)
    pipeline.vae.quant_conv.weight.data[4:], pipeline.vae.quant_conv.bias.data[4:] = 0, -30  # the mean itself
    batch, pairs = edit.data(pipeline, config)(0, range(8)), TASKS["edit"](0, range(6))
    assert batch["captions"] == [pairs.prompts[row] for row in batch["rows"]]
    with torch.no_grad():
        mean, target = (pipeline.vae.encode(x[batch["rows"]])[0] for x in (pairs.source, pairs.target))
    assert batch["source"].shape == batch["x0"].shape == (8, 4, 16, 16)
    wanted, close = pipeline.vae.scale(target), 0.03 * mean.abs().max()  # latents are encoded and kept in 16 bits
    assert (batch["source"] - mean).abs().max() < close < (target - mean).abs().max() / 3
    assert (batch["x0"] - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_a_share_lacks_the_picture_a_share_the_instruction_and_a_share_both():
    """5% each in the paper, the default; here 20%, so that few samples tell."""
    config = config_of(drop=0.4)
    pipeline = edit.build(config)
    batch_of = edit.data(pipeline, config)
    batch = batch_of(0, range(2000))
    told = torch.tensor([bool(text) for text in batch["captions"]])
    shown = batch["source"].flatten(1).any(1)
    for share, which in ((0.4, told & shown), (0.2, told & ~shown), (0.2, ~told & shown), (0.2, ~told & ~shown)):
        assert abs(which.float().mean().item() - share) < 0.03
    again = batch_of(5, range(1000, 1004))  # of a sample alone, whatever the step
    assert torch.equal(again["source"], batch["source"][1000:1004])


def test_loss_begins_as_t2i_and_every_weight_of_the_unet_gets_a_gradient():
    config = config_of()
    pipeline = edit.build(config)
    params, batch = edit.setup(pipeline, config), edit.data(pipeline, config)(0, range(4))
    begin = edit.loss(pipeline, batch, config)
    assert torch.equal(begin, t2i.loss(mine(), batch, t2i.Recipe()))
    assert {id(p) for p in params} == {id(p) for p in pipeline.unet.parameters()}
    pipeline.requires_grad_(False)
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in params], 1e-3)
    for _ in range(8):
        last = edit.loss(pipeline, batch, config)
        optimizer.zero_grad(), last.backward(), optimizer.step()
    assert all(p.grad is not None for p in params) and last < begin
    assert pipeline.unet.conv_in.weight.grad[:, 4:].abs().max() > 0


@pytest.mark.parametrize("times", [1, 10])
def test_the_new_channels_learn_faster(tmp_path, times):
    before = mine().unet.state_dict()
    flags = ["--model", str(tiny.folder()), "--out", str(tmp_path), "--scenes", "4", "--batch", "2", "--steps", "1",
             "--lr", "0.001", "--warmup", "0", "--ema", "0", "--sample-every", "0", "--input-lr", str(times)]
    assert train.main(["edit", *flags]) == 0
    after = load_file(tmp_path / "checkpoints" / "step-000001" / "model.safetensors")
    first, other = after["unet.conv_in.weight"], "conv_out.weight"
    assert first[:, 4:].abs().max().item() == pytest.approx(0.001 * times, rel=0.01)  # Adam's first step is the rate's
    assert (after["unet." + other] - before[other]).abs().max().item() == pytest.approx(0.001, rel=0.1)


def test_from_the_command_to_a_picture(tmp_path):
    flags = ["--model", str(tiny.folder()), "--out", str(tmp_path), "--scenes", "4", "--batch", "2", "--steps", "2"]
    assert train.main(["edit", *flags, "--checkpointing"]) == 0  # in bf16 where the CPU has it
    assert (tmp_path / "samples" / "step-000002.png").exists()
    trained, example = tmp_path / "model", str(tmp_path / "model" / "example.png")
    assert read_json(trained / "model_index.json")["_class_name"] == "StableDiffusionXLInstructPix2PixPipeline"
    assert run(trained, "--edit", example, "--out", str(tmp_path / "drawn.png")) == 0
    given, model = open_picture(example), Pipeline.load(trained)
    assert model.unet.conv_in.weight[:, 4:].abs().max() > 0
    model.save(trained)  # in fp32, in which the peer then computes all of it
    expected = peer_latents("StableDiffusionXLInstructPix2PixPipeline", trained, image=given, guidance_scale=5.0,
                            num_inference_steps=STEPS)
    assert_same(final(model, steps=STEPS, seed=SEED, n=2, edit=given), expected)
    pairs = TASKS["edit"](0, [4])
    assert (to_tensor(given) - pairs.source[0]).abs().max() < 0.01


@pytest.mark.parametrize("flags, words", [
    ("edit --side 60", "--side must be a multiple of 16"), ("edit --drop 0.7", "--drop must be at most 0.6"), ("edit --drop -1", "--drop must be at least 0"),
    ("edit --model 9", "takes 9 channels, which this recipe cannot train"),
    ("t2i --model 8", "takes 8 channels, which this recipe cannot train"),
    ("controlnet --model 8", "takes 8 channels, which this recipe cannot train"),
    ("inversion --data . --model 9", "takes 9 channels, which this recipe cannot train")])
def test_what_cannot_be_trained_is_refused(flags, words, capsys, tmp_path):
    flags = [str(folder(int(flag))) if flag in "89" else flag for flag in flags.split()]
    assert train.main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error
