"""ONE-PIC: the identities that hold before any training, its batches, and how it draws."""

import json
import shutil
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
import tiny
import torch

import sample
import train
from minipic.common import InputError, ParameterError, rng
from minipic.diffusion.schedule import Schedule
from minipic.image import (
    mask_to_tensor, open_mask, open_picture, read_saved_settings, resize_and_crop, save_new, to_pictures, to_tensor)
from minipic.layers import lora
from minipic.models.unet import SDXL_BASE, UNet
from minipic.papers import find_adapter, onepic
from minipic.pipeline import DrawSettings, Pipeline
from minipic.weights import read_weights, save_lora, save_weights
from minipic.weights.files import read_header
from minipic.world.tasks import TASKS
from tiny import PROMPT, mask, picture

TRAINED_AS = {visible: onepic.TrainedAs(visible, "two panels: another view | {text}", (64, 64))
              for visible in ("clean", "noised")}  # side by side
GREY = onepic.GREY / 127.5 - 1


def config_of(**settings) -> onepic.Settings:
    defaults = dict(model=str(tiny.folder()), precision="fp32", scenes=6, caption_dropout=0.0, layout="side")
    return onepic.Settings(**(defaults | settings))


@torch.no_grad()
def mean_latent(pipeline: Pipeline, images: torch.Tensor) -> torch.Tensor:
    """images [B,3,H,W] -> the means of their latents, scaled [B,4,h,w]."""
    mean, _ = pipeline.vae.encode(images)
    return pipeline.vae.scale(mean)


def without_variance(pipeline: Pipeline) -> Pipeline:
    """The same, but x0 of its training data is the mean itself."""
    pipeline.vae.quant_conv.weight.data[4:] = 0
    pipeline.vae.quant_conv.bias.data[4:] = -30
    return pipeline


# What the UNet sees, and what counts --------------------------------------------------------------

def canvases():
    """x, known, noise [3,4,4,8], the mask of the right half [3,1,4,8] and timesteps [3]."""
    x, known, noise = (peers.numbers((3, 4, 4, 8), seed).float() for seed in (1, 2, 3))
    right = torch.arange(8).ge(4).expand(3, 1, 4, 8)
    return x, known, noise, right, torch.tensor([1, 500, 999])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_given_is_seen_clean_or_as_noisy_as_the_rest(prediction):
    objective = Schedule(prediction_type=prediction).objective
    x, known, noise, right, t = canvases()
    for visible in TRAINED_AS:  # all masked: an ordinary sample
        view = onepic.network_view(x, t, known, noise, torch.ones_like(right), visible, objective)
        assert torch.equal(view, x)
    for other in (noise, -noise):  # clean: bit for bit, whatever the noise and the time
        view = onepic.network_view(x, t, known, other, right, "clean", objective)
        assert torch.equal(view[..., :4], known[..., :4]) and torch.equal(view[..., 4:], x[..., 4:])

    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    abar = (1 - beta).cumprod(0)
    share = abar[t].view(-1, 1, 1, 1)
    noised = share.sqrt() * known + (1 - share).sqrt() * noise
    view = onepic.network_view(x, t, known, noise, right, "noised", objective)
    assert torch.allclose(view[..., :4], noised[..., :4], atol=1e-5) and torch.equal(view[..., 4:], x[..., 4:])
    # In drawing t is a scalar.
    view = onepic.network_view(x[:1], t[1], known[:1], noise[:1], right[:1], "noised", objective)
    noised = abar[500].sqrt() * known[:1] + (1 - abar[500]).sqrt() * noise[:1]
    assert torch.allclose(view[..., :4], noised[..., :4], atol=1e-5)


def test_the_masked_loss_is_the_mean_inside_and_has_no_gradient_outside():
    x0, answer, noise, right, t = canvases()
    objective = tiny.model().schedule.objective
    answer.requires_grad_()

    def loss(where):
        return objective.loss(lambda x, t: answer, x0, noise, t, where=where)

    inside, outside, everywhere = loss(right), loss(~right), loss(None)
    assert torch.allclose(inside, (answer - noise)[..., 4:].square().flatten(1).mean(1))
    assert torch.allclose(everywhere, (inside + outside) / 2)  # both halves have as many numbers
    assert torch.allclose(loss(torch.ones_like(right)), everywhere)
    gradient, = torch.autograd.grad(inside.sum(), answer)
    assert (gradient[..., :4] == 0).all() and (gradient[..., 4:] != 0).all()


@pytest.mark.parametrize("visible", TRAINED_AS)
def test_noise_of_the_given_half_reaches_the_loss_only_if_it_is_seen(visible):
    config = config_of(visible=visible)
    pipeline = onepic.build(config)
    onepic.setup(pipeline, config)
    batch = onepic.data(pipeline, config).batch(0, range(2))
    other = batch | {"noise": torch.where(batch["mask"], batch["noise"], -batch["noise"])}
    is_same = torch.equal(onepic.loss(pipeline, batch, config), onepic.loss(pipeline, other, config))
    assert is_same == (visible == "clean")


# Batches ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["edit", "wear"])
def test_batches_are_the_worlds_pairs_side_by_side(task):
    config = config_of(task=task)
    pipeline = without_variance(onepic.build(config))
    batch = onepic.data(pipeline, config).batch(0, range(5))
    pairs = TASKS[task](0, range(6))
    rows = batch["rows"]
    given = {"edit": "the picture before", "wear": "the garment"}[task]
    assert batch["captions"] == [f"two panels: {given} | {pairs.prompts[row]}" for row in rows]
    assert batch["size_ids"].tolist() == 5 * [[64, 128, 0, 0, 64, 128]]

    left, right = batch["known"].chunk(2, dim=3)
    first, second = batch["x0"].chunk(2, dim=3)
    close = 0.03 * batch["x0"].abs().max()  # latents are encoded and kept in 16 bits
    assert (left - mean_latent(pipeline, pairs.source[rows])).abs().max() < close
    assert torch.equal(left, first)
    assert (second - mean_latent(pipeline, pairs.target[rows])).abs().max() < close

    masked_left, masked_right = batch["mask"].chunk(2, dim=3)
    assert not masked_left.any()
    if task == "edit":
        assert masked_right.all()
    else:  # all but the garment is given
        worn = pairs.truth["mask"][rows]
        assert torch.equal(masked_right, worn[..., 2::4, 2::4]) or torch.equal(masked_right, worn[..., ::4, ::4])
        assert 0.02 < masked_right.float().mean() < 0.5
        hidden = torch.where(worn, GREY, pairs.target[rows])
        assert (right - mean_latent(pipeline, hidden)).abs().max() < close
    again = onepic.data(pipeline, config).batch(7, [3])
    assert torch.equal(again["noise"][0], batch["noise"][3]) and torch.equal(again["x0"][0], batch["x0"][3])


def test_the_answer_does_not_leak_into_what_is_given(monkeypatch):
    config = config_of(task="wear")
    pipeline, world_pairs = onepic.build(config), onepic.world_pairs

    def batch_with(change):
        """A batch of pairs whose wanted picture is changed where it is to be drawn."""
        def changed_pairs(*given):
            return [replace(pair, image=torch.where(pair.mask, change(pair.image), pair.image))
                    for pair in world_pairs(*given)]

        monkeypatch.setattr(onepic, "world_pairs", changed_pairs)
        return onepic.data(pipeline, config).batch(0, range(4))

    before, after = batch_with(lambda image: image), batch_with(lambda image: 255 - image)
    assert torch.equal(before["known"], after["known"]) and not torch.equal(before["x0"], after["x0"])

    # What would happen if both halves were encoded together: the left one depends on the right one.
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    one = mean_latent(pipeline, torch.cat([black, white], dim=3))
    other = mean_latent(pipeline, torch.cat([black, -white], dim=3))
    assert (one - other)[..., :16].abs().max() > 1e-3


@pytest.mark.slow
def test_only_the_lora_learns_and_at_first_changes_no_bit():
    config = config_of()
    pipeline = onepic.build(config)
    torch.manual_seed(0)
    params = onepic.setup(pipeline, config)
    batch = onepic.data(pipeline, config).batch(0, range(4))
    first = onepic.loss(pipeline, batch, config)
    assert torch.equal(first, onepic.loss(Pipeline.load(config.model), batch, config))
    optimizer = torch.optim.AdamW(params, 3e-3)
    for _ in range(12):
        last = onepic.loss(pipeline, batch, config)
        optimizer.zero_grad()
        last.backward()
        optimizer.step()
    assert last < 0.85 * first
    assert {id(param) for param in pipeline.parameters() if param.grad is not None} == set(map(id, params))
    widths = [len(layer.weight) + layer.weight[0].numel() for layer in lora.layers(pipeline.unet).values()]
    assert sum(param.numel() for param in params) == 32 * sum(widths)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three pairs of photos, two wide ones and a square one, with masks."""
    for kind in ("target", "source", "mask"):
        (tmp_path / kind).mkdir()
    for i, size in enumerate(((96, 48), (96, 48), (80, 80))):
        picture(i + 5).resize(size).save(tmp_path / "target" / f"{i}.png")
        picture(i).resize(size).save(tmp_path / "source" / f"{i}.png")
        mask().resize(size).save(tmp_path / "mask" / f"{i}.png")
        (tmp_path / "target" / f"{i}.txt").write_text(f"cube {i}")
    return tmp_path


@pytest.mark.parametrize("masked", [True, False])
def test_batches_of_a_folder(photos, masked):
    if not masked:
        shutil.rmtree(photos / "mask")
    config = config_of(data=str(photos), prompt="a sketch | {text}")
    pipeline = onepic.build(config)
    data = onepic.data(pipeline, config)
    assert data.trained_as == onepic.TrainedAs("clean", "a sketch | {text}", (80, 48), "side") and len(data.examples) == 3
    drawn_rows = set()
    for step in range(6):
        batch = data.batch(step, range(3 * step, 3 * step + 3))
        size = width, height = (64, 64) if 2 in batch["rows"] else (80, 48)
        assert batch["size_ids"].tolist() == 3 * [[height, 2 * width, 0, 0, height, 2 * width]]
        for k, row in enumerate(batch["rows"]):
            drawn_rows.add(row)
            assert batch["captions"][k] == f"a sketch | cube {row}"
            target, source = (to_tensor(resize_and_crop(open_picture(photos / kind / f"{row}.png"), size))
                              for kind in ("target", "source"))
            part = torch.ones(1, height, width)
            if masked:
                part = mask_to_tensor(open_mask(photos / "mask" / f"{row}.png"), size)
            hidden = torch.where(part.bool(), GREY, target)
            left, right = mean_latent(pipeline, torch.stack([source, hidden]))
            known_left, known_right = batch["known"][k].chunk(2, dim=2)
            assert (known_left - left).abs().max() < 0.05 * left.abs().max()
            assert not masked or (known_right - right).abs().max() < 0.05 * right.abs().max()
            masked_left, masked_right = batch["mask"][k].chunk(2, dim=2)
            assert not masked_left.any()
            assert torch.equal(masked_right, onepic.latent_mask(part, 4)[0].bool())
    assert drawn_rows == {0, 1, 2}


# Drawing ------------------------------------------------------------------------------------------

def drawn(
        trained_as: onepic.TrainedAs, pipeline: Pipeline | None = None, source=picture(1), sources=(), task=None,
        **settings):
    """The last latents of a drawing, and everything that the UNet saw."""
    pipeline = pipeline or tiny.model()
    settings = DrawSettings(PROMPT, **{"steps": 4, "n": 2, **settings})
    latents, inputs = [], []

    def on_step(x, x0):
        latents.append(x)

    pipeline.fetch("unet")
    forward = pipeline.unet.forward

    def watched_forward(x, *given):
        inputs.append(x)
        return forward(x, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.unet, "forward", watched_forward)
        pictures = onepic.draw(pipeline, trained_as, settings, sources or [source], task, on_step=on_step)
    assert [one.tobytes() for one in pictures] == [one.tobytes() for one in pipeline.decode(latents[-1])]
    assert len(latents) == settings.steps
    return latents[-1], inputs


@torch.no_grad()
@pytest.mark.parametrize("visible", TRAINED_AS)
def test_a_drawing_is_the_formula(visible):
    """Euler's steps with guidance, written out.

    Before every call of the UNet the given half is put in its place.
    """
    found, inputs = drawn(TRAINED_AS[visible], seed=3)
    pipeline = tiny.model()
    cond, uncond = pipeline.encode(f"two panels: another view | {PROMPT}")
    context = torch.cat([uncond.context, uncond.context, cond.context, cond.context])
    pooled = torch.cat([uncond.pooled, uncond.pooled, cond.pooled, cond.pooled])
    ids = torch.tensor([[64.0, 128, 0, 0, 64, 128]] * 4)
    z0 = mean_latent(pipeline, to_tensor(picture(1))[None])
    grid = pipeline.schedule.grid(4)
    start = [torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3 + i)) for i in (0, 1)]
    noise = [torch.randn(4, 16, 32, generator=rng(3 + i, "given")) for i in (0, 1)]
    x = grid.start * torch.stack(start)
    noise = torch.stack(noise)[..., :16]
    for i, (sigma, lower) in enumerate(zip(grid.sigmas, grid.sigmas[1:])):
        view = x / (sigma**2 + 1) ** 0.5
        view[..., :16] = z0 if visible == "clean" else (z0 + sigma * noise) / (sigma**2 + 1) ** 0.5
        assert torch.allclose(inputs[i], torch.cat([view, view]), atol=1e-5)
        assert visible == "noised" or torch.equal(inputs[i][:1, :, :, :16], z0)
        prediction = pipeline.unet(torch.cat([view, view]), grid.timesteps[i], context, pooled, ids)
        without_text, with_text = prediction.chunk(2)
        x = x + (lower - sigma) * (without_text + 5 * (with_text - without_text))
    assert len(inputs) == 4 and torch.allclose(found, x[..., 16:], atol=1e-4)


def test_what_is_given_of_the_wanted_half_comes_out_bit_for_bit():
    pipeline, wanted = tiny.model(), picture(2)
    part = mask_to_tensor(mask(), (64, 64))
    known = mean_latent(pipeline, torch.where(part.bool(), GREY, to_tensor(wanted))[None]).expand(2, -1, -1, -1)
    is_drawn = onepic.latent_mask(part, 4).bool().expand(2, 4, -1, -1)
    found, inputs = drawn(TRAINED_AS["clean"], image=wanted, mask=mask())
    assert torch.equal(found[~is_drawn], known[~is_drawn]) and 0 < is_drawn.float().mean() < 1
    assert torch.equal(inputs[-1][:2, :, :, 16:][~is_drawn], found[~is_drawn])
    black = to_pictures(-torch.ones(1, 3, 64, 64))[0]
    for trained_as in TRAINED_AS.values():  # nothing to draw
        with pytest.raises(ParameterError, match="mask: hardly anything of it is white"):
            drawn(trained_as, steps=2, image=wanted, mask=black)
    assert not pipeline.unet._forward_pre_hooks


def test_the_source_matters_and_rows_do_not_mix():
    trained_as = TRAINED_AS["clean"]
    first, _ = drawn(trained_as)
    other, _ = drawn(trained_as, source=picture(2))
    alone, _ = drawn(trained_as, n=1, seed=1)
    for visible in TRAINED_AS.values():
        wrapped, _ = drawn(visible, steps=2, seed=2**64 - 1)
        zero, _ = drawn(visible, n=1, seed=0, steps=2)
        assert torch.allclose(wrapped[1:], zero, atol=1e-4)  # after the largest seed comes 0
    lazy, _ = drawn(trained_as, Pipeline.load(tiny.folder(), lazy=True))
    assert not torch.equal(first, other)
    assert torch.allclose(first[1:], alone, atol=1e-4)
    assert torch.equal(lazy, first)


def test_a_source_of_another_shape_is_cut_and_that_is_said():
    with pytest.warns(UserWarning, match="the source of 64x48 pixels has another shape than the 64x64"):
        drawn(TRAINED_AS["clean"], steps=1, source=picture(1).resize((64, 48)))


def test_a_network_on_disk_is_drawn_with_too():
    """Without anything that reads the UNet before `draw` does."""
    settings = DrawSettings(PROMPT, steps=2)
    lazy = Pipeline.load(tiny.folder(), lazy=True)
    one, = onepic.draw(lazy, TRAINED_AS["clean"], settings, [picture(1)])
    other, = onepic.draw(tiny.model(), TRAINED_AS["clean"], settings, [picture(1)])
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("parameter, settings, more", [
    ("source", {}, {"sources": []}), ("source", {}, {"sources": [picture(1), picture(2)]}),
    ("task", {}, {"task": "edit"}), ("image", {"image": picture()}, {}), ("mask", {"mask": mask()}, {}),
    ("refiner", {"refiner": tiny.model("refiner")}, {}), ("control", {"control": [(picture(), 1.0)]}, {}),
    ("edit", {"edit": picture()}, {}), ("size", {"size": (60, 64)}, {}), ("steps", {"steps": 0}, {})])
def test_what_cannot_be_drawn_is_refused(parameter, settings, more):
    given = {"sources": [picture(1)], **more}
    with pytest.raises(ParameterError) as error:
        onepic.draw(tiny.model(), TRAINED_AS["clean"], DrawSettings(PROMPT, **settings), **given)
    assert error.value.parameter == parameter and "--" not in str(error.value)


# Interlaced, and several tasks -------------------------------------------------------------------

def test_an_interlaced_canvas_has_what_corresponds_side_by_side():
    given, wanted = peers.numbers((2, 4, 3, 5), 1), peers.numbers((2, 4, 3, 5), 2)
    canvas = onepic.join(given[:, None], wanted, "interlaced")
    assert canvas.shape == (2, 4, 3, 10)
    assert torch.equal(canvas[..., ::2], given) and torch.equal(canvas[..., 1::2], wanted)
    side = onepic.join(given[:, None], wanted, "side")
    assert torch.equal(side[..., :5], given) and torch.equal(side[..., 5:], wanted)
    for layout, whole in (("interlaced", canvas), ("side", side)):
        assert torch.equal(onepic.wanted_panel(whole, 1, layout), wanted)


@pytest.mark.parametrize("visible", TRAINED_AS)
def test_an_interlaced_drawing_shows_the_unet_the_given_columns(visible):
    trained_as = replace(TRAINED_AS[visible], layout="interlaced")
    pipeline = tiny.model()
    found, inputs = drawn(trained_as, seed=3)
    z0 = mean_latent(pipeline, to_tensor(picture(1))[None])
    noise = [torch.randn(4, 16, 32, generator=rng(3 + i, "given")) for i in (0, 1)]
    sigmas = pipeline.schedule.grid(4).sigmas
    for sigma, view in zip(sigmas, inputs):
        expected = z0.expand(2, -1, -1, -1)
        if visible == "noised":
            expected = (z0 + sigma * torch.stack(noise)[..., ::2]) / (sigma**2 + 1) ** 0.5
        assert torch.allclose(view[:2, :, :, ::2], expected, atol=1e-5)
    assert found.shape == (2, 4, 16, 16)
    other, _ = drawn(replace(trained_as, layout="side"), seed=3)
    assert not torch.allclose(found, other, atol=1e-2)


def test_two_tasks_share_the_scenes_and_the_prompt_tells_them_apart():
    config = config_of(task="edges,wear", layout="interlaced", scenes=5)
    pipeline = onepic.build(config)
    data = onepic.data(pipeline, config)
    assert data.trained_as.tasks == ("edges", "wear") and "{given}" in data.trained_as.prompt
    texts = {row: caption for step in range(8) for batch in [data.batch(step, range(6 * step, 6 * step + 6))]
             for row, caption in zip(batch["rows"], batch["captions"])}
    edges, wear = TASKS["edges"](0, range(2)), TASKS["wear"](0, range(2, 5))
    expected = [f"two panels: its edges | {text}" for text in edges.prompts]
    expected += [f"two panels: the garment | {text}" for text in wear.prompts]
    assert texts == dict(enumerate(expected))
    masks = [mask.float().mean() for mask in data.masks]
    assert masks[:2] == [1, 1] and all(0 < share < 0.5 for share in masks[2:])
    worn = torch.where(wear.truth["mask"], GREY, wear.target)
    for i, one in enumerate(mean_latent(pipeline, worn)):
        assert (data.hidden[2 + i] - one).abs().max() < 0.05 * one.abs().max()


def test_the_task_of_several_is_asked_for_and_changes_the_prompt(monkeypatch):
    several = onepic.TrainedAs("clean", "two panels: {given} | {text}", (64, 64), "interlaced", ("edges", "depth"))
    assert onepic.prompt_for(several, "a cube", "depth") == "two panels: its depth | a cube"
    pipeline, prompts = tiny.model(), []
    prepare = pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda settings: prompts.append(settings.prompt) or prepare(settings))
    onepic.draw(pipeline, several, DrawSettings("a cube", steps=1), [picture(1)], "edges")
    assert prompts == ["two panels: its edges | a cube"]
    for task, message in ((None, "several; choose one of edges, depth"), ("edit", "not trained for 'edit'; choose")):
        with pytest.raises(ParameterError, match=message):
            onepic.draw(pipeline, several, DrawSettings("a cube"), [picture(1)], task)


# Guidance by the source ---------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("layout", onepic.LAYOUTS)
@pytest.mark.parametrize("visible", TRAINED_AS)
@pytest.mark.parametrize("guidance, image_guidance", [(5.0, 1.5), (1.0, 2.0), (3.0, 3.0)])
def test_two_guidances_are_instruct_pix2pix_equation_3(visible, layout, guidance, image_guidance):
    """Two steps of Euler's, written out with three calls of the UNet for each."""
    trained_as = replace(TRAINED_AS[visible], layout=layout, source_dropout=True)
    settings = dict(n=1, steps=2, seed=3, guidance=guidance, image_guidance=image_guidance)
    found, inputs = drawn(trained_as, **settings)
    pipeline = tiny.model()
    cond, uncond = pipeline.encode(f"two panels: another view | {PROMPT}")
    ids = torch.tensor([[64.0, 128, 0, 0, 64, 128]])
    z0 = mean_latent(pipeline, to_tensor(picture(1))[None])
    noise = torch.randn(4, 16, 32, generator=rng(3, "given"))
    is_given = torch.arange(32).lt(16) if layout == "side" else torch.arange(32) % 2 == 0
    grid = pipeline.schedule.grid(2)
    x = grid.start * torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))[None]
    for i, (sigma, lower) in enumerate(zip(grid.sigmas, grid.sigmas[1:])):

        def answer(known, text):
            view = x / (sigma**2 + 1) ** 0.5
            view[..., is_given] = known
            if visible == "noised":
                view[..., is_given] = (known + sigma * noise[..., is_given]) / (sigma**2 + 1) ** 0.5
            return pipeline.unet(view, grid.timesteps[i], text.context, text.pooled, ids)

        neither, source, both = answer(0 * z0, uncond), answer(z0, uncond), answer(z0, cond)
        assert (source - neither).abs().max() > 0.01 and (both - source).abs().max() > 0.01
        prediction = neither + image_guidance * (source - neither) + guidance * (both - source)
        x = x + (lower - sigma) * prediction
        assert len(inputs[i]) == 3
        assert torch.equal(inputs[i][1], inputs[i][2])
        assert visible == "noised" or not inputs[i][0][..., is_given].any()
    assert torch.allclose(found, x[..., ~is_given], atol=1e-4)


@pytest.mark.parametrize("visible", TRAINED_AS)
def test_guidances_of_1_change_nothing(visible):
    plain, dropped = TRAINED_AS[visible], replace(TRAINED_AS[visible], source_dropout=True)
    expected, inputs = drawn(plain, steps=2)
    found, same_inputs = drawn(dropped, steps=2, image_guidance=1.0)
    assert torch.equal(found, expected) and len(same_inputs[0]) == len(inputs[0]) == 4
    expected, inputs = drawn(plain, steps=2, guidance=1.0)
    found, same_inputs = drawn(dropped, steps=2, guidance=1.0, image_guidance=1.0)
    assert torch.equal(found, expected) and len(same_inputs[0]) == len(inputs[0]) == 2
    # Where both are equal, the prediction with the source alone has no weight.
    assert not torch.equal(drawn(dropped, steps=2)[0], drawn(plain, steps=2)[0])
    with pytest.raises(ParameterError, match="image_guidance: .*trained without source_dropout"):
        drawn(plain, steps=2, image_guidance=2.0)


def test_sources_are_left_out_alone_with_the_caption_and_not_at_all():
    config = config_of(source_dropout=True, caption_dropout=0.4, scenes=4)
    data = onepic.data(onepic.build(config), config)
    batch = data.batch(0, range(1500))
    without = {"known": None, "x0": None}
    for name in without:
        left, right = batch[name].chunk(2, dim=3)
        without[name] = (left == 0).flatten(1).all(dim=1)
        assert (right != 0).flatten(1).any(dim=1).all()
    assert torch.equal(without["known"], without["x0"])
    no_caption = torch.tensor([caption in (None, "") for caption in batch["captions"]])
    no_source = without["known"]
    for share in (no_source & ~no_caption, no_source & no_caption, no_caption & ~no_source):
        assert abs(share.float().mean() - 0.2) < 0.03
    assert not (onepic.data(onepic.build(config_of()), config_of()).batch(0, range(99))["known"] == 0).all(3).any()


# Several given pictures ---------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 3])
def test_canvases_of_several_given_pictures(count):
    given, wanted = peers.numbers((2, count, 4, 3, 5), 1), peers.numbers((2, 4, 3, 5), 2)
    canvas = onepic.join(given, wanted, "interlaced")
    assert canvas.shape == (2, 4, 3, 5 * (count + 1))
    for k in range(count):
        assert torch.equal(canvas[..., k::count + 1], given[:, k])
    assert torch.equal(onepic.wanted_panel(canvas, count, "interlaced"), wanted)
    assert onepic.canvas_size((3, 5), count, "interlaced") == canvas.shape[2:]

    filled = torch.stack([onepic.fill_canvas(one, "side") for one in given])
    canvas = onepic.join(filled, wanted, "side")
    assert canvas.shape == (2, 4, 3 if count == 1 else 6, 10)
    assert onepic.canvas_size((3, 5), filled.shape[1], "side") == canvas.shape[2:]
    places = [canvas[..., :3, :5], canvas[..., :3, 5:], canvas[..., 3:, :5], canvas[..., 3:, 5:]]
    for k in range(count):
        assert torch.equal(places[k], given[:, k])
    assert torch.equal(places[1 if count == 1 else 3], wanted)
    assert count != 2 or not places[2].any()
    for places in (count, filled.shape[1]):
        assert torch.equal(onepic.wanted_panel(canvas, places, "side"), wanted)


@pytest.mark.parametrize("layout", ["side", pytest.param("interlaced", marks=pytest.mark.slow)])
def test_batches_of_a_subject_have_its_references(layout):
    config = config_of(task="subject,edges", references=3, scenes=14, layout=layout)
    pipeline = onepic.build(config)
    data = onepic.data(pipeline, config)
    assert data.trained_as.sources == (1, 2, 3)
    expected = []  # given pictures, wanted one
    for references, numbers in ((1, range(2)), (2, range(2, 4)), (3, range(4, 7))):
        batch = TASKS["subject"](0, numbers, references=references)
        expected += list(zip(batch.truth["references"], batch.target))
    batch = TASKS["edges"](0, range(7, 14))
    expected += list(zip(batch.source[:, None], batch.target))

    rows_seen = set()
    for step in range(24):
        batch = data.batch(step, range(6 * step, 6 * step + 6))
        assert batch["mask"].sum() == 6 * 16 * 16
        for k, row in enumerate(batch["rows"]):
            rows_seen.add(row)
            given = mean_latent(pipeline, expected[row][0])
            count = len(given)
            height, width = 64, 64 * (count + 1)
            if layout == "side":
                height, width = (64, 128) if count == 1 else (128, 128)
                given = onepic.fill_canvas(given, layout)
            assert batch["size_ids"][k].tolist() == [height, width, 0, 0, height, width]
            assert batch["x0"][k].shape == (4, height // 4, width // 4)
            assert onepic.wanted_panel(batch["mask"], len(given), layout).all()
            canvas = onepic.join(given[None], torch.zeros_like(given[:1]), layout)[0]
            is_given = ~batch["mask"][k].expand(4, -1, -1)
            assert (batch["known"][k] - canvas)[is_given].abs().max() < 0.05 * canvas.abs().max()
    assert len(rows_seen) == 14


def test_a_drawing_beside_several_pictures_shows_the_unet_all_of_them():
    pipeline = tiny.model()
    sources = [picture(k) for k in (1, 2, 3)]
    z0 = mean_latent(pipeline, torch.stack([to_tensor(source) for source in sources]))
    zero = torch.zeros_like(z0[0])
    for layout, count in product(onepic.LAYOUTS, (2, 3)):
        trained_as = replace(TRAINED_AS["clean"], layout=layout, sources=(2, 3))
        found, (view, *_) = drawn(trained_as, sources=sources[:count], steps=2, n=1)
        view = view[0]
        assert found.shape == (1, 4, 16, 16)
        if layout == "interlaced":
            assert view.shape == (4, 16, 16 * (count + 1))
            panels = [view[..., k::count + 1] for k in range(count)]
        else:
            assert view.shape == (4, 32, 32)
            panels = [view[:, :16, :16], view[:, :16, 16:], view[:, 16:, :16]]
        for panel, expected in zip(panels, [*z0[:count], zero]):
            assert torch.allclose(panel, expected, atol=1e-5)
    with pytest.raises(ParameterError, match="source: this adapter draws beside 2 or 3 given pictures, not 1"):
        drawn(trained_as)
    several = replace(trained_as, prompt="{given} | {text}", tasks=("edges", "subject"), sources=(1, 2))
    with pytest.raises(ParameterError, match="source: this adapter draws beside one given picture, not 2"):
        drawn(several, sources=sources[:2], task="edges")
    drawn(several, sources=sources[:2], task="subject", steps=1)


def test_a_folder_with_a_second_source(photos):
    shutil.copytree(photos / "target", photos / "source2")
    config = config_of(data=str(photos), prompt="a sketch | {text}", layout="interlaced")
    pipeline = onepic.build(config)
    data = onepic.data(pipeline, config)
    assert data.trained_as.sources == (2,)
    batch = data.batch(0, range(3))
    _, height, width = data.given[batch["rows"][0]][0].shape
    assert batch["x0"].shape == (3, 4, height, 3 * width)
    second = batch["known"][..., 1::3]
    for k, row in enumerate(batch["rows"]):
        image = open_picture(photos / "target" / f"{row}.png")
        latent = mean_latent(pipeline, to_tensor(resize_and_crop(image, (4 * width, 4 * height)))[None])[0]
        assert (second[k] - latent).abs().max() < 0.05 * latent.abs().max()


# Pictures to maps, and the layers that learn ------------------------------------------------------

@pytest.mark.parametrize("name", onepic.MAPS)
def test_a_map_is_read_out_of_a_picture(name):
    config = config_of(task=f"image2{name}", scenes=3)
    pipeline = without_variance(onepic.build(config))
    batch = onepic.data(pipeline, config).batch(0, range(4))
    pairs = TASKS[name](0, range(3))
    rows = batch["rows"]
    words = {"edges": "its edges", "depth": "its depth", "normals": "its normals"}
    legends = {"segmentation": "its parts in colours: ", "boxes": "boxes around its objects: "}
    texts = [words[name] if name in words else legends[name] + pairs.prompts[row] for row in rows]
    assert batch["captions"] == [f"two panels: a picture | {text}" for text in texts]
    close = 0.05 * batch["x0"].abs().max()
    left, right = batch["x0"].chunk(2, dim=3)
    assert (left - mean_latent(pipeline, pairs.target[rows])).abs().max() < close
    assert (right - mean_latent(pipeline, pairs.source[rows])).abs().max() < close
    assert batch["mask"].chunk(2, dim=3)[1].all()


RESNETS = {  # of SDXL: (channels in, channels out): how many
    (320, 320): 2, (320, 640): 1, (640, 640): 1, (640, 1280): 1, (1280, 1280): 3, (2560, 1280): 2, (1920, 1280): 1,
    (1920, 640): 1, (1280, 640): 1, (960, 640): 1, (960, 320): 1, (640, 320): 2}


@pytest.mark.slow
def test_weights_to_train_in_sdxl():
    """46.4 million of attention and 98.4 of all blocks, at rank 32: a layer has rank * (kernel * in + out)."""
    widths = 10 * [640] + 60 * [1280]  # of the transformer blocks
    attention = sum(14 * c + 2 * 2048 for c in widths)
    blocks = attention + sum(14 * c for c in widths)  # feed-forward: c to 8c, 4c to c
    blocks += 4 * (5 * 640 + 6 * 1280)  # into and out of each transformer
    blocks += 10 * (320 + 640 + 640 + 1280)  # halving and doubling
    for (before, after), number in RESNETS.items():
        shortcut = before + after if before != after else 0
        blocks += number * (9 * before + after + 10 * after + 1280 + after + shortcut)
    assert (32 * attention, 32 * blocks) == (46_448_640, 98_375_680)
    for layers, count in (("attention", attention), ("blocks", blocks)):
        with torch.device("meta"):
            pipeline = SimpleNamespace(unet=UNet(SDXL_BASE))
            params = onepic.setup(pipeline, onepic.Settings(lora_layers=layers))
        assert sum(param.numel() for param in params) == 32 * count


# The recipe and the command line ------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of two steps of training."""
    out = tmp_path_factory.mktemp("onepic")
    flags = ["--task", "edit", "--model", str(tiny.folder()), "--scenes", "4", "--batch", "2", "--steps", "2",
             "--lora-rank", "4", "--lr", "0.01", "--warmup", "0", "--out", str(out)]
    with tiny.short_drawings():
        assert train.main(["onepic", *flags, "--gradient-checkpointing"]) == 0
    return out


def pixels(path) -> bytes:
    return open_picture(path).tobytes()


@pytest.mark.slow
def test_from_the_command_to_a_picture(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (trained / "samples" / "step-000002.png").exists()
    file, example = trained / "model" / "lora.safetensors", trained / "model" / "example.png"
    trained_as = onepic.TrainedAs("clean", "two panels: the picture before | {text}", (64, 64), "interlaced", ("edit",))
    assert onepic.read_trained_as(file) == trained_as
    assert (to_tensor(open_picture(example)) - TASKS["edit"](0, [4]).source[0]).abs().max() < 0.01

    def run(*flags):
        flags = ["--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", "--dtype", "fp32", *flags]
        return sample.main([PROMPT, *flags, "--source", str(example)])

    pipeline = Pipeline.load(tiny.folder())
    assert onepic.load_adapter(pipeline, file) == trained_as
    settings = DrawSettings(PROMPT, steps=2)
    expected, = onepic.draw(pipeline, trained_as, settings, [open_picture(example)])
    assert expected.size == (64, 64)
    assert run("--adapter", str(file), "--n", "1", "--out", "drawn.png") == 0
    assert pixels("drawn.png") == expected.tobytes()
    assert run("--adapter", str(trained / "model"), "--n", "1", "--out", "by-folder.png") == 0
    assert pixels("by-folder.png") == expected.tobytes()
    assert read_saved_settings("drawn.png")["source"] == [str(example)]
    assert sample.main(["--from", "drawn.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert pixels("again.png") == expected.tobytes()

    # A picture from before there was --adapter: the first LoRA was the adapter.
    settings_then = {**read_saved_settings("drawn.png"), "source": str(example), "lora": [str(file)]}
    del settings_then["adapter"]
    save_new(picture(1), "old.png", settings_then)
    assert sample.main(["--from", "old.png", "--device", "cpu", "--out", "old again.png"]) == 0
    assert pixels("old again.png") == expected.tobytes()
    # Its scale is gone, which is said; a folder or a file, with or without a scale.
    for number, (scale, is_said) in enumerate({"": False, ":1.0": False, ":0.8": True}.items()):
        save_new(picture(1), f"scaled {number}.png", settings_then | {"lora": [f"{file}{scale}"]})
        capsys.readouterr()
        assert sample.main(["--from", f"scaled {number}.png", "--device", "cpu", "--out", f"drawn {number}.png"]) == 0
        assert ("at a scale of 0.8, and an adapter has none" in capsys.readouterr().err) == is_said
        assert pixels(f"drawn {number}.png") == expected.tobytes()

    pipeline.set_lora_scale(file, 0.5)
    weaker, = onepic.draw(pipeline, trained_as, settings, [open_picture(example)])
    assert weaker.tobytes() != expected.tobytes()
    pipeline.set_lora_scale(file, 1.0)

    picture(2).save("figure.png")
    mask().save("part.png")
    assert run("--adapter", str(file), "--n", "1", "--image", "figure.png", "--mask", "part.png",
               "--out", "worn.png") == 0
    settings = replace(settings, image=picture(2), mask=mask())
    expected, = onepic.draw(pipeline, trained_as, settings, [open_picture(example)])
    assert pixels("worn.png") == expected.tobytes()
    assert run("--adapter", str(file), "--n", "3", "--out", "three.png") == 0
    assert open_picture("three-grid.png").size[0] > 3 * 64


def test_training_is_kept_in_the_file(trained):
    file = trained / "model" / "lora.safetensors"
    _, metadata = read_header(file)
    assert metadata["paper"] == "onepic"
    assert json.loads(metadata["onepic"]) == asdict(onepic.read_trained_as(file)) | {
        "size": [64, 64], "tasks": ["edit"], "sources": [1]}
    tensors = read_weights(file)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def untrained() -> dict:
    """The LoRA before any training, as `save_lora` takes it."""
    pipeline = onepic.build(config_of())
    onepic.setup(pipeline, config_of())
    return {"unet": lora.lora_state_dict(pipeline.unet)}


def test_the_help_of_an_adapter_lists_its_tasks(untrained, tmp_path, capsys):
    trained_as = onepic.TrainedAs("clean", "{given} | {text}", (64, 64), tasks=tuple(onepic.GIVEN)[:6])
    metadata = {"paper": "onepic", "onepic": json.dumps(asdict(trained_as))}
    save_lora(untrained, tmp_path / "several.safetensors", metadata)
    with pytest.raises(SystemExit):
        sample.main(["--adapter", str(tmp_path / "several.safetensors"), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ("--task NAME what --adapter should do, if it can do several things: edges, depth, normals, segmentation, "
            "boxes, blur SDXL's sizes:") in text


DAMAGED = {  # file: the metadata of ONE-PIC, as text or as changes
    "bent": "{", "list": "[3]", "three": {"size": [64, 64, 64]}, "words": {"size": "64x64"}, "dim": {"visible": "dim"},
    "number": {"prompt": 3}, "new": {"glow": 3}, "less": "{}"}


@pytest.mark.parametrize("flags, words", [
    ("--source p.png", "--source: needs --adapter"),
    ("--adapter ADAPTER", "--source: this adapter draws beside one given picture, not 0"),
    ("--source p.png --source p.png --adapter ADAPTER", "--source: this adapter draws beside one given picture, not 2"),
    ("--source nowhere.png --adapter ADAPTER", "nowhere.png: no such picture"),
    ("--source p.png --adapter ADAPTER --task blur", "--task: invalid choice: 'blur' (choose from"),
    ("--source p.png --adapter ADAPTER --refiner REFINER", "--refiner: does not go with an adapter that draws beside"),
    ("--source p.png --adapter ADAPTER --edit p.png", "--edit: does not go with an adapter that draws beside"),
    ("--source p.png --adapter ADAPTER --image p.png", "--image: needs a mask, black where the image is given"),
    ("--source p.png --adapter ADAPTER --mask m.png", "--mask: needs --image; without it this does nothing"),
    ("--source p.png --adapter ADAPTER --image flat.png --mask m.png", "--mask: has 64x64 pixels and the image 64x48"),
    ("--source p.png --adapter ADAPTER --size 60x64", "--size: 60x64: width and height must be multiples of 8"),
    ("--source p.png --adapter ADAPTER --lora ADAPTER", "is given twice"),
    ("--source p.png --adapter other.safetensors", "other.safetensors was made by none of the papers here"),
    ("--source p.png --adapter bent.safetensors", "bent.safetensors: its metadata does not say how it was trained"),
    ("--source p.png --adapter list.safetensors", "list.safetensors: its metadata does not say how it was trained"),
    ("--source p.png --adapter less.safetensors", "less.safetensors: its metadata does not say how it was trained"),
    ("--source p.png --adapter three.safetensors", "three.safetensors: size: (64, 64, 64) is of the wrong type"),
    ("--source p.png --adapter words.safetensors", "words.safetensors: size: '64x64' is of the wrong type"),
    ("--source p.png --adapter number.safetensors", "number.safetensors: prompt: 3 is of the wrong type"),
    ("--source p.png --adapter dim.safetensors", "dim.safetensors: visible='dim' is not supported"),
    ("--source p.png --adapter new.safetensors", "new.safetensors: unknown key 'glow' for TrainedAs")])
def test_a_wrong_flag_is_one_sentence(flags, words, trained, untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(1).save("p.png")
    mask().save("m.png")
    picture(2).crop((0, 0, 64, 48)).save("flat.png")
    for name, change in DAMAGED.items():
        if f"{name}.safetensors" in flags:
            text = change if isinstance(change, str) else json.dumps(asdict(TRAINED_AS["clean"]) | change)
            save_lora(untrained, tmp_path / f"{name}.safetensors", {"paper": "onepic", "onepic": text})
    if "other.safetensors" in flags:
        save_lora(untrained, tmp_path / "other.safetensors")
    paths = {"ADAPTER": trained / "model" / "lora.safetensors", "REFINER": tiny.folder("refiner")}
    given = [str(paths.get(word, word)) for word in flags.split()]
    assert sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and words in error


@pytest.mark.slow
def test_a_file_from_before_the_renames_is_found_and_drawn_with(trained, tmp_path):
    """It says only how it was trained: its metadata has no "paper", no layout and no tasks."""
    new, old = trained / "model" / "lora.safetensors", tmp_path / "model" / "lora.safetensors"
    told = {"visible": "clean", "prompt": "two panels: the picture before | {text}", "size": [64, 64]}
    save_weights(read_weights(new), old, {"onepic": json.dumps(told)})
    save_weights({"a": torch.zeros(2)}, tmp_path / "model" / "a.safetensors")
    pictures = []
    for path in (old, tmp_path / "model"):
        name, file = find_adapter(path)
        assert (name, file) == ("onepic", old)
        pipeline = Pipeline.load(tiny.folder())
        trained_as = onepic.load_adapter(pipeline, file)
        assert trained_as == onepic.TrainedAs("clean", told["prompt"], (64, 64))
        pictures += onepic.draw(pipeline, trained_as, DrawSettings(PROMPT, steps=2), [picture(1)])
    flags = ["--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", "--dtype", "fp32", "--n", "1"]
    picture(1).save(tmp_path / "source.png")
    flags += ["--adapter", str(old), "--source", str(tmp_path / "source.png"), "--out", str(tmp_path / "drawn.png")]
    assert sample.main([PROMPT, *flags]) == 0
    assert pictures[0].tobytes() == pictures[1].tobytes() == pixels(tmp_path / "drawn.png")


def test_another_kind_of_lora_is_named(untrained, tmp_path):
    path = tmp_path / "style.safetensors"
    save_lora(untrained, path)
    with pytest.raises(InputError, match="style.safetensors: .* was not made by train.py onepic"):
        onepic.read_trained_as(path)


@pytest.mark.slow
def test_from_ones_own_pictures_to_a_picture(photos):
    out, data = photos / "out", photos / "data"
    data.mkdir()
    for kind in ("target", "source", "mask"):
        shutil.move(photos / kind, data / kind)
    flags = ["--prompt", "a sketch | {text}", "--steps", "1", "--batch", "2", "--lora-rank", "2", "--data", str(data),
             "--model", str(tiny.folder()), "--out", str(out)]
    with tiny.short_drawings():
        assert train.main(["onepic", *flags]) == 0
    assert open_picture(out / "model" / "example.png").size == (80, 48)
    assert (out / "samples" / "step-000001.png").exists()
    flags = ["--model", str(tiny.folder()), "--adapter", str(out / "model"), "--source", str(data / "source" / "0.png"),
             "--n", "1", "--device", "cpu", "--steps", "2", "--out", str(photos / "drawn.png")]
    assert sample.main(["cube", *flags]) == 0
    assert open_picture(photos / "drawn.png").size == (80, 48)


@pytest.mark.slow
def test_a_lora_for_several_sources_from_the_command_line(tmp_path):
    flags = ["--task", "subject,image2depth", "--references", "2", "--source-dropout", "--layout", "side", "--scenes",
             "6", "--steps", "1", "--batch", "2", "--lora-rank", "2", "--lora-layers", "attention"]
    flags += ["--model", str(tiny.folder()), "--out", str(tmp_path / "run")]
    with tiny.short_drawings():
        assert train.main(["onepic", *flags]) == 0
    file = tmp_path / "run" / "model" / "lora.safetensors"
    trained_as = onepic.read_trained_as(file)
    assert trained_as.sources == (1, 2) and trained_as.source_dropout and trained_as.tasks == ("subject", "image2depth")
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for k, path in enumerate(paths):
        picture(k).save(path)
    flags = ["--model", str(tiny.folder()), "--adapter", str(file), "--device", "cpu", "--dtype", "fp32", "--steps",
             "2", "--n", "1", "--task", "subject", "--image-guidance", "2", "--out", str(tmp_path / "drawn.png")]
    assert sample.main([PROMPT, *flags, "--source", str(paths[0]), "--source", str(paths[1])]) == 0
    pipeline = Pipeline.load(tiny.folder())
    onepic.load_adapter(pipeline, file)
    settings = DrawSettings(PROMPT, steps=2, image_guidance=2.0)
    expected, = onepic.draw(pipeline, trained_as, settings, [picture(0), picture(1)], "subject")
    assert pixels(tmp_path / "drawn.png") == expected.tobytes()
    flags[flags.index("subject")] = "image2depth"
    assert sample.main(["its depth", *flags, "--source", str(paths[0]), "--source", str(paths[1])]) == 2


def no_source(path):
    (path / "source/1.png").unlink()


def no_mask(path):
    (path / "mask/2.png").unlink()


def no_target(path):
    shutil.rmtree(path / "target")


def damaged_source(path):
    (path / "source/0.png").write_bytes(b"no")


def larger_mask(path):
    mask().resize((96, 96)).save(path / "mask/0.png")


def black_mask(path):
    mask().point(lambda level: 0).resize((96, 48)).save(path / "mask/1.png")


def no_caption(path):
    (path / "target/1.txt").unlink()


@pytest.mark.parametrize("change, words", [
    (no_source, "source/ lacks 1 of 3 pictures, the first is 1"),
    (no_mask, "mask/ lacks 1 of 3 pictures, the first is 2"),
    (no_target, "target: no such folder"),
    (damaged_source, "0.png: "),
    (larger_mask, "0.png has 96x96 pixels and its picture 96x48"),
    (black_mask, "1.png: hardly anything is white"),
    (no_caption, "1 problems, listed above")])
def test_a_wrong_folder_is_refused(photos, change, words, capsys):
    change(photos)
    flags = ["--data", str(photos), "--prompt", "a sketch | {text}", "--model", str(tiny.folder()), "--steps", "1",
             "--out", str(photos.with_name("out"))]
    assert train.main(["onepic", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ") and words in error


@pytest.mark.parametrize("flags, words", [
    ("--data here", "--data: say in the prompt what is given"),
    ("--prompt two", "--prompt: two lacks {text}"),
    ("--task colours", "--task: 'colours' is unknown; choose of edges,"),
    ("--task edit,colours", "--task: 'colours' is unknown; choose of edges,"),
    ("--task edit,edges --prompt {text}", "--prompt: {text} lacks {given}, which tells several tasks apart"),
    ("--loss-on all", "--loss-on: all needs visible=noised"),
    ("--layout woven", "--layout: invalid choice: 'woven'"),
    ("--lora-rank 0", "--lora-rank: must be at least 1"),
    ("--lora-layers all", "--lora-layers: invalid choice: 'all'"),
    ("--task subject --references 4", "--references: choose 1 to 3, not 4"),
    ("--task edit --references 2", "--references: is for the task subject; a folder of data has source2/"),
    ("--source-dropout --caption-dropout 0", "--source-dropout: needs a caption_dropout above 0, up to 0.6"),
    ("--resolution 60", "--resolution: must be a multiple of 16"),
    ("--visible dim", "--visible: invalid choice: 'dim'"),
    ("--loss-on none", "--loss-on: invalid choice: 'none'")])
def test_what_cannot_be_trained_is_refused(flags, words, capsys, tmp_path):
    assert train.main(["onepic", *flags.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error
