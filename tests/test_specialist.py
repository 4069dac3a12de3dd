"""Specialist Diffusion: the official numbers, augmentations, timesteps, content loss, the new word, and its files."""

import importlib
import itertools
import json
import math
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import peers
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_onepic import pixels

import sample
import train
from minipic.common import ParameterError, rng
from minipic.diffusion.schedule import Schedule
from minipic.image import open_picture, to_pictures, to_tensor
from minipic.layers import lora
from minipic.latents import encode_text
from minipic.models.clip import CLIPVision, CLIPVisionConfig
from minipic.papers import PAPERS, specialist
from minipic.pipeline import DrawSettings, Pipeline
from minipic.training.flags import from_argv
from minipic.training.optimizer import learning_rate
from minipic.training.photos import Photo
from minipic.weights import read_weights, save_lora, save_weights
from minipic.weights.embedding import save_embedding
from minipic.weights.files import read_header, write_json
from minipic.weights.image_encoder import CLIP_MEAN, load_image_encoder
from minipic.weights.layouts import save_part
from minipic.world import probe
from minipic.world.caption import Description, Thing, describe, parse, say
from minipic.world.scene import render, sample_scene
from tiny import picture

GOLDEN = peers.GOLDENS / "specialist.safetensors"
CPU = torch.device("cpu")
CAPTIONS = ("a small red sphere", "a cyan torus on a grey floor", "a large blue cube")


@cache
def golden() -> dict:
    return load_file(GOLDEN)


def golden_list(name: str) -> list:
    return json.loads(read_header(GOLDEN)[1][name])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The random tiny model with a vision tower."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny.folder(), folder, dirs_exist_ok=True)
    vision = CLIPVision(CLIPVisionConfig(
        image_size=24, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=20))
    save_part(peers.fill(vision), folder / "image_encoder")
    return folder


@pytest.fixture(autouse=True)
def less(monkeypatch):
    """Fewer steps of the content loss's drawing, fewer captions of the world."""
    monkeypatch.setattr(specialist, "CONTENT_STEPS", 4)
    monkeypatch.setattr(specialist, "WORLD_CAPTIONS", 60)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three pictures with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for i, caption in enumerate(CAPTIONS):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def settings(model, photos):
    """Settings with these values besides those that every test here needs."""
    def make(**values) -> specialist.Settings:
        defaults = dict(
            model=str(model), data=str(photos), style="mosaic", precision="fp32", batch=2, content_every=1)
        return specialist.Settings(**(defaults | values))
    return make


def build(config: specialist.Settings):
    """(pipeline, its data), frozen but for what trains, as train.py has them."""
    pipeline = specialist.build(config)
    trained = set(map(id, specialist.setup(pipeline, config)))
    for param in pipeline.parameters():
        param.requires_grad_(id(param) in trained)
    return pipeline, specialist.data(pipeline, config)


def gradients(pipeline: Pipeline, data, config, step: int = 0) -> dict[str, torch.Tensor]:
    """Those of one batch, of all parameters that have one."""
    pipeline.zero_grad()
    loss, _ = specialist.loss(pipeline, data.batch(step, [2 * step, 2 * step + 1]), config)
    loss.backward()
    return {name: param.grad.clone() for name, param in pipeline.named_parameters() if param.grad is not None}


# Pictures -----------------------------------------------------------------------------------------

OFFICIAL = {
    "RandomInvert": "inverted colors", "RandomPosterize": "posterize", "RandomSolarize": "solarize",
    "RandomAdjustSharpness": "sharpness", "RandomAutocontrast": "autocontrast", "RandomEqualize": "equalize",
    "RandomHorizontalFlip": "horizontal flip", "RandomVerticalFlip": "vertical flip"}


@pytest.mark.parametrize("name, operation", OFFICIAL.items())
def test_operations_are_the_official_ones(name, operation):
    for kind in ("noise", "smooth"):
        given = Image.fromarray(golden()[f"ops.{kind}.input_HWC_uint8"].numpy())
        found = specialist.OPERATIONS[operation](given)
        expected = Image.fromarray(golden()[f"ops.{kind}.{name}"].numpy())
        assert found.tobytes() == expected.tobytes() and found.tobytes() != given.tobytes()
        if name in ("RandomInvert", "RandomHorizontalFlip", "RandomVerticalFlip"):
            assert specialist.OPERATIONS[operation](found).tobytes() == given.tobytes()
    assert set(OFFICIAL.values()) == set(specialist.OPERATIONS)


@pytest.mark.slow
def test_a_half_of_the_pictures_is_changed_and_their_captions_say_how(settings):
    pipeline, data = build(settings())
    assert len(data.pictures) == 27 and len(data.latents) == 27
    drawn = Counter()
    texts = Counter()
    for index in range(4000):
        sample = data.sample(data.buckets[64, 64], index)
        operation = data.pictures[sample["rows"]].operation
        suffix = f" with the {operation} transformation" if operation else ""
        assert sample["captions"].endswith(suffix) and ("transformation" in sample["captions"]) == bool(operation)
        drawn[operation] += 1
        texts[sample["captions"].removesuffix(suffix)[:11]] += 1
    assert abs(drawn.pop("") / 4000 - 0.5) < 0.03
    assert len(drawn) == 8 and all(abs(count / 4000 - 1 / 16) < 0.016 for count in drawn.values())
    starts = [sum(count for text, count in texts.items() if text.startswith(start))
              for start in ("a picture", "a rendering", "a painting")]
    assert all(abs(count / 4000 - 1 / 5) < 0.026 for count in starts)

    for row, photo in enumerate(data.pictures[:9]):
        levels = specialist.OPERATIONS.get(photo.operation, lambda same: same)(picture(0))
        image, = photo.draw([photo])
        assert torch.equal(image, to_tensor(levels))
        mean, _ = pipeline.vae.encode(image[None])
        assert (pipeline.vae.scale(mean)[0] - data.latents[row][0]).abs().max() < 0.05 * data.latents[row][0].abs().max()


def test_photos_that_count_more_often_do_so(photos):
    photo = Photo(photos / "0.png", "a", (64, 64), (64, 64), repeats=3)
    assert [changed.repeats for changed in specialist.doubled([photo], 0.5)] == [24] + 8 * [3]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.35, 1.0])
def test_the_share_of_changed_pictures_can_be_chosen(share, photos):
    pictures = specialist.doubled([Photo(photos / "0.png", "a", (64, 64), (64, 64), repeats=2)], share)
    repeats = Counter()
    for changed in pictures:
        repeats[changed.operation] += changed.repeats
    total = sum(repeats.values())
    assert 1 - repeats.pop("") / total == pytest.approx(share)
    assert len(repeats) == 8 and all(count / total == pytest.approx(share / 8) for count in repeats.values())


def test_without_augmentations_captions_and_pictures_are_as_given(settings):
    _, data = build(settings(doubled=0, synonyms=False, templates=False, caption_dropout=0.5))
    texts = {data.sample(data.buckets[64, 64], index)["captions"] for index in range(100)}
    assert texts == {f"{caption} in the style of mosaic" for caption in CAPTIONS} | {None, ""}
    assert len(data.latents) == 3


# Captions -----------------------------------------------------------------------------------------

def test_every_combination_occurs_and_no_other():
    """5 templates, 8 operations and none, k + 1 words for each that has k synonyms."""
    photos = specialist.doubled([Photo(Path("0.png"), "a small cube", (64, 64), (64, 64))], 0.5)
    data = specialist.StyleData.__new__(specialist.StyleData)
    data.config, data.style, data.similar = specialist.Settings(), "flat", {"a small cube": ["a small cube"]}
    found = set()
    for i in range(400):
        for photo in photos:
            found.add(data.caption(photo, rng(i, photo.operation)))
    items = [f"a {size} {shape}" for size, shape in itertools.product(("small", "tiny"), ("cube", "box"))]
    endings = [""] + [f" with the {operation} transformation" for operation in specialist.OPERATIONS]
    templates = [
        "{} in the style of flat", "{} in flat style", "a picture of {} in flat style",
        "a rendering of {} in flat style", "a painting of {} in flat style"]
    assert found == {template.format(item) + ending for template, item, ending in
                     itertools.product(templates, items, endings)}
    assert len(found) == 5 * 9 * 2 * 2


def test_synonyms_stand_for_a_word_as_often_as_itself():
    assert specialist.synonyms()["man"] == ["guy", "gentleman", "fellow"]
    for text in ("the man", "the small man"):
        words = Counter(specialist.replace_words(text, rng(i)).split()[-1] for i in range(2000))
        assert words.keys() == {"man", "guy", "gentleman", "fellow"}
        assert all(abs(count / 2000 - 1 / 4) < 0.04 for count in words.values())


@pytest.mark.parametrize("text", ["", "no key is in here", "Man", "a man, small, ball.", "mans"])
def test_what_is_no_key_stays(text):
    assert all(specialist.replace_words(text, rng(i)) == text for i in range(20))


def test_the_dictionary_can_be_used():
    table = specialist.synonyms()
    assert len(table) >= 100
    for word, others in table.items():
        assert word not in others and len(others) == len(set(others)) and all(others)
        for other in others:  # the article stays
            assert (word[0] in "aeiou") == (other[0] in "aeiou") and other == other.strip().lower()
    world = {"small", "tiny", "large", "big", "sphere", "ball", "cube", "box", "torus", "ring"}
    for word in world & table.keys():
        assert set(table[word]) <= world


def test_similar_captions_are_found_and_drawn(settings, tmp_path):
    candidates = ["a small red sphere!", "a cyan torus", "zzz", "a large blue cube on a grey floor"]
    file = tmp_path / "captions.txt"
    file.write_text("\n\n".join(candidates) + "\n")
    assert specialist.Settings().similar == 0.65
    config = settings(retrieval=str(file), synonyms=False, templates=False)
    pipeline = specialist.build(config)
    tokenizer, encoder = pipeline.tokenizers_and_encoders[0]

    def vector(text):
        ids = tokenizer([text])
        hidden_states, _ = encoder(ids)
        return encoder.last(hidden_states)[0, ids[0].tolist().index(tokenizer.end)]

    cosines = {caption: [F.cosine_similarity(vector(caption), vector(other), dim=0).item() for other in candidates]
               for caption in CAPTIONS}
    middle = sorted(cosines[CAPTIONS[0]])[1:3]
    config.similar = sum(middle) / 2  # two are above it, two below
    data = specialist.data(pipeline, config)
    expected = {}
    for caption, values in cosines.items():
        others = [other for other, value in zip(candidates, values) if value > config.similar]
        expected[caption] = [caption, *others]
    assert data.similar == expected and len(expected[CAPTIONS[0]]) == 3
    photo = next(photo for photo in data.pictures if photo.text == CAPTIONS[0] and not photo.operation)
    texts = Counter(data.caption(photo, rng(i)) for i in range(2000))
    assert texts.keys() == {f"{text} in the style of mosaic" for text in expected[CAPTIONS[0]]}
    assert all(abs(number / 2000 - 1 / 3) < 0.05 for number in texts.values())


def test_captions_of_the_world_are_its_own():
    candidates = specialist.read_candidates(specialist.Settings(retrieval="world"))
    assert len(candidates) == 60 and len(set(candidates)) > 50 and "|" not in "".join(candidates)


# Timesteps and learning rate ----------------------------------------------------------------------

@pytest.mark.parametrize("offset, visited", [(0, "pndm"), (1, "pndm offset 1")])
def test_only_the_timesteps_of_the_sampler_are_trained(offset, visited, settings):
    config = settings(doubled=0)
    pipeline = Pipeline.load(config.model)
    pipeline.schedule = Schedule(class_name="PNDMScheduler", steps_offset=offset, timestep_spacing=None)
    data = specialist.data(pipeline, config)
    order = golden_list(visited)
    assert data.timesteps.tolist() == sorted(set(order)) and len(order) == 101
    assert offset or data.timesteps.tolist() == golden_list("timesteps")
    drawn = Counter(data.sample([0], index)["t"].item() for index in range(3000))
    assert drawn.keys() == set(order)
    assert max(drawn.values()) < 60  # alike often: 30 of each on average


def test_a_drawing_visits_the_timesteps_that_are_trained(settings):
    pipeline, data = build(settings(sparse_steps=7))
    visited = []

    def network(x, t, *text):
        visited.append(t.item())
        return torch.zeros_like(x)

    for _ in pipeline.denoise(pipeline.prepare(DrawSettings("a", steps=7, guidance=1.0)), network):
        pass
    assert sorted(visited) == data.timesteps.tolist()
    drawn = Counter(data.sample([0], index)["t"].item() for index in range(700))
    assert drawn.keys() == set(visited) and max(drawn.values()) < 150
    _, data = build(settings(sparse_steps=0))
    assert len({data.sample([0], index)["t"].item() for index in range(1000)}) > 500


def test_the_learning_rate_is_halved_at_the_official_epochs():
    for steps_per_epoch in (1, 3):
        config = specialist.Settings(lr=1e-5, steps=400 * steps_per_epoch)
        assert config.lr_schedule == "halved" and config.warmup == 0
        rates = [learning_rate(config, steps_per_epoch * epoch) for epoch in range(400)]
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), golden()["lr_by_epoch"], rtol=1e-12, atol=0)
        assert learning_rate(config, 20 * steps_per_epoch - 1) == 1e-5


# The content loss ---------------------------------------------------------------------------------

def test_the_released_content_loss_changes_no_bit_of_a_gradient(settings):
    found = {}
    for content, weight in (("off", 0.0), ("released", 0.0), ("released", 1e-3), ("released", 10.0)):
        config = settings(content=content, content_weight=weight)
        pipeline, data = build(config)
        found[content, weight] = gradients(pipeline, data, config)
    without, *others = found.values()
    for other in others:
        assert other.keys() == without.keys()
        assert all(torch.equal(other[name], gradient) for name, gradient in without.items())
    batch = data.batch(0, [0, 1])
    content = specialist.content_loss(pipeline, batch, config)
    assert not content.requires_grad and 0 < content < 2
    loss, logged = specialist.loss(pipeline, batch, config)
    torch.testing.assert_close(loss.detach(), logged["denoising"] + 10 * content)


@pytest.mark.parametrize("target", ["image", "text"])
def test_the_gradient_reaches_the_unet_alone(target, settings):
    config = settings(content="grad", content_weight=1.0, content_target=target)
    pipeline, data = build(config)
    content = specialist.content_loss(pipeline, data.batch(0, [0, 1]), config)
    content.backward()
    for name, param in pipeline.named_parameters():
        is_unets = name.startswith("unet.")
        assert (param.grad is not None) == is_unets, name
    assert all(param.grad.abs().sum() > 0 for name, param in pipeline.unet.named_parameters() if "weight" in name)


def test_the_content_loss_is_its_formula(settings):
    """Written down once more: a drawing with guidance 7.5, of which one step is predicted, decoded and compared."""
    config = settings(content="grad")
    pipeline, data = build(config)
    batch = data.batch(0, [0, 1])
    photo = data.pictures[batch["rows"][0]]
    assert torch.equal(batch["content_image"], to_tensor(open_picture(photo.path)))
    seed, caption = batch["content_seed"], batch["content_caption"]
    chosen = seed % 4
    drawing = pipeline.prepare(DrawSettings(caption, steps=4, guidance=7.5, seed=seed))
    for step, (_, x0) in enumerate(pipeline.denoise(drawing)):
        if step == chosen:
            break
    with torch.no_grad():
        image = pipeline.vae.decode(pipeline.vae.unscale(x0))
    tower = pipeline.image_encoder
    vectors = []
    for one in (image, batch["content_image"][None]):
        small = F.interpolate(one / 2 + 0.5, (24, 24), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (CLIP_MEAN, (0.26862954, 0.26130258, 0.27577711)))
        vectors.append(tower.vision((small - mean) / std)[1])
    expected = 1 - F.cosine_similarity(*vectors)
    torch.testing.assert_close(specialist.content_loss(pipeline, batch, config)[None], expected, rtol=1e-4, atol=1e-6)

    _, pooled = encode_text(pipeline, [caption])
    config = replace(config, content_target="text")
    expected = 1 - F.cosine_similarity(vectors[0], pooled)
    torch.testing.assert_close(specialist.content_loss(pipeline, batch, config)[None], expected, rtol=1e-4, atol=1e-6)


def test_the_last_step_is_the_finished_picture(settings):
    pipeline, _ = build(settings())
    drawn = specialist.draw_once(pipeline, DrawSettings("a small cube", steps=3, guidance=7.5, seed=5), 2)
    expected = pipeline.generate("a small cube", steps=3, guidance=7.5, seed=5, progress=False)
    assert to_pictures(drawn)[0].tobytes() == expected[0].tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_is_that_of_one_step(precision, settings):
    """A number's change by a small step along the gradient, where the way to this step is held fixed."""
    config = settings(content="grad", lora_rank=2, precision=precision)
    pipeline, data = build(config)
    batch = data.batch(0, [0, 1]) | {"content_seed": 4 * 10**9}  # step 0, before which there is no way
    params = [param for param in pipeline.parameters() if param.requires_grad]

    def content():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return specialist.content_loss(pipeline, batch, config)

    for layer in lora.layers(pipeline.unet).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    start = content()
    found = torch.autograd.grad(start, params)
    assert all(gradient.abs().sum() > 0 for gradient in found)
    if precision == "bf16":  # too coarse for differences; but in one loss nothing is lost
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = specialist.loss(pipeline, batch, replace(config, content_weight=1.0))
            denoising = specialist.denoising_loss(pipeline, batch, config)
        both, alone = torch.autograd.grad(loss, params), torch.autograd.grad(denoising, params)
        for gradient, a, b in zip(found, both, alone):
            torch.testing.assert_close(a - b, gradient, rtol=0.05, atol=0.02 * gradient.abs().max().item() + 1e-6)
        return
    size = sum(gradient.square().sum() for gradient in found).sqrt()
    change = 0.02 / size
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for param, gradient in zip(params, found):
                param += sign * change * gradient
        values.append(content().item())
        with torch.no_grad():
            for param, gradient in zip(params, found):
                param -= sign * change * gradient
    slope = (values[0] - values[1]) / (2 * change * size)
    assert abs(slope / size - 1) < 0.05


def test_content_distance():
    a, b = golden()["content.a"], golden()["content.b"]
    torch.testing.assert_close(specialist.content_distance(a, b)[None], golden()["content.loss"], rtol=1e-5, atol=1e-6)
    assert abs(specialist.content_distance(a, a)) < 1e-6
    torch.testing.assert_close(specialist.content_distance(a, -a), torch.tensor(2.0))


def test_it_counts_in_some_steps_and_the_picture_is_never_changed(settings):
    config = settings(content="released", content_every=3, synonyms=False)
    _, data = build(config)
    having = [step for step in range(9) if "content_image" in data.batch(step, [step])]
    assert having == [2, 5, 8]
    images = {text: to_tensor(picture(i)) for i, text in enumerate(CAPTIONS)}
    for index in range(30):
        batch = data.batch(2, [index])
        assert torch.equal(batch["content_image"], images[batch["content_caption"]])


def test_the_caption_of_the_content_loss_is_raw(settings):
    config = settings(content="grad", word="<new>", retrieval="world")
    pipeline, data = build(config)
    words = set(" ".join(CAPTIONS).split()) | {"tiny", "big", "ball", "ring", "box"}
    for index in range(50):
        assert set(data.batch(0, [index])["content_caption"].split()) <= words


def test_gram_matrices_are_the_official_ones():
    """The judge's distance of styles is made of them. Theirs are divided by the channels too."""
    features = golden()["style.feat1"]

    class Stem:
        def stem(self, images):
            return images

    def gram(features):
        upper = probe.embed_style(Stem(), features)[0]
        matrix = torch.zeros(10, 10)
        rows, columns = torch.triu_indices(10, 10)
        matrix[rows, columns] = matrix[columns, rows] = upper
        return matrix

    found = gram(features)
    torch.testing.assert_close(found / 10, golden()["style.gram1"], rtol=1e-4, atol=1e-6)
    assert torch.linalg.eigvalsh(found).min() > -1e-6
    shuffled = features.flatten(2)[..., torch.randperm(48)].view_as(features)
    torch.testing.assert_close(gram(shuffled), found, rtol=1e-4, atol=1e-6)
    both = torch.cat([features, features.flip(1)])
    separate = [probe.embed_style(Stem(), one[None]) for one in both]
    torch.testing.assert_close(probe.embed_style(Stem(), both), torch.cat(separate))  # samples do not mix
    a, b = separate
    assert probe.distance(a, a).abs() < 1e-9 and probe.distance(a, b) == probe.distance(b, a) > 0.01


# The word -----------------------------------------------------------------------------------------

def test_a_new_word_begins_as_the_styles_name(settings, model):
    pipeline, data = build(settings(word="<m>"))
    plain = Pipeline.load(model)
    for text in ("a cube in the style of {}", "{}", "a {} cube, {}"):
        for found, expected in zip(pipeline.encode(text.format("<m>", "<m>"))[0][:2],
                                   plain.encode(text.format("mosaic", "mosaic"))[0][:2]):
            assert torch.equal(found, expected)
    assert data.style == "<m>" and "in the style of <m>" in specialist.prompt_for(data.style, "a cube")
    count = len([number for _, ids in plain.tokenizer.tokenize("mosaic") for number in ids])
    assert {len(vectors) for vectors in pipeline.word_vectors().values()} == {count}


@pytest.mark.parametrize("rank", [0, 2])
def test_one_step_moves_the_word_and_no_other_row(rank, settings):
    """Decay included, which in the released code shrinks the whole vocabulary."""
    config = settings(word="<m>", weight_decay=0.1, lora_rank=rank, lr=0.01)
    before = {name: x.clone() for name, x in specialist.build(config).state_dict().items()}
    run, data = train.build(specialist, config, CPU)
    loss, _ = run.loss(data.batch(0, [0, 1]))
    loss.backward()
    run.optimizer.step()
    moved = {name for name, x in run.model.state_dict().items() if name in before and not torch.equal(x, before[name])}
    words = {f"{part}.text_model.embeddings.token_embedding.added" for part in ("text_encoder", "text_encoder_2")}
    assert words <= moved
    assert {name.split(".")[0] for name in moved - words} == (set() if rank else {"unet"})
    assert all((x.detach() - before[name]).abs().min() > 1e-3 for name, x in run.model.named_parameters() if name in words)


def test_a_textual_inversion_to_start_from(settings, tmp_path):
    vectors = {"text_encoder": peers.numbers((2, 16), 1).float(), "text_encoder_2": peers.numbers((2, 24), 2).float()}
    save_embedding(vectors, tmp_path / "cat.safetensors", "<cat>")
    for word, expected in (("", "<cat>"), ("<other>", "<other>")):
        config = settings(style="", embedding=str(tmp_path / "cat.safetensors"), word=word)
        pipeline, data = build(config)
        assert data.style == expected and config.train_text
        for part, found in pipeline.word_vectors().items():
            assert torch.equal(found, vectors[part]) and found.requires_grad


# Training and files -------------------------------------------------------------------------------

@pytest.fixture
def run(model, photos, tmp_path, monkeypatch):
    """Trains from the command line: run(name of the folder, *flags) -> the folder of the finished weights."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        defaults = [
            "--data", str(photos), "--model", str(model), "--style", "mosaic", "--batch", "2", "--steps", "3",
            "--sample-every", "0", "--precision", "fp32", "--lr", "0.01", "--out", name]
        assert train.main(["specialist", *defaults, *flags]) == 0
        return Path(name, "model")
    return run


@pytest.mark.slow
def test_off_and_released_train_the_same_bits(run):
    unet = "unet/diffusion_pytorch_model.safetensors"
    off, released, grad = (read_weights(run(content, "--content", content, "--content-every", "2") / unet)
                           for content in ("off", "released", "grad"))
    assert all(torch.equal(x, released[name]) for name, x in off.items())
    assert any(not torch.equal(x, grad[name]) for name, x in off.items())
    rows = [json.loads(line) for line in Path("grad/log.jsonl").read_text().splitlines()]
    assert "content" not in rows[-1]  # the third step


@pytest.mark.slow
def test_a_whole_unet_and_a_word_are_ordinary_files(run, model):
    folder = run("whole", "--word", "<m>", "--content", "grad", "--log-every", "1", "--content-every", "2")
    rows = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    assert [set(row) & {"denoising", "content"} for row in rows] == [set(), {"denoising", "content"}, set()]
    assert math.isclose(rows[1]["loss"], rows[1]["denoising"] + 0.1 * rows[1]["content"], rel_tol=1e-5)
    tuned = read_weights(folder / "unet/diffusion_pytorch_model.safetensors")
    base = read_weights(model / "unet/diffusion_pytorch_model.safetensors")
    assert tuned.keys() == base.keys() and not torch.equal(tuned["conv_in.weight"], base["conv_in.weight"])
    for part in ("text_encoder", "text_encoder_2"):
        encoder, old = (read_weights(path / part / "model.safetensors") for path in (folder, model))
        assert encoder.keys() == old.keys()
    drawn = Pipeline.load(folder)
    drawn.add_embedding(folder / "embedding.safetensors")
    expected, = drawn.generate("a cube in the style of <m>", steps=2)
    flags = ["--model", str(folder), "--embedding", str(folder / "embedding.safetensors"), "--dtype", "fp32"]
    assert sample.main(["a cube in the style of <m>", *flags, "--steps", "2", "--n", "1", "--device", "cpu",
                        "--out", "drawn.png"]) == 0
    assert pixels("drawn.png") == expected.tobytes()


@pytest.mark.slow
def test_a_lora_and_a_word_draw_as_adapter_as_files_and_in_diffusers(run, model):
    folder = run("lora", "--word", "<m>", "--lora-rank", "2")
    tensors = read_weights(folder / "lora.safetensors")
    assert any(x.abs().max() > 0 for name, x in tensors.items() if "lora_B" in name)
    assert read_header(folder / "lora.safetensors")[1] == {"paper": "specialist", "style": "<m>", "format": "pt"}
    common = ["--model", str(model), "--steps", "2", "--n", "1", "--device", "cpu", "--dtype", "fp32"]
    assert sample.main(["a cube", *common, "--adapter", str(folder), "--out", "adapter.png"]) == 0
    assert sample.main([
        "a cube in the style of <m>", *common, "--lora", str(folder / "lora.safetensors"), "--embedding",
        str(folder / "embedding.safetensors"), "--out", "files.png"]) == 0
    assert pixels("adapter.png") == pixels("files.png")
    assert sample.main(["a cube in the style of <m>", *common, "--out", "without.png"]) == 0
    assert pixels("without.png") != pixels("files.png")

    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    peer.set_progress_bar_config(disable=True)
    peer.load_lora_weights(folder / "lora.safetensors")
    for name, encoder, tokenizer in (("learned_embeds", peer.text_encoder, peer.tokenizer),
                                     ("learned_embeds_2", peer.text_encoder_2, peer.tokenizer_2)):
        peer.load_textual_inversion(str(folder / f"{name}.safetensors"), text_encoder=encoder, tokenizer=tokenizer)
    context = peer.encode_prompt("a cube in the style of <m>", do_classifier_free_guidance=False)[0]
    pipeline = Pipeline.load(model)
    style = specialist.load_adapter(pipeline, folder / "lora.safetensors")
    cond, _ = pipeline.encode(specialist.prompt_for(style, "a cube"))
    assert style == "<m>" and peers.distance(cond.context, context) < 1e-5
    x, t = peers.numbers((1, 4, 16, 16), 3).float(), torch.tensor(500)
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        expected = peer.unet(x, t, cond.context, added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": ids}).sample
        assert peers.distance(pipeline.unet(x, t, cond.context, cond.pooled, ids), expected) < 1e-4


@pytest.mark.slow
def test_a_lora_to_start_from_is_part_of_the_result(run, settings, tmp_path, model):
    other = Pipeline.load(model)
    lora.inject(other.unet, 3)  # as DreamBooth's, on attention alone
    for layer in lora.layers(other.unet).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    save_lora({"unet": lora.lora_state_dict(other.unet)}, tmp_path / "sks.safetensors")
    start, _ = build(settings(lora=str(tmp_path / "sks.safetensors"), lora_rank=2))

    def drawn(pipeline):
        return pipeline.generate("a cube", steps=2, progress=False)[0].tobytes()

    def differences(pipeline):
        return max(abs(a - b) for a, b in zip(drawn(pipeline), drawn(other)))

    assert differences(Pipeline.load(model)) > 5
    assert differences(start) <= 1

    folder = run("more", "--lora", str(tmp_path / "sks.safetensors"), "--lora-rank", "2", "--lr", "0")
    assert differences(Pipeline.load(model, lora=folder / "lora.safetensors")) <= 1
    ranks = {len(x) for name, x in read_weights(folder / "lora.safetensors").items() if "lora_A" in name}
    assert ranks == {2, 5}


@pytest.mark.slow
def test_a_run_with_all_that_is_random_goes_on_with_the_same_bits(run):
    flags = ["--content", "grad", "--content-every", "2", "--retrieval", "world", "--word", "<m>", "--steps", "4",
             "--save-every", "3"]
    whole = read_weights(run("cut", *flags) / "unet/diffusion_pytorch_model.safetensors")
    shutil.rmtree("cut/checkpoints/step-000004")
    again = read_weights(run("cut", *flags, "--resume", "latest") / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


@pytest.mark.slow
def test_the_sample_shows_the_style(run, monkeypatch):
    prompts = []
    prepare = Pipeline.prepare

    def prepare_short(pipeline, settings):
        prompts.append(settings.prompt)
        return prepare(pipeline, replace(settings, steps=1))

    monkeypatch.setattr(Pipeline, "prepare", prepare_short)
    run("shown", "--sample-every", "3")
    assert prompts == [f"{caption} in the style of mosaic" for caption in CAPTIONS]
    assert open_picture("shown/samples/step-000003.png").width > 128


# Mistakes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--data", "--data: name a folder of pictures of the style"),
    ("--style", "--style: say what the style is called"),
    ("--word small</w>", "--word: 'small</w>' already is a token"),
    ("--word <m> --embedding none.safetensors", "none.safetensors: cannot read it"),
    ("--lora none.safetensors --lora-rank 2", "none.safetensors"),
    ("--lora none.safetensors", "--lora-rank: goes on from a LoRA with a LoRA; choose its rank"),
    ("--content grad --image-encoder nowhere", "nowhere/config.json"),
    ("--content grad --image-encoder narrow --content-target text", "--content-target: narrow does not belong to"),
    ("--content grad --image-encoder odd", "preprocessor_config.json: image_mean and image_std must be three numbers"),
    ("--doubled 1.5", "--doubled: must be at most 1, not 1.5"),
    ("--doubled -1", "--doubled: must be at least 0"),
    ("--content soon", "--content: invalid choice: 'soon'"),
    ("--content-every 0", "--content-every: must be at least 1"),
    ("--content-weight -1", "--content-weight: must be at least 0"),
    ("--sparse-steps -1", "--sparse-steps: must be at least 0"),
    ("--sparse-steps 2000", "choose between 1 and 1000, not 2000"),
    ("--retrieval none.txt", "--retrieval: none.txt: cannot be read; name a text file in UTF-8"),
    ("--retrieval odd.txt", "--retrieval: odd.txt: cannot be read; name a text file in UTF-8"),
    ("--lr-schedule halves", "--lr-schedule: invalid choice: 'halves'")])
def test_a_mistake_is_one_sentence(flags, words, model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("odd.txt").write_bytes(b"\xff\xfe\x00 caf\xe9")
    for name, width in (("narrow", 12), ("odd", 20)):
        vision = CLIPVision(CLIPVisionConfig(
            image_size=24, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, projection_dim=width))
        save_part(vision, Path(name))
    write_json({"image_mean": 0.5}, "odd/preprocessor_config.json")
    given = {"--data": str(photos), "--style": "mosaic", "--model": str(model), "--steps": "1", "--batch": "1"}
    words_given = flags.split()
    for name, value in itertools.zip_longest(words_given[::2], words_given[1::2]):
        given.pop(name, None)
        if value is not None:
            given[name] = value
    argv = [word for pair in given.items() for word in pair]
    assert train.main(["specialist", *argv, "--sample-every", "0"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("train.py: ") and words in error.splitlines()[-1]
    assert not list(Path("runs").rglob("*.safetensors"))


@pytest.mark.parametrize("flags, words", [
    ("--source p.png", "--source: this adapter takes none"),
    ("--task edit", "--task: this adapter was not trained for 'edit'"),
    ("--adapter bare.safetensors", "bare.safetensors: its metadata does not name the style")])
def test_a_wrong_flag_for_drawing_is_one_sentence(flags, words, run, model, capsys):
    folder = run("lora", "--lora-rank", "2", "--steps", "1")
    picture(1).save("p.png")
    tensors = read_weights(folder / "lora.safetensors")
    save_weights(tensors, "bare.safetensors", {"paper": "specialist"})
    capsys.readouterr()
    flags = flags if "--adapter" in flags else f"{flags} --adapter {folder}"
    assert sample.main(["a cube", "--model", str(model), "--device", "cpu", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and words in error


def test_an_adapter_of_the_style_changes_pictures_too(run, model):
    """Image-to-image, a mask: whatever the pipeline does goes with it."""
    folder = run("lora", "--lora-rank", "2", "--steps", "1")
    pipeline = Pipeline.load(model)
    style = specialist.load_adapter(pipeline, folder / "lora.safetensors")
    shown = []
    settings = DrawSettings("a cube", steps=4, n=2, image=picture(3), strength=0.5)
    drawn = specialist.draw(pipeline, style, settings, on_step=lambda x, x0: shown.append(x.shape))
    expected = pipeline.generate("a cube in the style of mosaic", steps=4, n=2, image=picture(3), strength=0.5)
    assert [one.tobytes() for one in drawn] == [one.tobytes() for one in expected]
    assert shown == [(2, 4, 16, 16)] * 2
    with pytest.raises(ParameterError, match="takes none"):
        specialist.plan(pipeline, style, settings, [picture(1)])


def test_the_shipped_vision_tower_matches_its_text_encoder():
    """The pictures of the world are nearer to their own captions, if pictures are normalised as they were."""
    folder = Path(tiny.__file__).parents[1] / "weights" / "tiny"
    pipeline = Pipeline.load(folder)
    scenes = [sample_scene(10**9, i, 1) for i in range(12)]
    texts = [say(describe(scene), rng(i)) for i, scene in enumerate(scenes)]
    with torch.no_grad():
        tower = load_image_encoder(folder / "image_encoder")
        images = tower(render(scenes, truth=False).rgb)
        _, texts = encode_text(pipeline, texts)
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    assert (similarity.argmax(1) == torch.arange(12)).float().mean() > 0.8
    assert tower.mean.flatten().tolist() == [0.5] * 3


# The benchmark ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_toy_benchmark_is_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    program = importlib.import_module("specialist")
    weights = Path(tiny.__file__).parents[1] / "weights" / "tiny"
    if not (weights / "judge").exists():
        pytest.skip("weights/tiny has no judge")
    flags = ["--size", "toy", "--seeds", "1", "--model", str(weights), "--out", str(tmp_path / "specialist.json"),
             "--runs", str(tmp_path / "runs"), "--only"]
    names = ("renders", "rebuilt", "untouched", "Specialist, LoRA", "on textual inversion")
    for name in names:
        program.main([*flags, name])
    rows = {row["name"]: row for row in json.loads((tmp_path / "specialist.json").read_text())["results"]}
    assert tuple(rows) == names
    renders = rows["renders"]["at"]["0"]
    assert renders["whole"] >= 0.75 and renders["style"] < 0.4 and renders["nearest"] > 10
    rebuilt = rows["rebuilt"]["at"]["0"]
    assert renders["style"] < rebuilt["style"] < rows["untouched"]["at"]["0"]["style"] and rebuilt["whole"] >= 0.5
    for name in names[3:]:
        assert list(rows[name]["at"]) == ["1", "2"]
        assert rows[name]["at"]["1"].keys() == renders.keys() - {"reader"} | {
            f"obeyed: {operation}" for operation in program.SUFFIXES}
    assert rows["Specialist, LoRA"]["trained"] < rows["on textual inversion"]["trained"] == 7371396 + 4 * (96 + 128)
    assert open_picture(tmp_path / "runs/figures/poster.png").width > 300
    capsys.readouterr()
    monkeypatch.setattr(program, "measure", lambda *given: pytest.fail("measured again"))
    program.main([*flags, "Specialist, LoRA"])
    assert capsys.readouterr().out == ""


def test_the_entries_of_the_benchmark_can_be_trained(monkeypatch):
    """Every flag exists, and an ablation lacks just what it says."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    program = importlib.import_module("specialist")
    words = {"photos": "photos", "bare": "bare", "named": "named", "style": "mosaic", "steps": 12, "first": "first"}
    configs = {}
    for name, entry in program.ENTRIES.items():
        for flags in filter(None, (entry.flags, entry.first)):
            recipe, *argv = [word.format(**words) for word in shlex.split(flags)]
            module = importlib.import_module((train.RECIPES | PAPERS)[recipe])
            configs[name] = from_argv(module.Settings, argv, "train.py")
    whole = configs["Specialist"]
    assert whole.templates and whole.synonyms and whole.doubled == 0.2 and whole.sparse_steps == 100
    assert configs["without retrieval"] == replace(whole, retrieval="", similar=0.65)
    expected = {
        "as in the paper": {"doubled": 0.5, "similar": 0.65}, "without doubled": {"doubled": 0},
        "without synonyms": {"synonyms": False}, "without templates": {"templates": False},
        "without sparse updating": {"sparse_steps": 0}, "the drawing's timesteps alone": {"sparse_steps": 12},
        "Specialist, content 0.1": {"content": "grad"}, "Specialist, 3e-4": {"lr": 3e-4}}
    for name, changes in expected.items():
        assert configs[name] == replace(whole, **changes)


@pytest.mark.parametrize("opening", ["", "a picture of ", "there is "])
def test_captions_of_the_benchmark_fit_into_a_template_and_say_nothing_of_the_sky(opening, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    program = importlib.import_module("specialist")
    asked = Description((Thing("red", shape="cube", pattern="plain"),), floor="pink", sky="night")
    texts = []
    for seed in range(100):
        text = program.words_for(asked, rng(seed))
        assert parse(opening + text) == replace(asked, sky=None)
        texts.append(text)
    assert set(texts) == {"a red cube on a pink floor", "a red box on a pink floor", "a red cube, on a pink floor",
                          "a red box, on a pink floor"}


def test_the_reader_sees_what_was_done_to_a_picture(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    program = importlib.import_module("specialist")
    scenes = [sample_scene(1, i, 1) for i in range(120)]
    reader = program.Reader(render(scenes, truth=False).rgb)
    assert reader.accuracy > 0.9
