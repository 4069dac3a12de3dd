"""In-domain generation: official numbers, the identities of guidance, its applications, training and the command line."""

import copy
import importlib
import json
import shutil
from functools import cache
from pathlib import Path

import peers
import pytest
import tiny
import torch
from safetensors.torch import load_file

import sample
import train
from minipic.common import ParameterError, find_file
from minipic.diffusion.guidance import combine
from minipic.diffusion.samplers import SAMPLERS
from minipic.diffusion.schedule import Schedule
from minipic.draw_settings import DrawSettings
from minipic.image import mask_to_tensor, open_picture, read_saved_settings, to_tensor
from minipic.layers import lora, nulltext
from minipic.layers.nulltext import NullTextUNet
from minipic.models.controlnet import ControlNet
from minipic.models.unet import SD15, SDXL_BASE, UNet, UNetConfig
from minipic.papers import distillation, indomain
from minipic.papers.indomain import Adapter, DrawOptions, Term, multi_guidance, null_text_unet, share_weights
from minipic.pipeline import Pipeline
from minipic.text import Conditioning
from minipic.weights import read_weights, save_lora, save_weights
from minipic.weights.files import read_header
from minipic.weights.folders import save_part
from minipic.weights.layouts import build_empty
from minipic.world import probe
from minipic.world.camera import Camera, extrinsics, intrinsics, project
from minipic.world.scene import render, sample_scene
from minipic.world.styles import mosaic
from tiny import NEGATIVE, PROMPT, mask, picture

GOLDEN = peers.GOLDENS / "indomain.safetensors"
GOLDEN_CONFIG = UNetConfig(
    sample_size=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
    transformer_layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
    use_linear_projection=False, addition_embed_type=None, addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None)
OFF = DrawOptions(domain_guidance=0.0, control_guidance=0.0)


# The official code's numbers ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden() -> dict:
    """The inputs and outputs of the released code, on a small UNet with random weights."""
    return {name[5:]: x for name, x in load_file(GOLDEN).items() if name.startswith("case.")}


@cache
def golden_unet() -> UNet:
    unet = UNet(GOLDEN_CONFIG)
    unet.load_state_dict({name[5:]: x for name, x in load_file(GOLDEN).items() if name.startswith("unet.")}, strict=True)
    return unet


def golden_vectors(golden: dict, start: str = "b.") -> dict:
    """The official constants of every block."""
    vectors = {}
    for name, vector in golden.items():
        if name.startswith(start):
            vectors[name.removeprefix(start).removesuffix(".attn2.null_text_feature")] = vector
    return vectors


@pytest.fixture
def golden_domain(golden) -> NullTextUNet:
    """The official stand-in for a trained domain: all parameters * 1.1 + 0.01, the constants untouched."""
    domain = copy.deepcopy(NullTextUNet(share_weights(golden_unet()), golden_vectors(golden)))
    with torch.no_grad():
        for param in domain.parameters():
            param.mul_(1.1).add_(0.01)
    return domain


@torch.no_grad()
def test_the_constants_are_the_official_ones(golden):
    unet, null = golden_unet(), golden["embedding_null"]
    captures = {"b.": (golden["capture.x"], golden["capture.t"]),
                "b_from_batch2.": (golden["x_b2_nonsquare"], golden["capture.t"])}
    for start, (x, t) in captures.items():
        context = null.expand(len(x), -1, -1)
        found = nulltext.capture(unet, lambda: unet(x, t, context))
        expected = golden_vectors(golden, start)
        assert found.keys() == expected.keys() and len(found) == 4
        for path, vector in found.items():
            torch.testing.assert_close(vector, expected[path], rtol=0, atol=2e-6)
    constant = NullTextUNet(share_weights(unet), golden_vectors(golden))
    first = unet(golden["capture.x"], golden["capture.t"], null)
    second = constant(golden["capture.x"], golden["capture.t"])
    torch.testing.assert_close(first, golden["capture.eps_first_forward"], rtol=0, atol=1e-5)
    torch.testing.assert_close(second, golden["capture.eps_second_forward_constant"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_null_text_unet_is_the_official_one(golden, golden_domain):
    unet, null, x, t = golden_unet(), golden["embedding_null"], golden["x"], golden["t"]
    domain = NullTextUNet(share_weights(unet), golden_vectors(golden))
    assert {name: list(x.shape) for name, x in domain.unet.state_dict().items()} == json.loads(
        read_header(GOLDEN)[1]["null-text keys"])
    assert sum(param.numel() for param in domain.parameters()) == 49708
    found = {
        "eps_u": unet(x, t, null), "eps_c": unet(x, t, golden["embedding_control"]), "eps_null": domain(x, t),
        "eps_d": golden_domain(x, t), "eps_null_b2": domain(golden["x_b2_nonsquare"], golden["t_b2"]),
        "eps_u_b2": unet(golden["x_b2_nonsquare"], golden["t_b2"], null.expand(2, -1, -1))}
    for name, prediction in found.items():
        torch.testing.assert_close(prediction, golden[name], rtol=0, atol=1e-5)


def golden_terms(golden, domain, w_d, w_c) -> list[Term]:
    prior = golden_unet()
    return [Term(prior, Conditioning(golden["embedding_null"]), 0.0),
            Term(domain, Conditioning(None), w_d),
            Term(prior, Conditioning(golden["embedding_control"]), w_c)]


@torch.no_grad()
def test_guidance_is_the_official_one(golden, golden_domain):
    cases = [name for name in golden if name.startswith("combined.")]
    assert len(cases) == 6
    for name in cases:
        w_d, w_c = (float(number) for number in name.removeprefix("combined.wd").split("_wc"))
        network = multi_guidance(golden_terms(golden, golden_domain, w_d, w_c), 1)
        found = network(golden["x"], golden["t"], None, None, None, None)
        torch.testing.assert_close(found, golden[name], rtol=0, atol=3e-5)
        pairs = [(w_d, golden["eps_d"]), (w_c, golden["eps_c"])]
        torch.testing.assert_close(combine(golden["eps_u"], pairs), golden[name], rtol=0, atol=1e-5)


@torch.no_grad()
def test_six_steps_are_the_official_ones(golden, golden_domain):
    schedule = Schedule(timestep_spacing="linspace", class_name="DPMSolverMultistepScheduler")
    grid = schedule.grid(6)
    assert grid.timesteps.tolist() == golden["loop.timesteps"].tolist() and schedule.sampler == "dpmpp_2m"
    network = multi_guidance(golden_terms(golden, golden_domain, 2.5, 2.5), 1)
    denoise = schedule.objective.denoiser(lambda x, t: network(x, t, None, None, None, None), grid)
    start = grid.start * golden["loop.latents_init"]
    for i, (x, _) in enumerate(SAMPLERS["dpmpp_2m"](denoise, start, grid.sigmas)):
        x = schedule.objective.network_input(x, grid.sigmas[i + 1])
        torch.testing.assert_close(x, golden[f"loop.latents_after_{i}"], rtol=0, atol=1e-4)
    assert i == 5


def test_gradients_are_the_official_ones(golden, golden_domain):
    loss = (golden_domain(golden["x"], golden["t"]) - golden["train.eps_target"]).square().mean()
    torch.testing.assert_close(loss[None], golden["train.loss"], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {name: param.grad for name, param in golden_domain.unet.named_parameters()}
    cases = [name for name in golden if name.startswith("train.grad.")]
    assert len(cases) == 14
    for name in cases:
        expected = golden[name]
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradients[name.removeprefix("train.grad.")], expected, rtol=0, atol=atol)


# The null-text UNet -------------------------------------------------------------------------------

@pytest.mark.parametrize("config, whole, without, constants", [
    (SD15, 859_520_964, 815_533_444, 12_480), (SDXL_BASE, 2_567_463_684, 2_021_626_884, 83_200)])
def test_full_size(config, whole, without, constants):
    unet = build_empty(UNet, config)
    null_text = NullTextUNet(share_weights(unet), nulltext.zero_text_vectors(unet))
    assert sum(param.numel() for param in unet.parameters()) == whole
    assert sum(param.numel() for param in null_text.parameters()) == without
    assert sum(buffer.numel() for buffer in null_text.buffers()) == constants
    assert all(param.is_meta for param in null_text.parameters())  # nothing was copied


@torch.no_grad()
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_null_text_of_zeros_is_a_constant_exactly(precision):
    pipeline = Pipeline.load(tiny.folder(), precision)
    domain, error = null_text_unet(pipeline, (64, 64))
    _, null = pipeline.encode("")
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]])
    for t in (50, 500, 950):
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(t)).to(precision)
        text = [tensor.to(precision).expand(2, *tensor.shape[1:]) for tensor in null[:2]]
        expected = pipeline.unet(x, torch.tensor(t), *text, ids.expand(2, -1))
        assert torch.equal(domain(x, torch.tensor(t)), expected)
    assert error == 0 and domain.size_ids.tolist() == ids.tolist() and not domain.pooled.any()


@torch.no_grad()
def test_an_encoded_null_text_is_a_constant_nearly():
    pipeline = tiny.model("sd15")
    domain, error = null_text_unet(pipeline, (64, 64))
    assert 0.001 < error < 0.5 and domain.pooled is None
    _, null = pipeline.encode("")
    visited = []  # the same drawing without text, by hand

    def network(x, t, context, *others):
        prediction = pipeline.unet(x, t, null.context)
        visited.append((domain(x, t) - prediction).norm() / prediction.norm())
        return prediction

    for _ in pipeline.denoise(pipeline.prepare(DrawSettings("", steps=indomain.CAPTURE_STEPS, guidance=1.0)), network):
        pass
    assert len(visited) == 5 and error == pytest.approx(max(visited).item(), rel=1e-3)
    vectors = nulltext.zero_text_vectors(pipeline.unet)
    wrong = NullTextUNet(share_weights(pipeline.unet), {path: 0 * vector for path, vector in vectors.items()})
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(500.0)
    expected = pipeline.unet(x, t, null.context)
    assert (domain(x, t) - expected).norm() < 0.5 * (wrong(x, t) - expected).norm()


@torch.no_grad()
def test_equal_tokens_are_a_constant_exactly():
    """If all text tokens are equal, attention gives every pixel the same, whatever x and t are."""
    unet = tiny.model("sd15").unet
    context = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(3)).expand(2, 7, -1)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    vectors = nulltext.capture(unet, lambda: unet(x, torch.tensor([3, 700]), context))
    constant = NullTextUNet(share_weights(unet), vectors)
    other = torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(constant(other, torch.tensor(90)), unet(other, torch.tensor(90), context), atol=1e-5, rtol=0)


def test_weights_are_shared_and_loras_are_not():
    pipeline = tiny.build()
    lora.inject(pipeline.unet, 2)
    second = share_weights(pipeline.unet)
    assert not lora.layers(second) and lora.layers(pipeline.unet)
    for name, param in second.named_parameters():
        assert param is pipeline.unet.get_parameter(name)


# Guidance -----------------------------------------------------------------------------------------

@cache
def domain_of(kind: str = "sdxl") -> NullTextUNet:
    """A null-text UNet with other weights than its model's."""
    domain, _ = null_text_unet(tiny.model(kind), (64, 64))
    domain = copy.deepcopy(domain)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in domain.parameters():
            param += 0.05 * torch.randn(param.shape, generator=generator)
    return domain


def drawn(pipeline=None, domain=None, options=DrawOptions(), prompt=PROMPT, **settings) -> torch.Tensor:
    """The last latents of a drawing; its pictures are what they decode to."""
    pipeline = pipeline or tiny.model()
    latents = []
    settings = DrawSettings(prompt, **{"steps": 3, "n": 2, **settings})
    adapter = Adapter(domain=domain or domain_of("sdxl" if pipeline.is_sdxl else "sd15"))
    pictures = indomain.draw(pipeline, adapter, settings, options=options, on_step=lambda x, x0: latents.append(x))
    assert [one.tobytes() for one in pictures] == [one.tobytes() for one in pipeline.decode(latents[-1])]
    return latents[-1]


def generated(pipeline=None, prompt=PROMPT, **settings) -> torch.Tensor:
    *_, x = (pipeline or tiny.model()).latents(prompt, **{"steps": 3, "n": 2, **settings})
    return x


def by_hand(pipeline, predict, steps=3, n=2, seed=0, size_ids=((64.0, 64, 0, 0, 64, 64),), start=None) -> torch.Tensor:
    """Euler's steps written out. predict(x, t, rows): what guidance gives; `rows` repeats a text's rows."""
    grid = pipeline.schedule.grid(steps)
    if start is None:
        noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
        start = grid.start * torch.stack(noise)
    else:
        start, grid = start(grid)
    x = start
    ids = torch.tensor(size_ids * n)

    def rows(text):
        if text.pooled is None:
            return [text.context.expand(n, -1, -1)]
        return [text.context.expand(n, -1, -1), text.pooled.expand(n, -1), ids]

    for i, (sigma, lower) in enumerate(zip(grid.sigmas, grid.sigmas[1:])):
        eps = predict(x / (sigma**2 + 1) ** 0.5, grid.timesteps[i], rows)
        x = x + (lower - sigma) * eps
    return x


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_drawing_is_the_formula(kind):
    pipeline, domain = tiny.model(kind), domain_of(kind)
    cond, uncond = pipeline.encode(PROMPT)

    def predict(x, t, rows):
        eps_u, eps_c, eps_d = pipeline.unet(x, t, *rows(uncond)), pipeline.unet(x, t, *rows(cond)), domain(x, t)
        return eps_u + 2 * (eps_d - eps_u) + 3 * (eps_c - eps_u)

    torch.testing.assert_close(drawn(pipeline), by_hand(pipeline, predict), rtol=0, atol=2e-4)

    def without_prompt(x, t, rows):
        eps_u = pipeline.unet(x, t, *rows(uncond))
        return eps_u + 2 * (domain(x, t) - eps_u)

    calls = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    found = drawn(pipeline, prompt="")
    torch.testing.assert_close(found, by_hand(pipeline, without_prompt), rtol=0, atol=2e-4)
    assert calls == 3 * [2] + 3 * [2]  # eps_u alone, here and by hand
    calls.clear()
    drawn(pipeline)
    handle.remove()
    assert calls == 3 * [4]  # eps_u and eps_c of two pictures together


@torch.no_grad()
def test_limits():
    pipeline, domain = tiny.model(), domain_of()
    _, uncond = pipeline.encode("")
    assert torch.equal(drawn(options=DrawOptions(0.0, 5.0)), generated())  # ordinary guidance, bit for bit
    assert torch.equal(drawn(options=DrawOptions(0.0, 2.5), negative=NEGATIVE), generated(guidance=2.5, negative=NEGATIVE))
    without = by_hand(pipeline, lambda x, t, rows: pipeline.unet(x, t, *rows(uncond)))
    torch.testing.assert_close(drawn(options=OFF), without, rtol=0, atol=1e-4)
    alone = by_hand(pipeline, lambda x, t, rows: domain(x, t))
    torch.testing.assert_close(drawn(options=DrawOptions(1.0, 0.0)), alone, rtol=0, atol=1e-4)
    untrained, _ = null_text_unet(pipeline, (64, 64))
    for w_d in (-1.0, 2.0):
        found = drawn(domain=untrained, options=DrawOptions(w_d, 5.0))
        torch.testing.assert_close(found, generated(), rtol=0, atol=1e-4)
    no_text = {"prompt": "", "options": DrawOptions(2.0, 3.0)}
    assert torch.equal(drawn(**no_text), drawn(prompt="", options=DrawOptions(2.0, -7.0)))


@torch.no_grad()
def test_any_number_of_terms_of_any_sign():
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(400.0)
    pipeline, domain, other = tiny.model(), domain_of(), copy.deepcopy(tiny.model().unet)
    for param in other.parameters():
        param *= 1.05
    texts = []
    for prompt in ("", PROMPT, NEGATIVE):
        cond, _ = pipeline.encode(prompt)
        texts.append(cond._replace(size_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]])))
    null, first, second = texts
    terms = [Term(pipeline.unet, null), Term(domain, Conditioning(None), 1.5), Term(pipeline.unet, first, 7.5),
             Term(other, second, -3.5), Term(other, first, 0.5), Term(pipeline.unet, second, 0.0)]

    def alone(network, text):
        if network is domain:
            return domain(x, t)
        return network(x, t, *[tensor.expand(2, *tensor.shape[1:]) for tensor in text])

    eps = [alone(term.network, term.text) for term in terms]
    weights = [term.weight for term in terms]
    expected = (1 - sum(weights)) * eps[0] + sum(w * e for w, e in zip(weights, eps))
    found = multi_guidance(terms, 2)(x, t, None, None, None, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    shuffled = [terms[0], *terms[:0:-1]]
    torch.testing.assert_close(multi_guidance(shuffled, 2)(x, t, None, None, None, None), found, rtol=0, atol=1e-4)


class Gaussian(torch.nn.Module):
    """The exact noise prediction for data of one normal distribution."""

    def __init__(self, mean, std, schedule):
        super().__init__()
        self.mean, self.std, self.schedule = torch.tensor(mean), torch.tensor(std), schedule

    def forward(self, x, t, *text):
        sigma = self.schedule.sigma(t).to(x)
        return sigma * (x * (sigma**2 + 1) ** 0.5 - self.mean) / (self.std**2 + sigma**2)


def test_a_product_of_gaussians_is_sampled_exactly():
    """The domain changes one half of the numbers and the control the other: weights of 1 give both, in closed form."""
    schedule = Schedule()
    networks = [Gaussian(mean, std, schedule) for mean, std in (
        ([0.0, 0.0], [1.0, 1.0]), ([2.0, 0.0], [0.3, 1.0]), ([0.0, -1.0], [1.0, 0.5]))]
    terms = [Term(network, Conditioning(None), 1.0) for network in networks]
    both = Gaussian([2.0, -1.0], [0.3, 0.5], schedule)
    network = multi_guidance(terms, 400)
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    for t in (20, 500, 950):
        t = torch.tensor(t)
        torch.testing.assert_close(network(x, t, None, None, None, None), both(x, t), rtol=0, atol=1e-5)
    grid = schedule.grid(60)
    denoise = schedule.objective.denoiser(lambda x, t: network(x, t, None, None, None, None), grid)
    *_, (x, _) = SAMPLERS["heun"](denoise, grid.start * x, grid.sigmas)
    torch.testing.assert_close(x.mean(0), torch.tensor([2.0, -1.0]), rtol=0, atol=0.1)
    torch.testing.assert_close(x.std(0), torch.tensor([0.3, 0.5]), rtol=0, atol=0.05)


# Applications -------------------------------------------------------------------------------------

def test_an_edit_starts_from_its_picture():
    """With weights of ordinary guidance it is image-to-image; a mask keeps its black part."""
    given = {"image": picture(1), "strength": 0.7}
    as_usual = DrawOptions(0.0, 5.0)
    assert torch.equal(drawn(options=as_usual, **given), generated(**given))
    assert torch.equal(drawn(options=as_usual, mask=mask(), **given), generated(mask=mask(), **given))
    assert not torch.equal(drawn(**given), drawn(options=as_usual, **given))
    pipeline = tiny.model()
    kept = mask_to_tensor(mask(), (64, 64))[:, ::4, ::4].bool().expand(4, -1, -1)
    mean, _ = pipeline.encode_moments(to_tensor(picture(1)))
    inner = ~kept & ~mask_to_tensor(mask(), (64, 64))[:, 2::4, 2::4].bool()
    found = drawn(mask=mask(), image=picture(1), strength=1.0, n=1)[0]
    close = (found - pipeline.vae.scale(mean)[0])[inner].abs().mean()
    assert close < 0.2 * (found - pipeline.vae.scale(mean)[0])[kept].abs().mean()


def with_controlnet() -> Pipeline:
    """A pipeline with a ControlNet that has an effect."""
    pipeline = tiny.build()
    pipeline.controlnet = ControlNet.from_unet(pipeline.unet, pipeline.vae.config.factor)
    for param in pipeline.controlnet.parameters():
        param.data.normal_(std=0.2, generator=torch.Generator().manual_seed(param.numel()))
    return pipeline


@torch.no_grad()
def test_a_controlnet_acts_on_the_control_prediction_alone():
    pipeline, domain = with_controlnet(), domain_of()
    control = [(picture(3), 0.8)]
    cond, uncond = pipeline.encode(PROMPT)
    hint = (to_tensor(picture(3))[None] + 1) / 2

    def formula(everywhere):
        def predict(x, t, rows):
            residuals = pipeline.controlnet(x, t, rows(cond)[0], hint, *rows(cond)[1:], 0.8)
            eps_u = pipeline.unet(x, t, *rows(uncond), residuals if everywhere else None)
            eps_c = pipeline.unet(x, t, *rows(cond), residuals)
            return eps_u + 2 * (domain(x, t) - eps_u) + 3 * (eps_c - eps_u)
        return by_hand(pipeline, predict)

    found = drawn(pipeline, control=control)
    torch.testing.assert_close(found, formula(False), rtol=0, atol=3e-4)
    everywhere = drawn(pipeline, control=control, options=DrawOptions(control_everywhere=True))
    torch.testing.assert_close(everywhere, formula(True), rtol=0, atol=3e-4)
    assert not torch.allclose(found, everywhere, atol=0.01)
    # A map alone is followed too: without a prompt the control prediction is that of the null text.
    assert not torch.allclose(drawn(pipeline, control=control, prompt=""), drawn(pipeline, prompt="", control=[
        (picture(4), 0.8)]), atol=0.01)


@pytest.fixture
def style(tmp_path) -> Path:
    """A LoRA of the UNet with an effect."""
    unet = UNet(tiny.model().unet.config)
    lora.inject(unet, 2)
    generator = torch.Generator().manual_seed(2)
    state = lora.lora_state_dict(unet)
    state = {name: x if x.ndim == 0 else torch.randn(x.shape, generator=generator) / 4 for name, x in state.items()}
    save_lora({"unet": state}, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.slow
@torch.no_grad()
def test_a_lora_customises_the_control_prediction_alone(style, tmp_path):
    plain, styled, domain = tiny.model(), Pipeline.load(tiny.folder(), lora=style), domain_of()
    cond, uncond = plain.encode(PROMPT)

    def predict(x, t, rows):
        eps_u, eps_c = plain.unet(x, t, *rows(uncond)), styled.unet(x, t, *rows(cond))
        return eps_u + 2 * (domain(x, t) - eps_u) + 3 * (eps_c - eps_u)

    expected = by_hand(plain, predict)
    found = drawn(styled)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)
    assert not torch.allclose(found, drawn(plain), atol=0.05)
    # The same from a model into which the LoRA was merged.
    lora.merge(styled.unet)
    merged = tiny.build()
    merged.unet.load_state_dict({name: styled.unet.state_dict()[name] for name in merged.unet.state_dict()})
    merged.save(tmp_path / "merged")
    options = DrawOptions(control_model=str(tmp_path / "merged"))
    torch.testing.assert_close(drawn(plain, options=options), expected, rtol=0, atol=3e-4)


@torch.no_grad()
def test_prompts_of_different_lengths():
    """A long prompt is more tokens than a short one; its null text is as long, and a shorter guide runs by itself."""
    long = " ".join([PROMPT] * 30)
    pipeline, domain = tiny.model(), domain_of()
    cond, uncond = pipeline.encode(long)
    torus, _ = pipeline.encode("a cyan torus")
    assert cond.context.shape[1] > torus.context.shape[1] == 77
    assert torch.equal(drawn(prompt=long, options=DrawOptions(0.0, 5.0)), generated(prompt=long))

    def predict(x, t, rows):
        eps_u, eps_c, eps_t = (pipeline.unet(x, t, *rows(text)) for text in (uncond, cond, torus))
        return eps_u + 2 * (domain(x, t) - eps_u) + 3 * (eps_c - eps_u) + 2 * (eps_t - eps_u)

    found = drawn(prompt=long, options=DrawOptions(guide=("a cyan torus:2",)))
    torch.testing.assert_close(found, by_hand(pipeline, predict), rtol=0, atol=3e-4)


@torch.no_grad()
def test_more_prompts_with_weights():
    pipeline, domain = tiny.model(), domain_of()
    cond, uncond = pipeline.encode(PROMPT)
    fog, _ = pipeline.encode("a cyan torus")

    def predict(x, t, rows):
        eps_u, eps_c, eps_f = (pipeline.unet(x, t, *rows(text)) for text in (uncond, cond, fog))
        return eps_u + 2 * (domain(x, t) - eps_u) + 3 * (eps_c - eps_u) - 1.5 * (eps_f - eps_u)

    found = drawn(options=DrawOptions(guide=("a cyan torus:-1.5",)))
    torch.testing.assert_close(found, by_hand(pipeline, predict), rtol=0, atol=3e-4)


# Text to 3-D --------------------------------------------------------------------------------------

@torch.no_grad()
def test_voxels_are_seen_by_the_worlds_camera():
    """One dense cell is where the camera projects it; without density there is the floor under the sky."""
    field = distillation.Voxels()
    field.density.fill_(-20)
    cameras = [Camera(), Camera(130, 40)]
    images, opacity = field(cameras, (64, 64))
    assert opacity.max() < 1e-3
    y_of_horizon = project(torch.tensor([[0.0, 0.0, -1e4]]), extrinsics(cameras[:1]), intrinsics((64, 64)))[0][0, 0, 1]
    is_floor = torch.arange(64) + 0.5 > y_of_horizon
    expected = torch.where(is_floor, torch.tensor(0.0), 2 * torch.tensor(0.5).sigmoid() - 1)
    torch.testing.assert_close(images[0, 0, :, 7], expected, rtol=0, atol=1e-3)
    z, y, x = 9, 22, 25
    field.density[0, 0, z, y, x] = 60
    images, opacity = field(cameras, (64, 64))
    last = distillation.CELLS - 1
    place = [c + half * (2 * i / last - 1) for c, half, i in zip(distillation.CENTRE, distillation.HALF, (x, y, z))]
    pixels, _ = project(torch.tensor([place]), extrinsics(cameras), intrinsics((64, 64)))
    for row in opacity, :
        for seen, (px, py) in zip(row, pixels[:, 0].tolist()):
            brightest = seen.flatten().argmax().item()
            assert abs(brightest % 64 + 0.5 - px) < 1.5 and abs(brightest // 64 + 0.5 - py) < 1.5 and seen.max() > 0.5


def test_distillation_pulls_views_to_what_is_predicted():
    """A network that always sees one picture behind the noise; its gradient is sigma (predicted - added noise)."""
    pipeline = tiny.model()
    wanted = torch.full((3, 64, 64), -0.6)
    wanted[1] = 0.8
    mean, _ = pipeline.encode_moments(wanted)
    wanted = pipeline.vae.scale(mean).detach()

    def network(x, t, *text):  # the noise that leads back to `wanted`
        sigma = pipeline.schedule.sigma(t).to(x)
        return (x * (sigma**2 + 1) ** 0.5 - wanted) / sigma

    def distance(field):
        image, _ = field([Camera(77, 22)], (64, 64))
        mean, _ = pipeline.encode_moments(image[0])
        return (pipeline.vae.scale(mean) - wanted).square().mean()

    steps = []
    with torch.no_grad():
        field = distillation.distill(pipeline, network, (64, 64), 40, 0, lambda x, x0: steps.append(x0))
        before, after = distance(distillation.Voxels()), distance(field)
        again = distillation.distill(pipeline, network, (64, 64), 2, 0)
        other = distillation.distill(pipeline, network, (64, 64), 2, 1)
    assert after < 0.4 * before and len(steps) == 4
    torch.testing.assert_close(steps[0], wanted, rtol=0, atol=1e-3)
    assert not torch.equal(again.density, other.density)
    assert all(param.grad is None for param in pipeline.vae.parameters())


@pytest.mark.slow
def test_an_object_is_a_turntable():
    settings = DrawSettings(PROMPT, steps=1, n=2)
    adapter = Adapter(domain=domain_of())
    pictures = indomain.draw(tiny.model(), adapter, settings, task="3d")
    assert [one.size for one in pictures] == [(8 * 64, 64)] * 2
    plain = indomain.draw(tiny.model(), adapter, settings, task="3d", options=OFF)
    assert pictures[0].tobytes() not in (pictures[1].tobytes(), plain[0].tobytes())


@pytest.mark.slow
def test_the_judge_sees_the_object_from_all_sides():
    """From cameras that were not learned from, with the shipped model."""
    pipeline = Pipeline.load("weights/tiny")
    judge = probe.load_judge(find_file("weights/tiny/judge"))
    untrained, _ = null_text_unet(pipeline, (64, 64))
    settings = pipeline.plan(DrawSettings("a large red cube"))[0]
    terms = indomain.guidance_terms(pipeline, Adapter(domain=untrained), settings, DrawOptions(0.0, 7.0))
    with torch.no_grad():
        field = distillation.distill(pipeline, multi_guidance(terms, 1), (64, 64), 150, 0)
        images, _ = field([Camera(45 * i + 20, 25) for i in range(8)], (64, 64))
    things = [description.things for description in probe.read(judge, images)]
    assert sum(len(found) == 1 and found[0].color == "red" for found in things) >= 6, things


# Training -----------------------------------------------------------------------------------------

def config_of(**settings) -> indomain.Settings:
    return indomain.Settings(**(dict(model=str(tiny.folder()), precision="fp32", scenes=6) | settings))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_what_trains(rank):
    config = config_of(lora_rank=rank)
    model = indomain.build(config)
    pipeline = model.pipeline
    params = indomain.setup(model, config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    data = indomain.data(model, config)
    batch = data.batch(0, range(4))
    assert all(caption in (None, "") for caption in batch["captions"])
    start = indomain.loss(model, batch, config)
    # An untrained null-text UNet is the model itself, for a null text of zeros.
    _, null = pipeline.encode("")
    schedule = pipeline.schedule
    sigma = schedule.sigma(batch["t"]).float().view(-1, 1, 1, 1)
    x = (batch["x0"] + sigma * batch["noise"]) / (sigma**2 + 1) ** 0.5
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4)
    prediction = pipeline.unet(x, batch["t"], null.context.expand(4, -1, -1), null.pooled.expand(4, -1), ids)
    torch.testing.assert_close(start, (prediction - batch["noise"]).square().mean(), rtol=1e-4, atol=0)
    optimizer = torch.optim.AdamW(params, 3e-3)
    for _ in range(12):
        loss = indomain.loss(model, batch, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * start
    trained = {id(param) for param in params}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in trained:
            assert torch.equal(tensor, before[name]), name  # the model and the constants
    if rank == 0:
        assert len(params) == len(list(model.domain.parameters()))
    assert vars(pipeline).keys() == vars(tiny.model()).keys()  # nothing is hung on it
    assert dict(pipeline.named_children()).keys() == dict(tiny.model().named_children()).keys()


def test_pictures_of_the_world_are_in_the_style():
    config = config_of(scenes=70)
    pictures = indomain.pictures_in_style(tiny.model(), config)
    assert len(pictures) == 70 and pictures[0].size == (64, 64)
    for i in (0, 69):
        image = render(sample_scene(0, i), truth=False, shade=mosaic).rgb[0]
        assert (pictures[i].draw([pictures[i]])[0] - image).abs().max() < 0.005


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures without captions, of two shapes, one with a caption file that cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate(((96, 48), (96, 48), (80, 80))):
        picture(i).resize(size).save(folder / f"{i}.png")
    (folder / "0.txt").write_bytes("Würfel".encode("latin-1"))
    (folder / "1.txt").write_text("")
    return folder


def run(paper_flags: list, out: Path) -> int:
    with tiny.short_drawings():
        return train.main(["indomain", "--model", str(tiny.folder()), "--batch", "2", "--steps", "2", "--lr", "0.01",
                           "--warmup", "0", "--out", str(out), *map(str, paper_flags)])


@pytest.mark.slow
def test_pictures_need_no_captions(photos, tmp_path):
    assert run(["--data", photos, "--ema", "0"], tmp_path / "run") == 0
    tensors = read_weights(tmp_path / "run" / "model" / "domain.safetensors")
    assert tensors["size_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()
    config = config_of(data=str(photos))
    pictures = indomain.data(indomain.build(config), config).pictures
    assert [photo.text for photo in pictures] == ["", "", ""]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """The files of short trainings: of all weights, and of a LoRA."""
    files = {}
    for name, flags in (("full", ["--gradient-checkpointing"]), ("lora", ["--lora-rank", 2])):
        out = tmp_path_factory.mktemp(name)
        assert run([*flags, "--scenes", 4, "--ema", 0, "--precision", "fp32"], out) == 0
        files[name] = out / "model" / "domain.safetensors"
    return files


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_file_is_what_was_trained(trained, name):
    """Against the checkpoint of the same run, whose names are those of the whole model."""
    pipeline = Pipeline.load(tiny.folder(), lazy=True)
    adapter = indomain.load_adapter(pipeline, trained[name])
    indomain.draw(pipeline, adapter, DrawSettings("", steps=1))
    checkpoint = read_weights(trained[name].parents[1] / "checkpoints" / "step-000002" / "model.safetensors")
    found = adapter.domain.state_dict()
    assert len(checkpoint) > 50
    for key, tensor in checkpoint.items():
        if not key.endswith(".factor"):  # it follows from the rank
            torch.testing.assert_close(found[key.removeprefix("domain.")], tensor, rtol=1e-3, atol=1e-4)
    assert sum(param.numel() for param in adapter.domain.parameters()) > 10**4
    if name == "lora":
        assert trained["lora"].stat().st_size < 0.3 * trained["full"].stat().st_size
        assert any(tensor.abs().max() > 0 for key, tensor in checkpoint.items() if "lora_B" in key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_frozen_model_takes_a_domain(trained, name):
    """What the file must hold does not depend on whether the model's own weights may train."""
    pipeline = Pipeline.load(tiny.folder()).requires_grad_(False)
    adapter = indomain.load_adapter(pipeline, trained[name])
    domain = indomain.build_domain(pipeline, adapter)
    own = domain.own_state_dict()
    assert own.keys() == read_weights(trained[name]).keys()
    for key, tensor in read_weights(trained[name]).items():
        torch.testing.assert_close(own[key], tensor.to(own[key].dtype), rtol=0, atol=0)
    shared = set(domain.state_dict()) - set(own)
    assert bool(shared) == (name == "lora")
    for key in shared:
        assert domain.get_parameter(key) is pipeline.get_parameter(key)


# The command line ---------------------------------------------------------------------------------

def run_sample(*flags) -> int:
    return sample.main(["--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", "--dtype", "fp32",
                        *map(str, flags)])


def pixels(path) -> bytes:
    return open_picture(path).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_from_the_command_to_pictures(trained, name, style, tmp_path, monkeypatch):
    """Every application is one command, and gives what `draw` gives."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("start.png")
    save_part(with_controlnet().controlnet, tmp_path / "controlnet", torch.float32)
    adapter = ["--adapter", trained[name], "--n", 1]

    def expected(prompt="", options=DrawOptions(), prepare=lambda pipeline: None, task=None, **settings):
        pipeline = Pipeline.load(tiny.folder())
        prepare(pipeline)
        made = indomain.load_adapter(pipeline, trained[name])
        return indomain.draw(pipeline, made, DrawSettings(prompt, steps=2, **settings), task=task, options=options)[0].tobytes()

    commands = {  # name: (flags, the same in Python)
        "unconditional": ([], lambda: expected()),
        "text": ([PROMPT], lambda: expected(PROMPT)),
        "weights": ([PROMPT, "--domain-guidance", -1, "--control-guidance", 4], lambda: expected(PROMPT, DrawOptions(-1.0, 4.0))),
        "edit": ([PROMPT, "--image", "start.png", "--strength", 0.5],
                 lambda: expected(PROMPT, image=picture(1), strength=0.5)),
        "style by LoRA": ([PROMPT, "--lora", style], lambda: expected(PROMPT, prepare=lambda pipeline: pipeline.add_lora(style))),
        "style by model": ([PROMPT, "--control-model", tiny.folder()], lambda: expected(PROMPT)),
        "style by prompt": ([PROMPT, "--guide", "a cyan torus:2"], lambda: expected(PROMPT, DrawOptions(guide=("a cyan torus:2",)))),
        "object": ([PROMPT, "--task", "3d"], lambda: expected(PROMPT, task="3d")),
        "translation": (["--controlnet", "controlnet", "--control", "start.png"],
                        lambda: expected(control=[(picture(1), 1.0)],
                                 prepare=lambda pipeline: pipeline.add_controlnet(tmp_path / "controlnet")))}
    for case, (flags, draw) in commands.items():
        if name == "full" and case not in ("unconditional", "text"):
            continue
        out = f"{case}.png"
        assert run_sample(*flags, *adapter, "--out", out) == 0
        levels = torch.frombuffer(bytearray(pixels(out) + draw()), dtype=torch.uint8).short().view(2, -1)
        assert (levels[0] - levels[1]).abs().max() <= (case == "style by model"), case  # batches round differently
    if name == "full":
        return
    assert len({pixels(f"{case}.png") for case in commands}) >= len(commands) - 1  # the control model is the same one
    assert read_saved_settings("style by prompt.png")["guide"] == ["a cyan torus:2"]
    for case in ("unconditional", "style by prompt"):
        assert sample.main(["--from", f"{case}.png", "--device", "cpu", "--out", f"{case}-again.png"]) == 0
        assert pixels(f"{case}-again.png") == pixels(f"{case}.png")


@pytest.mark.parametrize("flags, words", [
    ("--adapter FULL --source p.png", "--source: this adapter takes none"),
    ("--adapter FULL --task edit", "--task: invalid choice: 'edit'"),
    ("--adapter FULL --task 3d --image p.png", "--task: 3d follows only prompts"),
    ("--adapter FULL --guidance 3", "--guidance: this adapter has two, domain_guidance and control_guidance"),
    ("--adapter FULL --edit p.png", "--edit: does not go with the adapter of a domain"),
    ("--adapter FULL --domain-guidance nan", "--domain-guidance: invalid float value: 'nan'"),
    ("--adapter FULL --guide fog", "--guide: 'fog': expected a prompt and its weight"),
    ("--adapter FULL --guide fog:inf", "--guide: 'fog:inf': expected a prompt and its weight"),
    ("--adapter FULL --guide :2", "--guide: ':2': expected a prompt and its weight"),
    ("--adapter FULL --control-model VELOCITY", "has other latents or another noise schedule than this model"),
    ("--adapter FULL --control-model nowhere", "nowhere: no such file or folder"),
    ("--adapter FULL --size 60x64", "--size: 60x64: width and height must be multiples of 8"),
    ("--adapter FULL --image p.png --strength 0", "--strength: choose above 0"),
    ("--adapter FULL --model SD15", "was trained for another model: "),
    ("--adapter LORA --model SD15", "was trained for another model: "),
    ("--adapter velocity.safetensors", "velocity.safetensors was trained to predict v_prediction, and this model predicts"),
    ("--adapter bare.safetensors", "bare.safetensors was trained to predict None"),
    ("--adapter less.safetensors", "less.safetensors was trained for another model: 1 tensors do not fit"),
    ("--adapter nan.safetensors", "nan.safetensors: tensor 'unet.conv_in.bias' holds NaN or infinity"),
    ("--adapter cut.safetensors", "cut.safetensors is truncated")])
def test_a_wrong_flag_is_one_sentence(flags, words, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(1).save("p.png")
    tensors = dict(read_weights(trained["full"]))
    meta = {"paper": "indomain", "prediction": "epsilon"}
    nan = tensors["unet.conv_in.bias"].clone()
    nan[0] = float("nan")
    files = {
        "velocity": (tensors, meta | {"prediction": "v_prediction"}), "bare": (tensors, {"paper": "indomain"}),
        "less": ({name: x for name, x in tensors.items() if name != "pooled"}, meta),
        "nan": (tensors | {"unet.conv_in.bias": nan}, meta)}
    for name, (content, metadata) in files.items():
        if f"{name}.safetensors" in flags:
            save_weights(content, tmp_path / f"{name}.safetensors", metadata)
    if "cut" in flags:
        (tmp_path / "cut.safetensors").write_bytes(trained["full"].read_bytes()[:-40])
    paths = {"FULL": trained["full"], "LORA": trained["lora"], "SD15": tiny.folder("sd15")}
    if "VELOCITY" in flags:
        paths["VELOCITY"] = tmp_path / "velocity"
        tiny.build("sdxl", tmp_path / "velocity", prediction_type="v_prediction")
    assert run_sample(PROMPT, *[paths.get(word, word) for word in flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("flags, words", [
    ("--domain glass", "--domain: invalid choice: 'glass'"),
    ("--lora-rank -1", "--lora-rank: must be at least 0"),
    ("--scenes 0", "--scenes: must be at least 1"),
    ("--resolution 60", "--resolution: must be a multiple of 16"),
    ("--data nowhere", "--data: nowhere: no such folder"),
    ("--data empty", "--data: empty: no usable picture; put .png or .jpg files there"),
    ("--data damaged", "--bad-images: damaged: 1 problems, listed above"),
    ("--caption dog", "--caption: no such flag"),
    ("--caption-dropout 0.1", "--caption-dropout: no such flag"),
    ("--model REFINER", "is a refiner, which no recipe trains")])
def test_what_cannot_be_trained_is_refused(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no picture")
    words_of_flags = [str(tiny.folder("refiner")) if word == "REFINER" else word for word in flags.split()]
    assert train.main(["indomain", "--model", str(tiny.folder()), "--out", "out", *words_of_flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ") and words in error


@pytest.mark.parametrize("parameter, settings, options", [
    ("domain_guidance", {}, DrawOptions(float("nan"))), ("control_guidance", {}, DrawOptions(1.0, float("inf"))),
    ("guide", {}, DrawOptions(guide=("a:nan",))), ("refiner", {"refiner": "REFINER"}, OFF),
    ("guidance_rescale", {"guidance_rescale": 0.5}, OFF), ("steps", {"steps": 0}, OFF)])
def test_what_cannot_be_drawn_is_refused(parameter, settings, options):
    if "refiner" in settings:
        settings = {"refiner": tiny.model("refiner")}
    with pytest.raises(ParameterError) as error:
        drawn(options=options, **settings)
    assert error.value.parameter == parameter and "--" not in str(error.value)


# The benchmark ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_toy_benchmark_is_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    program, report = (importlib.import_module(name) for name in ("indomain", "report"))
    model = Path(__file__).parents[1] / "weights" / "tiny"
    if not (model / "judge").exists():
        pytest.skip("weights/tiny has no judge")
    flags = ["--size", "toy", "--seeds", "1", "--model", str(model), "--out", str(tmp_path / "indomain.json"),
             "--runs", str(tmp_path / "runs"), "--only"]
    names = ("renders", "decoupled", "fine-tuned, one caption")
    for name in names:
        program.main([*flags, name])
    rows = {row["entry"]: row for row in json.loads((tmp_path / "indomain.json").read_text())["results"]}
    assert tuple(rows) == names
    renders = rows["renders"]["at"]["0"]["renders"]
    assert renders["whole"] >= 0.75 and renders["style"] < 0.4
    decoupled, tuned = rows["decoupled"]["at"], rows["fine-tuned, one caption"]["at"]
    assert list(decoupled) == list(tuned) == ["1", "2"]
    assert list(decoupled["2"]) == ["w_d 2, w_c 3", "w_d 2.5, w_c 2.5", "edit", "translation", "object"]
    assert set(decoupled["2"]["edit"]) == {"changed", "kept", "edited", "PSNR", "style"}
    assert 0 < decoupled["2"]["translation"]["edge F1"] < 1 and 0 <= decoupled["2"]["object"]["whole"] <= 1
    assert list(decoupled["1"]) == ["w_d 2, w_c 3"]
    assert rows["decoupled"]["trained"] < rows["fine-tuned, one caption"]["trained"] == 7371396
    assert 0 < tuned["1"]["predictions"]["drift"] < tuned["2"]["predictions"]["drift"] < 0.1
    assert 0 <= tuned["1"]["predictions"]["forgotten"] < 0.05
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert any(line.startswith("| decoupled | 2 | w_d 2, w_c 3 | 1 |") for line in report.in_domain())
    capsys.readouterr()
    monkeypatch.setattr(program, "measure", lambda *given: pytest.fail("measured again"))
    program.main([*flags, "decoupled"])
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_the_benchmark_draws_as_draw_does(monkeypatch):
    """A row for each prompt: the pictures of `draw`, one at a time."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    program = importlib.import_module("indomain")
    made = program.Made(tiny.model(), tiny.model(), domain_of())
    prompts = [PROMPT, NEGATIVE]
    images = program.draw(made, program.decoupled(2, 3), prompts, seed=5, steps=2)
    ordinary = program.draw(made, program.ordinary(5), prompts, seed=5, steps=2)
    for i, prompt in enumerate(prompts):
        settings = DrawSettings(prompt, seed=5 + i, steps=2, sampler="euler")
        one, = indomain.draw(tiny.model(), Adapter(domain=domain_of()), settings)
        assert (images[i] - to_tensor(one)).abs().mean() < 0.02
        usual, = tiny.model().generate(prompt, seed=5 + i, steps=2, sampler="euler")
        assert (ordinary[i] - to_tensor(usual)).abs().mean() < 0.02 < (ordinary[i] - images[i]).abs().mean()
