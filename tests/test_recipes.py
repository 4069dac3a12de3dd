"""The base recipes: what they feed, what they minimise, and from nothing to a pipeline folder in a few steps each."""

import functools
import importlib
import json
import math
import shutil
from dataclasses import fields, replace
from itertools import product
from unittest import mock

import pytest
import tiny
import torch
from PIL import Image

import train
from minipic import latents
from minipic.common import ParameterError, rng
from minipic.papers import PAPERS
from minipic.pipeline import Pipeline
from minipic.recipes import clip, t2i, vae
from minipic.training.flags import from_argv
from minipic.training.settings import DenoisingSettings
from minipic.weights import read_weights
from minipic.world.caption import parse
from minipic.world.pictures import KINDS, Picture, compose, compose_counted
from minipic.world.scene import is_held_out, render
from minipic.world.tasks import TASKS

PICTURES = [compose(3, i) for i in range(400)]

# Small values of whatever settings a recipe has, and what some recipes need besides.
SMALL = {"batch": 2, "scenes": 4, "pool": 4, "vocabulary": 600, "caption_dropout": 0.5, "precision": "fp32",
         "sample_every": 0, "warmup": 0, "lr_schedule": "constant"}
PHOTOS = {
    "t2i": ("--lora-rank", "2"),
    "inversion": ("--word", "one", "--initializer-token", "cyan"),
    "dreambooth": ("--lora-rank", "2", "--caption", "a sks cube", "--class-prompt", "a cube",
                   "--num-class-images", "1"),
    "specialist": ("--lora-rank", "2", "--style", "one", "--word", "<one>")}


@pytest.fixture(scope="module", autouse=True)
def vocabularies_are_of_the_same_scenes():
    """Each is made of 2000 captions; composing their scenes once is enough."""
    with mock.patch.object(clip, "compose", functools.cache(compose)):
        yield


def first(kind):
    return next(picture for picture in PICTURES if picture.kind == kind)


def test_kinds_come_in_their_shares():
    for kind, (share, size) in KINDS.items():
        members = [picture for picture in PICTURES if picture.kind == kind]
        assert abs(len(members) / len(PICTURES) - share) < 3 * math.sqrt(share / len(PICTURES))
        assert {picture.size for picture in members} == {size}
    assert compose(3, 7) == PICTURES[7] != compose(4, 7)


def test_pictures_are_what_their_size_ids_say():
    plain, crop, panels = Picture.draw([first("plain"), first("crop"), first("panels")])
    assert torch.equal(plain, render(first("plain").scenes[0]).rgb[0])
    assert first("plain").size_ids.tolist() == [64, 64, 0, 0, 64, 64]
    top, left = first("crop").crop
    assert first("crop").size_ids.tolist() == [80, 80, top, left, 64, 64]
    assert torch.equal(crop, render(first("crop").scenes[0], (80, 80)).rgb[0][:, top:top + 64, left:left + 64])
    assert panels.shape == (3, 64, 128) and first("panels").size_ids.tolist() == [64, 128, 0, 0, 64, 128]
    assert torch.equal(panels[:, :, :64], render(first("panels").scenes[0]).rgb[0])
    small = first("small")
    assert small.size_ids.tolist() == [*small.drawn, 0, 0, 64, 64] and Picture.draw([small])[0].shape == (3, 64, 64)


def test_captions_fit_and_parse():
    for i, picture in enumerate(PICTURES):
        text = picture.caption(rng(0, i))
        parts = text.removeprefix("two panels: ").split(" | ")
        assert len(parts) == len(picture.scenes) and all(parse(part).things for part in parts)


def test_pictures_and_captions_of_old_are_what_they_were():
    """Recorded numbers and trained weights depend on them, also the few that name equal things."""
    captions = [compose(0, i).caption(rng(0, "caption", i)) for i in (0, 1, 205)]
    assert captions == [
        "a small orange cylinder and a large blue and cyan checkered sphere",
        "a medium green cone right of a tiny orange cone and right of a small red torus on a grey floor",
        "two panels: a small yellow cylinder to the left of a tiny yellow cylinder, and a medium striped cone | "
        "a picture of a small green cylinder and a white cone in the middle on a grey floor at sunset"]


def test_counted_pictures_are_another_set_of_the_same_kinds():
    pictures = [compose_counted(3, i) for i in range(60)]
    assert pictures[:3] == [compose_counted(3, i) for i in range(3)] and not set(pictures) & set(PICTURES)
    assert {picture.kind for picture in pictures} == set(KINDS)
    for i, picture in enumerate(pictures):
        parts = picture.caption(rng(3, i)).removeprefix("two panels: ").split(" | ")
        for scene, part in zip(picture.scenes, parts, strict=True):
            shapes = [o.shape for o in scene.objects]
            assert len(parse(part).things) == len(shapes) > len(set(shapes))
    assert {len(scene.objects) for i in range(9) for scene in compose_counted(3, i, objects=3).scenes} == {3}


@pytest.mark.slow
def test_vae_loss_is_its_formula_and_falls():
    config = vae.Settings(steps=30, precision="fp32")
    torch.manual_seed(0)
    model = vae.build(config)
    batch = vae.data(model, config).batch(0, range(2))
    x = batch["image"]
    mean, logvar = model.encode(x)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=rng(0, "posterior", i)) for i in range(2)])
    out = model.decode(mean + (logvar / 2).exp() * noise)
    edges = (out.diff(dim=2) - x.diff(dim=2)).abs().mean() + (out.diff(dim=3) - x.diff(dim=3)).abs().mean()
    unit = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), unit).mean()
    expected = ((out - x) ** 2).mean() + 0.1 * edges + 1e-4 * kl
    start, numbers = vae.loss(model, batch, config)
    torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(numbers["kl"], kl, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.AdamW(vae.setup(model, config), 1e-3)
    for _ in range(10):
        loss = vae.loss(model, batch, config)[0]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.9 * start


@pytest.fixture(scope="module", autouse=True)
def less_to_prepare():
    """To compose 2000 captions and to encode 256 pictures takes seconds."""
    with mock.patch.object(clip, "CAPTIONS", 100), mock.patch.object(vae, "MEASURED", 8):
        yield


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    torch.manual_seed(0)
    return clip.build(clip.Settings(out=str(tmp_path_factory.mktemp("clip")), vocabulary=600))


def test_cut_captions_pool_as_whole_ones(towers):
    captions = ["a red sphere", "a small blue cube left of a large green torus on a grey floor"]
    cut = clip.tokenize(towers.tokenizers, captions)
    assert cut["ids"].shape[1] < 77
    for name, encoder, tokenizer in zip(("ids", "ids_2"), (towers.text_encoder, towers.text_encoder_2),
                                        towers.tokenizers):
        torch.testing.assert_close(encoder(cut[name])[1], encoder(tokenizer(captions))[1], rtol=1e-5, atol=1e-5)


def test_facts_of_a_caption_are_the_answers_to_its_questions():
    facts = clip.facts_of(
        "two panels: a small red and blue striped torus left of a cube on a pink floor | a cone at night")
    said = {}
    for i, (answer, choices) in enumerate(zip(facts, 2 * clip.PANEL_QUESTIONS)):
        if answer:
            said[i] = list(choices)[answer - 1]
    assert said == {0: "red", 1: "blue", 2: "torus", 3: "small", 4: "striped", 8: "cube", 18: "left", 20: "pink",
                    22 + 2: "cone", 22 + 21: "night"}
    assert len(facts) == len(clip.ANSWERS) == 44 and not any(clip.facts_of("an object"))
    assert clip.facts_of("two red cubes and a cone") == clip.facts_of("a red cube, a red cube and a cone")


def test_clip_learns_the_facts_that_contrast_leaves(towers):
    """The heads' loss is the cross-entropy of the facts, and it teaches both encoders."""
    pictures = [compose(3, i) for i in range(4)]
    captions = [picture.caption(rng(3, i)) for i, picture in enumerate(pictures)]
    batch = {"image": torch.stack([clip.squash(x) for x in Picture.draw(pictures)]),
             **clip.tokenize(towers.tokenizers, captions),
             "facts": torch.tensor([clip.facts_of(caption) for caption in captions])}
    loss, numbers = clip.loss(towers, batch, clip.Settings())
    states, states_2 = (encoder(batch[ids])[0][-2] for encoder, ids in ((towers.text_encoder, "ids"),
                                                                        (towers.text_encoder_2, "ids_2")))
    told = 0.0
    for head, x in zip(towers.facts, (states.mean(1), states_2.mean(1), towers.text_encoder_2(batch["ids_2"])[1])):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5) ** 0.5
        start = 0
        for width, right in zip(clip.ANSWERS, batch["facts"].T):
            chances = (x @ head.weight.T + head.bias)[:, start:start + width].softmax(1)
            told, start = told - chances[range(4), right].log().mean(), start + width
    torch.testing.assert_close(numbers["facts"], told, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in towers.text_encoder_2.parameters())


def test_siblings_differ_in_one_thing_and_hold_no_unseen_pair():
    changed = 0
    for family in range(0, 80, clip.FAMILY):
        first, *others = (clip.family_picture(3, family + i) for i in range(clip.FAMILY))
        assert first == compose(3, family)
        for other in others:
            assert replace(other, scenes=first.scenes) == first
            pairs = list(zip(first.scenes[0].objects, other.scenes[0].objects))
            assert sum(a != b for a, b in pairs) <= 1 and not any(is_held_out(b) for _, b in pairs)
            changed += other != first
    assert changed > 40  # of 60; panels have none


def test_counted_families_are_three_things_and_the_same_without_each():
    for family in range(0, 80, clip.FAMILY):
        first, *others = (clip.counted_picture(3, family + i) for i in range(clip.FAMILY))
        assert first == compose_counted(3, family, objects=3)
        objects = first.scenes[0].objects
        fewer = [objects[1:], objects[::2], objects[:2]]
        if first.kind == "panels":
            fewer = [objects] * 3
        assert [other.scenes[0].objects for other in others] == fewer
        assert all(replace(other, scenes=first.scenes) == first for other in others)


def test_a_share_of_the_pictures_of_clip_are_counted(tmp_path, towers):
    config = clip.Settings(out=str(tmp_path), vocabulary=1024, scenes=42, counts=0.15)
    data = clip.data(towers, config)
    assert data.pictures[:8] == [clip.counted_picture(0, i) for i in range(8)]  # 1.5 of 10 families, rounded
    assert data.pictures[8:] == [clip.family_picture(0, i) for i in range(34)]
    assert data.images.shape == (42, 3, 64, 64)
    none = clip.data(towers, replace(config, counts=0.0, scenes=12))
    assert none.pictures == [clip.family_picture(0, i) for i in range(12)]
    few = clip.data(towers, replace(config, counts=0.99, scenes=9)).pictures  # one family stays ordinary
    assert few[:4] == [clip.counted_picture(0, i) for i in range(4)]
    assert few[4:] == [clip.family_picture(0, i) for i in range(5)]
    batch = data.batch(0, range(8))
    assert len(batch["facts"]) == 8 and batch["facts"].shape == (8, 44)
    tokenizer = clip.build(replace(config, counts=0.5)).tokenizers[0]
    length = (tokenizer(["two spheres"]) == tokenizer.end).int().argmax()
    assert length == 3  # the start and a token for each word
    with pytest.raises(ParameterError, match="counts: must be below 1, not 1.0; try 0.15"):
        clip.Settings(counts=1.0)


def test_a_vocabulary_left_by_another_run_is_not_taken(tmp_path):
    config = clip.Settings(out=str(tmp_path), vocabulary=560)
    assert clip.build(replace(config, vocabulary=600)).tokenizers[0].size > 560
    (tmp_path / "tokenizer_2" / "merges.txt").unlink()  # as a kill leaves it
    assert clip.build(replace(config, resume="latest")).tokenizers[1].size == 560
    kept = (tmp_path / "tokenizer" / "vocab.json").stat().st_mtime_ns
    clip.build(replace(config, resume="latest"))
    assert (tmp_path / "tokenizer" / "vocab.json").stat().st_mtime_ns == kept


def test_every_trained_weight_gets_a_gradient():
    """Several processes wait for the gradient of every trained weight: what the UNet never sees must stay out."""
    pipeline, config = tiny.build(), t2i.Settings(train_text=True)
    params = t2i.setup(pipeline, config)
    t2i.loss(pipeline, {
        "x0": torch.randn(2, 4, 16, 16), "noise": torch.randn(2, 4, 16, 16), "t": torch.tensor([10, 500]),
        "size_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2), "captions": ["a red cube", None]}, config).backward()
    assert all(p.grad is not None for p in params)
    last = pipeline.text_encoder.text_model.encoder.layers[-1]
    assert {id(p) for p in last.parameters()}.isdisjoint(map(id, params))
    assert len(params) > sum(1 for _ in pipeline.unet.parameters()) + 40


MODULES = train.RECIPES | PAPERS
FROM_A_MODEL = [name for name, module in MODULES.items()
                if issubclass(importlib.import_module(module).Settings, DenoisingSettings)]
TRAIN_THE_UNET = {"t2i", "dreambooth", "edit", "specialist"}  # all of it, unless they are given a LoRA's rank


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_A_MODEL)
def test_what_trains_is_in_fp32_and_what_is_frozen_as_the_arithmetic(name):
    recipe = importlib.import_module(MODULES[name])
    flags = ["--model", str(tiny.folder())]
    if name in PHOTOS:
        flags += ["--data", "photos", *PHOTOS[name]]
    config = from_argv(recipe.Settings, flags, "train.py")
    configs = [config]
    if name in TRAIN_THE_UNET and getattr(config, "lora_rank", None):
        configs.append(replace(config, lora_rank=0))
    for config, precision in product(configs, ("bf16", "fp32")):
        pipeline = recipe.build(replace(config, precision=precision))
        trained = recipe.setup(pipeline, config)
        rest = {p.dtype for p in pipeline.parameters() if id(p) not in set(map(id, trained))}
        frozen = name not in TRAIN_THE_UNET or getattr(config, "lora_rank", None)
        assert {p.dtype for p in trained} == {torch.float32}
        assert rest == {torch.bfloat16 if frozen and precision == "bf16" else torch.float32}


@pytest.mark.slow
def test_from_nothing_to_a_pipeline(tmp_path):
    """The four commands of weights/README.md, a few steps each; the folder they make is a pipeline that draws."""
    folder, small = str(tmp_path / "model"), ["--batch", "4", "--sample-every", "0", "--precision", "fp32"]
    small.append("--overwrite")  # the commands fill one folder, one after the other

    def run(recipe, *flags, out=None):
        assert train.main([recipe, "--out", str(tmp_path / (out or recipe)), "--save", folder, *small, *flags]) == 0
    run("clip", "--steps", "2", "--scenes", "16", "--vocabulary", "600")
    run("vae", "--steps", "2")
    run("t2i", "--steps", "2", "--scenes", "16", "--from-nothing", "--model", folder)
    pipeline = Pipeline.load(folder)
    first_picture, second = pipeline.generate("a red sphere", steps=2, n=2)
    assert first_picture.size == (64, 64) and first_picture.tobytes() != second.tobytes()
    assert pipeline.vae.config.scaling_factor != 0.13025
    run("t2i", "--steps", "1", "--scenes", "16", "--model", folder, out="more")  # and on from there


@pytest.mark.parametrize("fast", [True, False])
def test_pictures_are_encoded_in_bf16_only_where_that_is_fast(fast, monkeypatch):
    model, seen = tiny.build().vae, []
    monkeypatch.setattr(latents, "computes_bf16", lambda device: fast)
    model.encoder.conv_in.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    latents.encode_pictures(model, [compose(0, 0)])
    assert seen == [torch.bfloat16 if fast else torch.float32]


@pytest.mark.slow
@torch.no_grad()
def test_a_share_of_the_samples_are_aligned_panels(monkeypatch):
    """Each half is the latent of its own picture, and the caption has ONE-PIC's words."""
    monkeypatch.setattr(latents, "computes_bf16", lambda device: False)
    pipeline = Pipeline.load(tiny.folder())
    config = t2i.Settings(precision="fp32", scenes=28, panels=0.5, caption_dropout=0.0)
    data = t2i.data(pipeline, config)
    plain = t2i.data(pipeline, replace(config, panels=0.0, scenes=14))
    assert data.pictures[:14] == plain.pictures == [compose(0, i) for i in range(14)]
    assert all(torch.equal(a, b) for a, b in zip(data.latents, plain.latents))
    words = ("its edges", "its depth", "its parts in colours", "a blurred picture", "the picture before",
             "another view", "the same object")
    for number, (task, given) in enumerate(zip(t2i.PANELS, words)):
        pairs = TASKS[task]((0, "panels"), range(2 * number, 2 * number + 2))
        for k, row in enumerate((14 + 2 * number, 15 + 2 * number)):
            assert data.pictures[row].caption(rng(0)) == f"two panels: {given} | {pairs.prompts[k]}"
            assert data.pictures[row].size_ids.tolist() == [64, 128, 0, 0, 64, 128]
            images = torch.stack([pairs.source[k], pairs.target[k]])
            images = ((images + 1) * 127.5).round() / 127.5 - 1  # they are kept in 8 bits
            expected = torch.cat(list(pipeline.vae.scale(pipeline.vae.encode(images)[0])), dim=2)
            whole = torch.cat(list(images), dim=2)
            together = pipeline.vae.scale(pipeline.vae.encode(whole[None])[0])[0]
            close = 0.002 * expected.abs().max()
            assert (data.latents[row][0].float() - expected).abs().max() < close < (together - expected).abs().max()
    assert sorted(row for rows in data.buckets.values() for row in rows) == list(range(28))
    rows = [row for step in range(200) for row in data.batch(step, range(4 * step, 4 * step + 4))["rows"]]
    assert abs(sum(row >= 14 for row in rows) / 800 - 0.5) < 0.1
    batch = next(batch for batch in (data.batch(step, range(4)) for step in range(20)) if batch["rows"][0] >= 14)
    assert batch["x0"].shape == (4, 4, 16, 32) and t2i.loss(pipeline, batch, config).isfinite()


@torch.no_grad()
def test_a_share_of_the_samples_count_alike_things():
    pipeline = Pipeline.load(tiny.folder())
    config = t2i.Settings(scenes=40, counts=0.15, panels=0.2, caption_dropout=0.0)
    data = t2i.data(pipeline, config)
    assert data.pictures[:26] == [compose(0, i) for i in range(26)]
    assert data.pictures[26:32] == [compose_counted(0, i) for i in range(6)]
    assert {picture.size for picture in data.pictures[32:]} == {(64, 128)}  # the panels
    assert sorted(row for rows in data.buckets.values() for row in rows) == list(range(40))
    rows = [row for step in range(300) for row in data.batch(step, range(4 * step, 4 * step + 4))["rows"]]
    assert abs(sum(26 <= row < 32 for row in rows) / 1200 - 0.15) < 0.05
    without = t2i.data(pipeline, replace(config, counts=0.0, panels=0.0))
    assert without.pictures == [compose(0, i) for i in range(40)]
    few = t2i.data(pipeline, replace(config, scenes=2, counts=0.5, panels=0.4))
    assert few.pictures[0] == compose(0, 0) and few.pictures[1].size == (64, 128)


@torch.no_grad()
def test_panels_leave_one_ordinary_picture(monkeypatch):
    monkeypatch.setattr(latents, "computes_bf16", lambda device: False)
    data = t2i.data(Pipeline.load(tiny.folder()), t2i.Settings(precision="fp32", scenes=2, panels=0.9))
    assert data.pictures[0] == compose(0, 0) and data.pictures[1].size == (64, 128) and len(data.latents) == 2


@pytest.mark.parametrize("flags, words", [
    ("--panels 1", "--panels: must be below 1, not 1.0"), ("--panels -0.1", "--panels: must be at least 0"),
    ("--panels 0.5 --data photos", "--panels: are pictures of the world; leave data out"),
    ("--counts 1", "--counts: must be below 1, not 1.0; try 0.15"), ("--counts -1", "--counts: must be at least 0"),
    ("--counts 0.15 --data photos", "--counts: are pictures of the world; leave data out"),
    ("--counts 0.15 --panels 0.9", "--counts: must be below 0.1, what panels leave, not 0.15")])
def test_panels_and_counts_that_cannot_be_trained_on_are_refused(flags, words, capsys, tmp_path):
    assert train.main(["t2i", *flags.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error


def test_t2i_loss_is_the_weighted_noise_error(tmp_path):
    pipeline = tiny.build()
    config, batch = t2i.Settings(min_snr=5.0), {
        "x0": torch.randn(3, 4, 16, 16), "noise": torch.randn(3, 4, 16, 16), "t": torch.tensor([10, 500, 990]),
        "size_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3), "captions": ["a red cube", "", None]}
    context, pooled = zip(*(pipeline.encode(text or "")[0][:2] for text in batch["captions"]))
    context, pooled = torch.cat(context), torch.cat(pooled)
    context[2], pooled[2] = 0, 0
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[batch["t"]]
    a = abar.float()[:, None, None, None]
    noised = a.sqrt() * batch["x0"] + (1 - a).sqrt() * batch["noise"]
    error = (pipeline.unet(noised, batch["t"], context, pooled, batch["size_ids"]) - batch["noise"]) ** 2
    snr = abar / (1 - abar)
    expected = (error.mean((1, 2, 3)) * (snr.clamp(max=5) / snr)).mean()
    torch.testing.assert_close(t2i.loss(pipeline, batch, config), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, bf16", [
    ("sdxl", False), ("sd15", True), pytest.param("sdxl", True, marks=pytest.mark.slow),
    pytest.param("sd15", False, marks=pytest.mark.slow)])
def test_texts_from_the_cache_are_bit_for_bit_those_encoded_in_every_step(kind, bf16, monkeypatch):
    pipeline, config = tiny.build(kind), t2i.Settings(scenes=40, batch=16, caption_dropout=0.4)
    data = t2i.data(pipeline, config)
    first = pipeline.text_encoder.text_model.embeddings
    encoded = []
    first.register_forward_hook(lambda module, given, out: encoded.append(len(out)))
    for turn in range(2):
        for step in range(3):
            batch = data.batch(step, range(16 * step, 16 * step + 16))
            assert {None, ""} < set(batch["captions"])
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                encoded.clear()
                data.finish(batch)
                assert len(encoded) == (turn == 0)
                context, pooled = latents.encode_text(pipeline, batch["captions"])
            assert batch["context"].equal(context) and not batch["context"].requires_grad
            assert batch["pooled"] is None if pooled is None else batch["pooled"].equal(pooled)
    kept = data.captions.encoded
    assert len(kept) > 20
    room = len(kept) * context[0].nbytes

    # With less room it keeps the first ones and gives the same; a text does not depend on those encoded with it.
    monkeypatch.setattr(latents, "CACHE_BYTES", room // 2)
    small = latents.CaptionCache(pipeline)
    captions = list(kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in (0, 9, 4):
            context, _ = small(captions[start:start + 16])
            assert context.equal(torch.stack([kept[caption][0] for caption in captions[start:start + 16]]))
    assert list(small.encoded) == captions[:len(kept) // 2]


def test_texts_that_train_are_not_kept():
    config = t2i.Settings(scenes=4, batch=2, train_text=True)
    data = t2i.data(tiny.build(), config)
    batch = data.batch(0, range(2))
    data.finish(batch)
    assert "context" not in batch and not data.captions.encoded


# Cut and resumed --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three pictures of different shapes, with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for name, size in (("a", (64, 64)), ("b", (200, 100)), ("c", (100, 210))):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"one {name}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_a_run_that_was_cut_goes_on_with_the_same_bits(name, photos, tmp_path):
    settings = importlib.import_module(MODULES[name]).Settings
    flags = [name, "--out", str(tmp_path), "--steps", "3", "--save-every", "1", "--keep", "9"]
    for field in fields(settings):
        if field.name in SMALL:
            flags += ["--" + field.name.replace("_", "-"), str(SMALL[field.name])]
        if field.name == "model":
            flags += ["--model", str(tiny.folder())]
    if name in PHOTOS:
        flags += ["--data", str(photos), *PHOTOS[name]]

    def trained():
        weights = {path.relative_to(tmp_path): read_weights(path)
                   for path in (tmp_path / "model").rglob("*.safetensors")}
        state = json.loads((tmp_path / "checkpoints/step-000003/manifest.json").read_text())["files"]
        return weights, state

    assert train.main(flags) == 0
    whole, whole_state = trained()
    for folder in ("model", "checkpoints/step-000002", "checkpoints/step-000003"):
        shutil.rmtree(tmp_path / folder)
    assert train.main([*flags, "--resume", "latest"]) == 0
    cut, cut_state = trained()
    state_files = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    assert [cut_state[file] for file in state_files] == [whole_state[file] for file in state_files]
    assert whole.keys() == cut.keys() and (whole or name == "toy")
    for path, tensors in whole.items():
        assert tensors.keys() == cut[path].keys()
        assert all(torch.equal(x, cut[path][key]) for key, x in tensors.items()), path
