"""The whole process against diffusers' pipelines: same weights, same seeds, same final latents; and against goldens."""

import functools
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from minipic import pipeline
from minipic.common import InputError
from minipic.image import to_tensor
from minipic.pipeline import Pipeline
from minipic.text import open_tokenizer, train_tokenizer
from tiny import NEGATIVE, PROMPT

STEPS, SEED = 20, 3
SCHEDULERS = {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
              "euler_ancestral": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler"}
GOLDENS = Path(__file__).parent / "goldens" / "pipeline.safetensors"


def picture(seed=0):
    """A smooth 64 x 64 picture."""
    waves = np.random.RandomState(seed).standard_normal((3, 3, 2))
    y, x = np.mgrid[0:64, 0:64] / 64
    channels = [sum(np.sin(6 * (a * x + b * y)) for a, b in wave) for wave in waves]
    return Image.fromarray((127.5 + 40 * np.stack(channels, -1)).clip(0, 255).astype(np.uint8))


def mask():
    """White, where to draw, in the left part of a 64 x 64 picture; not on the edge of a latent pixel."""
    return Image.fromarray(np.repeat(255 * (np.arange(64) < 27)[None], 64, 0).astype(np.uint8))


CASES = {  # name: (kind of model, settings of Pipeline.steps)
    **{sampler: ("sdxl", dict(sampler=sampler, negative=NEGATIVE)) for sampler in SCHEDULERS},
    "no negative": ("sdxl", dict()),
    "empty negative": ("sdxl", dict(negative="")),
    "micro-conditioning": ("sdxl", dict(size=(64, 48), original_size=(100, 80), crop=(3, 7), target_size=(40, 56))),
    "rescale": ("sdxl", dict(rescale=0.7)),
    "image": ("sdxl", dict(image=picture(), strength=0.6, negative=NEGATIVE)),
    "image, ancestral": ("sdxl", dict(image=picture(), strength=0.6, sampler="euler_ancestral")),
    "image, all": ("sdxl", dict(image=picture(), strength=1.0, sampler="ddim")),
    "mask": ("sdxl", dict(image=picture(), mask=mask(), strength=0.7, negative=NEGATIVE)),
    "mask, all": ("sdxl", dict(image=picture(), mask=mask(), strength=1.0, sampler="dpmpp_2m")),
    "sd15": ("sd15", dict(negative=NEGATIVE, guidance=7.5)),
    "sd15, no negative": ("sd15", dict(sampler="ddim")),
}


GOLDEN_CASES = [case for case in CASES if case not in ("heun", "no negative", "empty negative", "rescale", "sd15")]


@functools.lru_cache
def mine(kind="sdxl"):
    return Pipeline.load(tiny.folder(kind))


def final(pipeline, prompt=PROMPT, **settings):
    return list(pipeline.latents(prompt, **settings))[-1]


def ours(case):
    kind, settings = CASES[case]
    return final(mine(kind), **{"steps": STEPS, "seed": SEED, "n": 2, **settings})


@functools.lru_cache
def peer(name, folder):
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    pytest.importorskip("transformers").logging.set_verbosity_error()
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def peer_latents(name, folder, sampler="euler", n=2, **given):
    pipeline, scheduler = peer(name, folder)
    pipeline.scheduler = getattr(pytest.importorskip("diffusers"), SCHEDULERS[sampler]).from_config(scheduler)
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(n)]
    given = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", **given}
    return pipeline(num_images_per_prompt=n, generator=generators, **given).images


def diffusers_latents(case):
    """What diffusers' pipeline for these settings gives."""
    kind, settings = CASES[case]
    name = "StableDiffusionXL" if kind == "sdxl" else "StableDiffusion"
    name += "Inpaint" if "mask" in settings else "Img2Img" if "image" in settings else ""
    given = dict(negative_prompt=settings.get("negative"), guidance_scale=settings.get("guidance", 5.0))
    if "rescale" in settings:
        given |= dict(guidance_rescale=settings["rescale"])
    if "image" in settings:
        given |= dict(image=settings["image"], strength=settings["strength"])
    if "mask" in settings:
        given |= dict(image=[settings["image"]] * 2, mask_image=[settings["mask"]] * 2, height=64, width=64)
    if "size" in settings:
        pairs = {"original_size": "original_size", "crops_coords_top_left": "crop", "target_size": "target_size"}
        given |= {name: settings[key][::-1] for name, key in pairs.items()}  # diffusers wants heights first
        given |= dict(zip(("width", "height"), settings["size"]))
    return peer_latents(f"{name}Pipeline", tiny.folder(kind), settings.get("sampler", "euler"), **given)


def assert_same(found, expected):
    """Within 1e-4 of a standard deviation, which is about 1 for a trained model and 2 to 20 for these."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("case", CASES)
def test_final_latents_equal_diffusers(case):
    assert_same(ours(case), diffusers_latents(case))


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_final_latents_equal_the_golden(case):
    """The same where diffusers is not installed; tests/goldens/make_pipeline.py wrote them with it."""
    assert_same(ours(case)[:1], load_file(GOLDENS)[case])


def test_refiner_takes_over_as_in_diffusers():
    base = peer_latents("StableDiffusionXLPipeline", tiny.folder(), negative_prompt=NEGATIVE, denoising_end=0.7)
    expected = peer_latents("StableDiffusionXLImg2ImgPipeline", tiny.folder("refiner"), negative_prompt=NEGATIVE,
                            image=base, denoising_start=0.7, guidance_scale=5.0)
    settings = dict(negative=NEGATIVE, steps=STEPS, seed=SEED, n=2)
    steps = list(mine().latents(PROMPT, **settings, refiner=mine("refiner"), handover=0.7))
    assert len(steps) == STEPS
    assert_same(steps[-1], expected)
    assert (steps[-1] - final(mine(), **settings)).abs().max() > 0.1


def test_turbo_draws_as_in_diffusers(tmp_path):
    turbo = tiny.build("sdxl", tmp_path, timestep_spacing="trailing", class_name="EulerAncestralDiscreteScheduler")
    expected = peer_latents("StableDiffusionXLPipeline", tmp_path, "euler_ancestral", guidance_scale=0.0,
                            num_inference_steps=4)
    assert_same(final(turbo, guidance=0.0, steps=4, seed=SEED, n=2), expected)


def test_pictures_equal_diffusers():
    given = dict(n=2, output_type="np", num_inference_steps=4)
    levels = peer_latents("StableDiffusionXLPipeline", tiny.folder(), **given)
    pictures = mine().generate(PROMPT, steps=4, seed=SEED, n=2)
    difference = np.stack([np.asarray(p) for p in pictures]) / 255 - levels
    assert np.abs(difference).max() < 0.5 / 255 + 1e-4 and levels.std() > 0.1


def test_guidance_of_one_is_off():
    """And costs nothing: the unwanted prompt is not asked for."""
    asked = []
    hook = mine().unet.register_forward_hook(lambda module, args, result: asked.append(len(args[0])))
    one = final(mine(), steps=2, guidance=1.0, negative=NEGATIVE)
    off = final(mine(), steps=2, guidance=0.0)
    hook.remove()
    assert torch.equal(one, off) and asked == [1] * 4
    near = final(mine(), steps=2, guidance=1.0 + 1e-6, negative=NEGATIVE)
    assert (near - one).abs().max() < 1e-3


def test_picture_i_has_seed_plus_i():
    together = final(mine(), steps=3, seed=7, n=3, sampler="euler_ancestral")
    alone = final(mine(), steps=3, seed=9, sampler="euler_ancestral")
    assert (together[2] - alone[0]).abs().max() < 1e-4 * alone.std()  # another batch size may round differently
    assert (together[0] - alone[0]).abs().max() > 1
    again = final(mine(), steps=3, seed=7, n=3, sampler="euler_ancestral")
    assert torch.equal(together, again)


@torch.no_grad()
def test_masked_part_stays():
    latent = final(mine(), steps=5, image=picture(), mask=mask(), seed=SEED, strength=1.0)
    generator = torch.Generator().manual_seed(SEED)
    known = mine().encode_picture(to_tensor(picture()), lambda: torch.randn(1, 4, 16, 16, generator=generator))
    assert torch.equal(latent[..., 7:], known[..., 7:])  # 27 white columns are 7 of 4 pixels, the nearest deciding
    assert ((latent[..., :7] - known[..., :7]).abs() > 0.1).float().mean() > 0.9


def test_pictures_of_any_mode_are_taken():
    model = tiny.build()
    draw = lambda start: list(model.latents(PROMPT, steps=3, image=start))[-1]
    for mode in ("RGBA", "L", "P"):
        start = picture().convert(mode)
        assert torch.equal(draw(start), draw(start.convert("RGB"))), mode


def test_the_predictions_arrive_at_the_picture():
    for x, x0 in mine().steps(PROMPT, steps=4, sampler="euler"):
        assert x.shape == x0.shape == (1, 4, 16, 16) and not x.requires_grad
    assert torch.equal(x, x0)  # the last step goes to no noise, which is the prediction itself


def test_lazy_parts_are_read_when_needed_and_text_encoders_freed():
    lazy = Pipeline.load(tiny.folder(), lazy=True)
    assert all(p.is_meta for p in lazy.parameters())
    drawing = lazy.latents(PROMPT, steps=2, seed=1)
    next(drawing)
    assert {name for name, p in lazy.named_parameters() if not p.is_meta} == {
        f"unet.{name}" for name, _ in mine().unet.named_parameters()}
    (x,) = drawing
    assert torch.equal(x, final(mine(), steps=2, seed=1))
    assert lazy.decode(x)[0].tobytes() == mine().decode(x)[0].tobytes()
    assert torch.equal(final(lazy, steps=2, seed=1), x)  # the second time with the remembered text
    assert all(p.is_meta for p in lazy.text_encoder_2.parameters())


def test_a_refiner_finds_the_memory_of_the_first_unet_free(monkeypatch):
    base, refiner = (Pipeline.load(tiny.folder(kind), lazy=True) for kind in ("sdxl", "refiner"))
    drawing = base.latents(PROMPT, steps=2, refiner=refiner, handover=0.5)
    next(drawing)
    layers, load, alive = [weakref.ref(module) for module in base.unet.modules()], pipeline.load_part, []
    monkeypatch.setattr(pipeline, "load_part", lambda *part: (
        alive.append(sum(layer() is not None for layer in layers)), load(*part))[1])
    next(drawing)
    assert alive == [0]  # when the refiner's UNet is read


def test_a_saved_pipeline_is_the_same(tmp_path):
    mine().save(tmp_path)
    again = Pipeline.load(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[name], x) for name, x in mine().state_dict().items()) and len(state) > 300
    assert again.tokenizer_2.pad == 0 and again.schedule == mine().schedule and again.index == mine().index
    mine().save(tmp_path / "half", torch.float16)
    half = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in half.values()} == {torch.float16}
    Pipeline.load(tmp_path, lazy=True).save(tmp_path / "lazy")
    assert all(torch.equal(state[name], x) for name, x in Pipeline.load(tmp_path / "lazy").state_dict().items())


def test_a_single_file_has_its_tokenizers_beside_it(tmp_path):
    size = mine().tokenizer.size
    with pytest.raises(InputError, match="tokenizer_2: no such folder, .* beside the file"):
        open_tokenizer(tmp_path / "model.safetensors", "tokenizer_2", size)
    mine().tokenizer_2.save(tmp_path / "tokenizer_2")
    assert open_tokenizer(tmp_path / "model.safetensors", "tokenizer_2", size).pad == 0


def test_another_vae_and_16_bits():
    other = tiny.build("sd15")
    assert torch.equal(Pipeline.load(tiny.folder(), vae=other.tokenizer.folder.parent / "vae").vae.quant_conv.weight,
                       other.vae.quant_conv.weight)
    half = Pipeline.load(tiny.folder(), dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == torch.float16 and half.vae.quant_conv.weight.dtype == torch.float32
    bf16 = Pipeline.load(tiny.folder(), dtype=torch.bfloat16)
    x = final(bf16, steps=3, seed=SEED)
    assert x.dtype == torch.float32  # latents stay in 32 bits between the steps
    assert (x - final(mine(), steps=3, seed=SEED)).std() < 0.1 * x.std()
    assert bf16.decode(x)[0].size == (64, 64)


def test_large_pictures_are_decoded_in_tiles(monkeypatch):
    latents, tiles = final(mine(), steps=2, n=2), []
    whole = mine().decode(latents)
    monkeypatch.setattr(mine().vae, "decode_tiles", lambda z: tiles.append(len(z)) or mine().vae.decode(z))
    monkeypatch.setattr("minipic.pipeline.WHOLE", 64 * 64 - 1)
    assert [x.tobytes() for x in mine().decode(latents)] == [x.tobytes() for x in whole] and tiles == [2]
    monkeypatch.setattr("minipic.pipeline.WHOLE", 64 * 64)
    mine().decode(latents)
    assert tiles == [2]


def test_a_black_picture_is_an_error():
    with pytest.raises(InputError, match="NaN or infinity in float32; use --dtype"):
        mine().decode(torch.full((1, 4, 8, 8), torch.nan))


@pytest.mark.parametrize("settings, message", [
    (dict(sampler="eular"), "--sampler eular: unknown; choose one of euler,"),
    (dict(sampler="flow_euler"), "--sampler flow_euler"),
    (dict(steps=0), "--steps 0"),
    (dict(steps=1001), "--steps 1001"),
    (dict(n=0), "--n 0"),
    (dict(size=(60, 64)), "--size 60x64: width and height must be multiples of 8"),
    (dict(size=(0, 64)), "--size 0x64"),
    (dict(size=60), "--size 60x60"),
    (dict(image=picture(), strength=0.0), "--strength 0"),
    (dict(image=picture(), strength=1.5), "--strength 1.5"),
    (dict(image=picture(), strength=0.01), "no step"),
    (dict(mask=mask()), "--mask: needs --image"),
    (dict(image=picture(), mask=mask().resize((32, 64))), "--mask has 32x64 pixels and --image 64x64"),
])
def test_what_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(InputError) as error:
        final(mine(), **settings)
    assert message in str(error.value)


def test_one_number_is_a_square_and_a_name_is_no_dtype():
    assert mine().generate(PROMPT, size=32, steps=1)[0].size == (32, 32)
    with pytest.raises(InputError, match="dtype 'bf16': give one of PyTorch's, such as torch.bfloat16"):
        Pipeline.load(tiny.folder(), dtype="bf16")


def test_prompts_are_given_one_by_one():
    with pytest.raises(InputError, match="must be one text; call generate once for each"):
        mine().generate([PROMPT, PROMPT])


@pytest.mark.parametrize("damage, message", [
    (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "tokenizer_2: no such folder"),
    (lambda folder: train_tokenizer(tiny.CAPTIONS, folder / "tokenizer", 530), "has 530 tokens, its text"),
    (lambda folder: (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "X"}'), "_class_name='X'"),
])
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    mine().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        Pipeline.load(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
