"""Whole drawings against diffusers' pipelines: same weights, same seeds, same final latents.

And the parameters of a drawing: which there are, and how mistakes in them are answered.
"""

import dataclasses
import inspect
import io
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from goldens.make_samplers import CLASSES
from PIL import Image
from safetensors.torch import load_file

from minipic.common import InputError, ParameterError
from minipic.image import to_tensor
from minipic.models.controlnet import ControlNetConfig
from minipic.models.unet import UNetConfig
from minipic.pipeline import DrawSettings, Pipeline
from minipic.recipes.clip import train_tokenizer
from minipic.text import open_tokenizer
from minipic.weights import networks
from pipelines import SEED, STEPS, assert_same, final, final64, load64, peer_latents
from tiny import NEGATIVE, PROMPT, mask, picture

HAIRLINE = Image.new("L", (64, 64))  # of one white pixel, which no pixel of the latent sees
HAIRLINE.putpixel((5, 5), 255)

GOLDENS = Path(__file__).parent / "goldens" / "pipeline.safetensors"

CASES = {  # name: (kind of model, settings of the drawing)
    **{sampler: ("sdxl", dict(sampler=sampler, negative=NEGATIVE)) for sampler in CLASSES},
    "no negative": ("sdxl", dict()),
    "empty negative": ("sdxl", dict(negative="")),
    "micro-conditioning": ("sdxl", dict(size=(64, 48), original_size=(100, 80), crop=(3, 7), target_size=(40, 56))),
    "rescale": ("sdxl", dict(guidance_rescale=0.7)),
    "image": ("sdxl", dict(image=picture(), strength=0.6, negative=NEGATIVE)),
    "image, ancestral": ("sdxl", dict(image=picture(), strength=0.6, sampler="euler_ancestral")),
    "image, all": ("sdxl", dict(image=picture(), strength=1.0, sampler="ddim")),
    "mask": ("sdxl", dict(image=picture(), mask=mask(), strength=0.7, negative=NEGATIVE)),
    "mask, all": ("sdxl", dict(image=picture(), mask=mask(), strength=1.0, sampler="dpmpp_2m")),
    "sd15": ("sd15", dict(negative=NEGATIVE, guidance=7.5)),
    "sd15, no negative": ("sd15", dict(sampler="ddim")),
}
NOT_GOLDEN = ("heun", "no negative", "empty negative", "rescale", "sd15")
GOLDEN_CASES = [case for case in CASES if case not in NOT_GOLDEN]
LIVE_CASES = [  # the others are held by the goldens, and live by the slow tests
    case if case in (*NOT_GOLDEN, "euler", "image", "mask") else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES]


# Values -------------------------------------------------------------------------------------------

def diffusers_latents(case: str) -> torch.Tensor:
    """What diffusers' pipeline for these settings gives."""
    kind, settings = CASES[case]
    name = "StableDiffusionXL" if kind == "sdxl" else "StableDiffusion"
    given = dict(negative_prompt=settings.get("negative"), guidance_scale=settings.get("guidance", 5.0))
    if "guidance_rescale" in settings:
        given["guidance_rescale"] = settings["guidance_rescale"]
    if "size" in settings:
        given["width"], given["height"] = settings["size"]
        theirs = {"original_size": "original_size", "crop": "crops_coords_top_left", "target_size": "target_size"}
        for key, their_key in theirs.items():
            given[their_key] = settings[key][::-1]  # diffusers wants heights first
    if "mask" in settings:
        name += "Inpaint"
        given |= dict(image=[settings["image"]] * 2, mask_image=[settings["mask"]] * 2, height=64, width=64,
                      strength=settings["strength"])
    elif "image" in settings:
        name += "Img2Img"
        given |= dict(image=settings["image"], strength=settings["strength"])
    return peer_latents(f"{name}Pipeline", tiny.folder(kind), settings.get("sampler", "euler"), **given)


@pytest.mark.parametrize("case", LIVE_CASES)
def test_final_latents_equal_diffusers(case):
    kind, settings = CASES[case]
    found = final64(load64(tiny.folder(kind)), **settings)
    assert_same(found, diffusers_latents(case), settings.get("sampler"))


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_final_latents_equal_the_golden(case):
    """The same where diffusers is not installed, and in float32 too.

    tests/goldens/make_pipeline.py wrote the goldens with diffusers, in float64. The last digits of
    float32 differ among CPUs: in the schedule's table, which both types share, and in the networks.
    """
    kind, settings = CASES[case]
    expected = load_file(GOLDENS)[case]
    found = final64(load64(tiny.folder(kind)), **settings)[:1]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    found = final(tiny.model(kind), steps=STEPS, seed=SEED, n=2, **settings)[:1]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-3 * expected.std()


def test_refiner_takes_over_as_in_diffusers():
    given = dict(negative_prompt=NEGATIVE, num_inference_steps=10)
    base = peer_latents("StableDiffusionXLPipeline", tiny.folder(), denoising_end=0.7, **given)
    expected = peer_latents("StableDiffusionXLImg2ImgPipeline", tiny.folder("refiner"), image=base,
                            denoising_start=0.7, guidance_scale=5.0, **given)
    model, refiner = load64(tiny.folder()), load64(tiny.folder("refiner"))
    settings = dict(negative=NEGATIVE, steps=10)
    found = final64(model, refiner=refiner, high_noise_frac=0.7, **settings)
    assert_same(found, expected)
    assert (found - final64(model, **settings)).abs().max() > 0.1
    assert len(list(tiny.model().latents(PROMPT, steps=10, refiner=tiny.model("refiner")))) == 10


def test_turbo_draws_as_in_diffusers(tmp_path):
    tiny.build("sdxl", tmp_path, timestep_spacing="trailing", class_name="EulerAncestralDiscreteScheduler")
    expected = peer_latents("StableDiffusionXLPipeline", tmp_path, "euler_ancestral", guidance_scale=0.0,
                            num_inference_steps=4)
    assert_same(final64(load64(tmp_path), guidance=0.0, steps=4), expected)


def test_pictures_equal_diffusers():
    levels = peer_latents("StableDiffusionXLPipeline", tiny.folder(), output_type="np", num_inference_steps=4)
    pictures = tiny.model().generate(PROMPT, steps=4, seed=SEED, n=2)
    difference = np.stack([np.asarray(drawn) for drawn in pictures]) / 255 - levels
    assert np.abs(difference).max() < 0.5 / 255 + 1e-4 and levels.std() > 0.1


def test_guidance_of_one_is_off():
    """And costs nothing: the network does not predict what is unwanted."""
    batch_sizes = []
    hook = tiny.model().unet.register_forward_hook(lambda module, args, result: batch_sizes.append(len(args[0])))
    one = final(tiny.model(), steps=2, guidance=1.0, negative=NEGATIVE)
    off = final(tiny.model(), steps=2, guidance=0.0)
    hook.remove()
    assert torch.equal(one, off) and batch_sizes == [1] * 4
    near = final(tiny.model(), steps=2, guidance=1.0 + 1e-6, negative=NEGATIVE)
    assert (near - one).abs().max() < 1e-3


def test_picture_i_has_seed_plus_i():
    together = final(tiny.model(), steps=3, seed=7, n=3, sampler="euler_ancestral")
    alone = final(tiny.model(), steps=3, seed=9, sampler="euler_ancestral")
    assert (together[2] - alone[0]).abs().max() < 1e-4 * alone.std()  # another batch size may round differently
    assert (together[0] - alone[0]).abs().max() > 1
    again = final(tiny.model(), steps=3, seed=7, n=3, sampler="euler_ancestral")
    assert torch.equal(together, again)


@torch.no_grad()
def test_masked_part_stays():
    latent = final(tiny.model(), steps=5, image=picture(), mask=mask(), seed=SEED, strength=1.0)
    generator = torch.Generator().manual_seed(SEED)
    known = tiny.model().encode_picture(
        to_tensor(picture()), lambda: torch.randn(1, 4, 16, 16, generator=generator))
    # 27 white columns are 7 columns of latent pixels, 4 wide: the nearest pixel decides.
    assert torch.equal(latent[..., 7:], known[..., 7:])
    assert ((latent[..., :7] - known[..., :7]).abs() > 0.1).float().mean() > 0.9


def test_pictures_of_any_mode_are_taken():
    for mode in ("RGBA", "L", "P"):
        start = picture().convert(mode)
        found = final(tiny.model(), steps=3, image=start)
        assert torch.equal(found, final(tiny.model(), steps=3, image=start.convert("RGB"))), mode


def test_the_predictions_arrive_at_the_picture():
    drawing = tiny.model().prepare(DrawSettings(PROMPT, steps=4, sampler="euler"))
    assert len(drawing) == 4
    states = list(tiny.model().denoise(drawing))
    assert len(states) == 4
    for x, x0 in states:
        assert x.shape == x0.shape == (1, 4, 16, 16) and not x.requires_grad
    assert torch.equal(x, x0)  # the last step goes to no noise, which is the prediction itself


def test_another_network_may_predict():
    """`network` is called as the UNet is, once a step, with and without the text in one batch."""
    model = tiny.model()
    calls = []

    def network(x, t, context, pooled, size_ids, residuals):
        calls.append((x.shape, residuals))
        return -model.unet(x, t, context, pooled, size_ids, residuals)

    settings = DrawSettings(PROMPT, steps=2, seed=SEED)
    *_, (x, _) = model.denoise(model.prepare(settings), network)
    *_, (plain, _) = model.denoise(model.prepare(settings))
    *_, (same, _) = model.denoise(model.prepare(settings), model.unet)
    assert calls == [((2, 4, 16, 16), None)] * 2
    assert torch.equal(plain, same) and (x - plain).abs().max() > 0.1


# Memory and files ---------------------------------------------------------------------------------

def test_lazy_parts_are_read_when_needed_and_text_encoders_freed():
    lazy = Pipeline.load(tiny.folder(), lazy=True)
    assert all(param.is_meta for param in lazy.parameters())
    drawing = lazy.latents(PROMPT, steps=2, seed=1)
    next(drawing)
    in_memory = {name for name, param in lazy.named_parameters() if not param.is_meta}
    assert in_memory == {f"unet.{name}" for name, _ in tiny.model().unet.named_parameters()}
    (x,) = drawing
    assert torch.equal(x, final(tiny.model(), steps=2, seed=1))
    assert lazy.decode(x)[0].tobytes() == tiny.model().decode(x)[0].tobytes()
    assert torch.equal(final(lazy, steps=2, seed=1), x)  # the second time with the text that was kept
    assert all(param.is_meta for param in lazy.text_encoder_2.parameters())


def test_a_refiner_finds_the_memory_of_the_first_unet_free(monkeypatch):
    base, refiner = (Pipeline.load(tiny.folder(kind), lazy=True) for kind in ("sdxl", "refiner"))
    drawing = base.latents(PROMPT, steps=2, refiner=refiner, high_noise_frac=0.5)
    next(drawing)
    layers = [weakref.ref(module) for module in base.unet.modules()]
    load_part, alive = networks.load_part, []

    def load_and_count(*given):
        alive.append(sum(layer() is not None for layer in layers))
        return load_part(*given)

    monkeypatch.setattr(networks, "load_part", load_and_count)
    next(drawing)
    assert alive == [0]  # when the refiner's UNet is read


def test_a_saved_pipeline_is_the_same(tmp_path):
    model = tiny.model()
    model.save(tmp_path)
    again = Pipeline.load(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items()) and len(state) > 300
    assert again.tokenizer_2.pad == 0 and again.schedule == model.schedule and again.index == model.index
    model.save(tmp_path / "half", torch.float16)
    half = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in half.values()} == {torch.float16}
    Pipeline.load(tmp_path, lazy=True).save(tmp_path / "lazy")
    assert all(torch.equal(state[name], x) for name, x in Pipeline.load(tmp_path / "lazy").state_dict().items())


def test_a_single_file_has_its_tokenizers_beside_it(tmp_path):
    size = tiny.model().tokenizer.size
    with pytest.raises(InputError, match="tokenizer_2: no such folder, .* beside the file"):
        open_tokenizer(tmp_path / "model.safetensors", "tokenizer_2", size)
    tiny.model().tokenizer_2.save(tmp_path / "tokenizer_2")
    assert open_tokenizer(tmp_path / "model.safetensors", "tokenizer_2", size).pad == 0


def test_another_vae_and_16_bits():
    other = Pipeline.load(tiny.folder(), vae=tiny.folder("sd15") / "vae", lazy=True)
    other.fetch("vae")
    assert torch.equal(other.vae.quant_conv.weight, tiny.model("sd15").vae.quant_conv.weight)
    half = Pipeline.load(tiny.folder(), dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == torch.float16 and half.vae.quant_conv.weight.dtype == torch.float32
    bf16 = Pipeline.load(tiny.folder(), dtype=torch.bfloat16)
    x = final(bf16, steps=3, seed=SEED)
    assert x.dtype == torch.float32  # latents stay in 32 bits between the steps
    assert (x - final(tiny.model(), steps=3, seed=SEED)).std() < 0.1 * x.std()
    assert bf16.decode(x)[0].size == (64, 64)


def test_large_pictures_are_decoded_in_tiles(monkeypatch):
    model = tiny.model()
    latents, tiled = final(model, steps=2, n=2), []
    whole = [drawn.tobytes() for drawn in model.decode(latents)]

    def decode_tiles(z):
        tiled.append(len(z))
        return model.vae.decode(z)

    monkeypatch.setattr(model.vae, "decode_tiles", decode_tiles)
    monkeypatch.setattr("minipic.pipeline.PIXELS_UNTILED", 64 * 64 - 1)
    assert [drawn.tobytes() for drawn in model.decode(latents)] == whole and tiled == [2]
    monkeypatch.setattr("minipic.pipeline.PIXELS_UNTILED", 64 * 64)
    model.decode(latents)
    assert tiled == [2]


def test_a_model_saved_after_a_textual_inversion(tmp_path):
    """diffusers' --save_as_full_pipeline: new tokens in the tokenizers, new rows in the embeddings."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.folder())
    torch.manual_seed(0)
    for tokenizer, encoder in ((peer.tokenizer, peer.text_encoder), (peer.tokenizer_2, peer.text_encoder_2)):
        tokenizer.add_tokens(["<toy>", "<toy>_1"])
        encoder.resize_token_embeddings(len(tokenizer))
    peer.save_pretrained(tmp_path)
    ours = Pipeline.load(tmp_path)
    prompt = "a <toy> on a grey floor"
    context, _, pooled, _ = peer.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    cond, _ = ours.encode(prompt)
    torch.testing.assert_close(cond.context, context, rtol=1e-4, atol=1e-5)
    ids = ours.tokenizer_2([prompt])
    assert ids[0, 2:4].tolist() == [ours.tokenizer_2.size - 2, ours.tokenizer_2.size - 1]  # both vectors
    # diffusers pools at the largest id, which is the new token; the model was trained with the end token.
    peer.text_encoder_2.text_model.eos_token_id = ours.tokenizer_2.end
    expected = peer.text_encoder_2(ids).text_embeds
    assert (expected - pooled).abs().max() > 1e-3
    torch.testing.assert_close(cond.pooled, expected, rtol=1e-4, atol=1e-5)


def test_a_model_whose_scheduler_is_not_here_draws_with_a_sampler_that_is(tmp_path):
    shutil.copytree(tiny.folder(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("EulerDiscreteScheduler", "UniPCMultistepScheduler"))
    model = Pipeline.load(tmp_path)
    assert torch.equal(final(model, steps=3, sampler="euler"), final(tiny.model(), steps=3))
    with pytest.raises(ParameterError, match="^sampler: the UniPCMultistepScheduler of this model is not here; choose"):
        model.generate(PROMPT, steps=3)
    assert "UniPC" not in repr(tiny.model()) and repr(model)


def no_second_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer_2")


def another_vocabulary(folder):
    train_tokenizer(tiny.CAPTIONS, folder / "tokenizer", 530)


def unknown_scheduler(folder):
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "X"}')


@pytest.mark.parametrize("damage, message", [
    (no_second_tokenizer, "tokenizer_2: no such folder"),
    (another_vocabulary, "has 530 tokens, its text"),
    (unknown_scheduler, "_class_name='X'")])
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    shutil.copytree(tiny.folder(), tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        Pipeline.load(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


# The parameters -----------------------------------------------------------------------------------

EVERYTHING = dict(
    prompt="a cube", negative="a cone", steps=7, guidance=2.5, seed=11, n=3, size=(32, 48), sampler="ddim",
    image=picture(1), strength=0.3, mask=mask(), control=((picture(2), 0.4),), edit=picture(3), image_guidance=1.25,
    refiner=tiny.model("refiner"), high_noise_frac=0.6, original_size=(1, 2), crop=(3, 4), target_size=(5, 6),
    guidance_rescale=0.1, graph=False)


class Prepared(Exception):
    """Raised in the place of a drawing."""


@pytest.mark.parametrize("name", ["generate", "latents"])
def test_parameters_are_those_of_the_settings(name, monkeypatch):
    """Each writes them out, so that editors and `help` show them: same names, order and defaults."""
    method = getattr(Pipeline, name)
    _, *parameters = inspect.signature(method).parameters.values()
    if name == "generate":
        assert parameters.pop().name == "progress"
    fields = dataclasses.fields(DrawSettings)
    assert [parameter.name for parameter in parameters] == [field.name for field in fields] == list(EVERYTHING)
    for parameter, field in zip(parameters, fields):
        assert parameter.annotation is not inspect.Parameter.empty
        if field.default is dataclasses.MISSING:
            assert parameter.default is inspect.Parameter.empty
        else:
            assert parameter.default == field.default

    def prepare(self, settings):
        raise Prepared(settings)

    monkeypatch.setattr(Pipeline, "prepare", prepare)
    with pytest.raises(Prepared) as prepared:
        list(method(tiny.model(), **EVERYTHING))
    settings, = prepared.value.args
    assert {field.name: getattr(settings, field.name) for field in fields} == EVERYTHING


@pytest.mark.parametrize("parameter, value", [
    ("prompt", [PROMPT, PROMPT]), ("prompt", None), ("negative", 3), ("n", "2"), ("n", 1.5), ("steps", None),
    ("seed", "0"), ("guidance", None), ("guidance", float("nan")), ("guidance", "5"), ("strength", "much"),
    ("image_guidance", None), ("guidance_rescale", "0"), ("image", "photo.png"), ("mask", np.zeros((64, 64))),
    ("edit", Path("photo.png")), ("control", picture()), ("control", [picture()]), ("control", [("edges.png", 1.0)]),
    ("control", [(picture(), "1")]), ("size", "64x64"), ("size", 64.0), ("size", (64,)), ("size", (64, None)),
    ("crop", 3), ("original_size", "64x64"), ("target_size", (1, 2, 3)), ("sampler", 3),
    ("refiner", "weights/refiner"), ("sampler", ["euler"]), ("graph", "no"), ("progress", "yes"), ("n", True),
    ("seed", True), ("strength", True), ("size", True), ("seed", -1), ("seed", 2**64), ("guidance", 1e300),
    ("guidance_rescale", 5.0), ("guidance_rescale", -1.0), ("high_noise_frac", 2.0), ("high_noise_frac", -0.1),
    ("original_size", (-5, 3)), ("original_size", (10**20, 5)), ("target_size", (0, 1)), ("crop", (-5, 0))])
def test_an_argument_of_the_wrong_type_is_named_in_one_sentence(parameter, value):
    with pytest.raises(ParameterError) as error:
        tiny.model().generate(**{"prompt": PROMPT, parameter: value})
    message = str(error.value)
    assert error.value.parameter == parameter and message.startswith(f"{parameter}: ")
    assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("settings, message", [
    (dict(sampler="eular"), "sampler: 'eular' is unknown; choose one of "),
    (dict(sampler="flow_euler"), "sampler: "),
    (dict(steps=0), "steps: choose between 1 and 1000, not 0"),
    (dict(steps=1001), "steps: choose between 1 and 1000, not 1001"),
    (dict(n=0), "n: choose 1 or more pictures, not 0"),
    (dict(size=(60, 64)), "size: 60x64: width and height must be multiples of 8"),
    (dict(size=(0, 64)), "size: 0x64"),
    (dict(size=60), "size: 60x60"),
    (dict(image=picture(), strength=0.0), "strength: choose above 0"),
    (dict(image=picture(), strength=1.5), "strength: choose above 0"),
    (dict(image=picture(), strength=0.01), "no step"),
    (dict(seed=-1), f"seed: choose 0 to {2**64 - 1}, not -1"),
    (dict(seed=2**64), f"seed: choose 0 to {2**64 - 1}, not {2**64}"),
    (dict(mask=mask()), "mask: needs an image"),
    (dict(image=picture(), mask=Image.new("L", (64, 64))), "mask: hardly anything of it is white"),
    (dict(image=picture(), mask=Image.new("RGBA", (64, 64), (255, 255, 255, 0))), "mask: hardly anything of it is white"),
    (dict(image=picture(), mask=HAIRLINE), "mask: hardly anything of it is white"),
    (dict(image=picture(), mask=mask().resize((32, 64))), "mask: has 32x64 pixels and the image 64x64")])
def test_what_cannot_be_drawn_is_refused(settings, message):
    """In the words of Python: no flags of the command line."""
    with pytest.raises(InputError) as error:
        final(tiny.model(), **settings)
    assert message in str(error.value) and "--" not in str(error.value)


@pytest.mark.parametrize("name, value", [("original_size", (64, 64)), ("crop", (8, 0)), ("target_size", (32, 32))])
def test_sizes_of_sdxl_are_refused_by_other_models(name, value):
    with pytest.raises(ParameterError, match=f"^{name}: is for SDXL, and this model is none"):
        tiny.model("sd15").generate(PROMPT, **{name: value})


def test_a_seed_of_numpy_is_a_seed():
    assert final(tiny.model(), seed=np.int64(3)).equal(final(tiny.model(), seed=3))


def test_one_number_is_a_square_and_a_name_is_no_dtype():
    assert tiny.model().generate(PROMPT, size=32, steps=1)[0].size == (32, 32)
    with pytest.raises(ParameterError, match="dtype: 'bf16' is none of PyTorch's, such as torch.bfloat16"):
        Pipeline.load(tiny.folder(), dtype="bf16")


@pytest.mark.parametrize("parameter, value", [
    ("path", 3), ("path", None), ("dtype", "bf16"), ("device", "gpu"), ("device", 2.5), ("device", "cuda:99"),
    ("lora", 3), ("lora", [3]), ("lora", [("a.safetensors", 1.0, 2.0)]), ("lora", {"a": 1})])
def test_loading_names_an_argument_of_the_wrong_type(parameter, value):
    with pytest.raises(ParameterError, match=f"^{parameter}: ") as error:
        Pipeline.load(**{"path": tiny.folder(), parameter: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("parameter, prompts", [("prompt", (3,)), ("prompt", (None,)), ("negative", ("a", 3))])
def test_encoding_takes_texts(parameter, prompts):
    with pytest.raises(ParameterError, match=f"^{parameter}: expected one text"):
        tiny.model().encode(*prompts)


def test_a_black_picture_is_an_error():
    with pytest.raises(ParameterError, match="dtype: .* NaN or infinity in float32; use bf16 or fp32"):
        tiny.model().decode(torch.full((1, 4, 8, 8), torch.nan))


def test_repr_is_short_and_names_the_parts():
    text = repr(tiny.model())
    assert text.startswith("StableDiffusionXLPipeline on cpu, draws 64x64 pixels\n")
    assert len(text.splitlines()) <= 12 and max(map(len, text.splitlines())) <= 100
    for part in ("unet: UNet,", "vae: VAE,", "text_encoder: CLIPText,", "text_encoder_2: CLIPText,", "schedule: euler"):
        assert f"\n  {part}" in text
    assert text.count("float32") == 4 and "on disk" not in text
    assert repr(Pipeline.load(tiny.folder(), lazy=True)).count("on disk") == 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr, progress, is_shown", [
    (io.StringIO, None, False), (io.StringIO, True, True), (Terminal, None, True), (Terminal, False, False)])
def test_progress_is_shown_when_asked_for_or_in_a_terminal(stderr, progress, is_shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr())
    tiny.model().generate(PROMPT, steps=2, progress=progress)
    assert ("0/2" in sys.stderr.getvalue()) == is_shown
    assert is_shown or sys.stderr.getvalue() == ""


def test_hooks_on_the_levels_of_a_unet_fire():
    unet, calls = tiny.model().unet, []
    levels = {"down": unet.down_blocks[0], "middle": unet.mid_block, "up": unet.up_blocks[-1]}
    hooks = [level.register_forward_hook(lambda *given, name=name: calls.append(name))
             for name, level in levels.items()]
    final(tiny.model(), steps=2)
    for hook in hooks:
        hook.remove()
    assert calls == ["down", "middle", "up"] * 2


@pytest.mark.parametrize("config", [UNetConfig, ControlNetConfig])
@pytest.mark.parametrize("parameter, values, words", [
    ("down_block_types", dict(down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock3D")), "'DownBlock3D'"),
    ("down_block_types", dict(down_block_types=("DownBlock2D",)), "must have 3 values"),
    ("attention_head_dim", dict(attention_head_dim=(5, 10, 19)), "19 heads do not divide 1280 channels"),
    ("attention_head_dim", dict(attention_head_dim=(5, 10)), "must have 3 values"),
    ("attention_head_dim", dict(attention_head_dim=0), "out of range"),
    ("transformer_layers_per_block", dict(transformer_layers_per_block=(1, 2, 10, 10)), "must have 3 values"),
    ("block_out_channels", dict(block_out_channels=[320, 640, 1280]), "of the wrong type"),
    ("block_out_channels", dict(block_out_channels=()), "1 to 8 levels"),
    ("norm_num_groups", dict(norm_num_groups=33), "33 does not divide 320 channels"),
    ("cross_attention_dim", dict(cross_attention_dim="2048"), "of the wrong type"),
    ("addition_time_embed_dim", dict(addition_time_embed_dim=None), "is needed for")])
def test_configs_made_in_python_check_themselves(config, parameter, values, words):
    with pytest.raises(ParameterError) as error:
        config(**values)
    assert error.value.parameter == parameter and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("values, words", [
    (dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock")), "'UpBlock'"),
    (dict(up_block_types=("UpBlock2D",) * 4), "must have 3 values")])
def test_the_way_up_is_checked_too(values, words):
    with pytest.raises(ParameterError, match=words):
        UNetConfig(**values)
