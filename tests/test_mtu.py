"""MTU: one task as an ordinary UNet, its batches and loss, and how it draws: the same pictures as diffusers."""

import functools
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import peers
import pytest
import tiny
import torch

import sample
import train
from minipic.common import InputError, ParameterError
from minipic.image import open_picture, read_saved_settings, resize_and_crop, to_tensor
from minipic.layers import lora
from minipic.layers.moe import MoE, task_state_dict, upcycle
from minipic.papers import mtu
from minipic.pipeline import DrawSettings, Pipeline
from minipic.weights import read_weights, save_lora, save_weights
from minipic.weights.files import read_header, read_json
from minipic.world.pictures import Picture, compose
from minipic.world.tasks import TASKS
from pipelines import SEED, STEPS, assert_same, in_float64, load64, peer_latents
from tiny import NEGATIVE, PROMPT, picture

TRAINED_AS = mtu.TrainedAs(("t2i", "edit", "sr"), ("edit", "sr"), 4, 4)


def config_of(**settings) -> mtu.Settings:
    defaults = dict(model=str(tiny.folder()), precision="fp32", scenes=6, caption_dropout=0.0)
    return mtu.Settings(**(defaults | settings))


def change(params):
    """Move parameters away from where they start, so that no expert weighs as much as another."""
    for seed, param in enumerate(params):
        param.data += 0.2 * peers.numbers(param.shape, seed) / param[0].numel() ** 0.5


@functools.cache
def trained(kind: str, trained_as: mtu.TrainedAs = TRAINED_AS):
    """(an upcycled UNet as training might leave it, its adapter)."""
    torch.manual_seed(0)
    unet = Pipeline.load(tiny.folder(kind)).unet
    change(upcycle(unet, **asdict(trained_as)))
    return unet.requires_grad_(False), mtu.Adapter(trained_as, task_state_dict(unet))


# One task as an ordinary UNet ---------------------------------------------------------------------

def inputs(unet, task, source):
    """What a UNet of the tiny SDXL model takes, with the source in more channels if there is one."""
    x = peers.numbers((2, 4, 16, 16), 1).float()
    context = peers.numbers((2, 7, unet.config.cross_attention_dim), 2).float()
    given = torch.tensor([5.0, 600.0]), context, peers.numbers((2, 20), 3).float(), torch.ones(2, 6)
    return x, given, source if task in TRAINED_AS.pictures else None


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("trained_as", [
    TRAINED_AS, replace(TRAINED_AS, scale=1), replace(TRAINED_AS, top_k=2), replace(TRAINED_AS, experts=1, scale=1)],
    ids=["scale 4", "scale 1", "top 2", "one"])
def test_a_folded_task_predicts_what_the_upcycled_unet_does(trained_as):
    unet, adapter = trained("sdxl", trained_as)
    predictions = {}
    for task in TRAINED_AS.tasks:
        x, given, source = inputs(unet, task, peers.numbers((2, 4, 16, 16), 4).float())
        expected = mtu.predict(unet, task, source, x, *given)
        folded = mtu.fold(unet, task)
        seen = x if source is None else torch.cat([x, source], dim=1)
        for ordinary in (folded, adapter.unet(tiny.model().unet, task)):
            assert not any(isinstance(layer, MoE) for layer in ordinary.modules())
            assert (ordinary(seen, *given) - expected).abs().max() < 1e-5 * expected.abs().max()
        shared = {param.data_ptr() for param in unet.parameters()}
        own = [name for name, param in folded.named_parameters() if param.data_ptr() not in shared]
        assert own and all(name.endswith("ff.net.2.weight") for name in own)
        predictions[task] = expected
    for task in ("t2i", "edit"):
        assert (predictions[task] - predictions["sr"]).abs().max() > 0.05


def test_full_size_copies_do_not_fold():
    unet = Pipeline.load(tiny.folder()).unet
    upcycle(unet, ("t2i",), 2, full_size=True)
    with pytest.raises(ParameterError, match="full_size: copies of whole feed-forwards do not fold"):
        mtu.fold(unet, "t2i")


@functools.cache
def exported(kind: str, task: str) -> Path:
    """The diffusers folder of one task."""
    folder = Path(tiny.tempfile.mkdtemp())
    _, adapter = trained(kind)
    mtu.export_task(Pipeline.load(tiny.folder(kind)), adapter, task, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind, task", [("sdxl", "t2i"), ("sdxl", "edit"), ("sd15", "t2i"), ("sd15", "edit")])
def test_diffusers_draws_an_exported_task_as_it_is_drawn_here(kind, task):
    """Dual guidance included, by diffusers' own InstructPix2Pix pipelines."""
    folder = exported(kind, task)
    name = read_json(folder / "model_index.json")["_class_name"]
    assert name.endswith("InstructPix2PixPipeline") == (task == "edit")
    given = dict(negative_prompt=NEGATIVE, guidance_scale=3.0)
    settings = DrawSettings(PROMPT, NEGATIVE, steps=STEPS, seed=SEED, n=2, guidance=3.0, sampler="euler")
    if task == "edit":
        given |= dict(image=picture(), image_guidance_scale=1.7)
        settings = replace(settings, edit=picture(), image_guidance=1.7)
    latents = []
    _, adapter = trained(kind)
    unet = adapter.unet(tiny.model(kind).unet, task).double()
    pipeline = load64(tiny.folder(kind))
    with in_float64():
        mtu.draw_with(pipeline, unet, settings, lambda x, x0: latents.append(x))
    assert_same(latents[-1], peer_latents(name, folder, **given))


# Training -----------------------------------------------------------------------------------------

def test_batches_are_the_worlds_pairs_and_do_not_depend_on_other_tasks():
    config = config_of()
    pipeline = mtu.build(config)
    pipeline.vae.quant_conv.weight.data[4:] = 0  # no variance: x0 is the mean itself
    pipeline.vae.quant_conv.bias.data[4:] = -30

    def mean(images):
        with torch.no_grad():
            return pipeline.vae.encode(images)[0]

    data = mtu.data(pipeline, config)
    batch = data.batch(0, range(5))
    assert list(batch) == ["t2i", "edit", "sr", "inpaint"] and "source" not in batch["t2i"]
    for task, world in (("edit", "edit"), ("sr", "small"), ("inpaint", "masked")):
        own, pairs = batch[task], TASKS[world]((0, task), range(7))
        rows = own["rows"]
        assert max(rows) < 6  # the seventh is to be shown
        assert own["captions"] == [""] * 5 if task == "sr" else [pairs.prompts[row] for row in rows]
        close = 0.03 * mean(pairs.target).abs().max()  # latents are encoded and kept in 16 bits
        assert (own["source"] - mean(pairs.source[rows])).abs().max() < close
        assert (own["x0"] - pipeline.vae.scale(mean(pairs.target[rows]))).abs().max() < close
        shown = to_tensor(mtu.picture_of(data.examples[task][0]))
        assert (shown - pairs.source[6]).abs().max() < 0.01
    pictures = Picture.draw([compose((0, "t2i"), i) for i in range(6)])
    for row, x0 in zip(batch["t2i"]["rows"], batch["t2i"]["x0"]):
        expected = pipeline.vae.scale(mean(pictures[row][None]))[0]
        assert (x0 - expected).abs().max() < 0.03 * expected.abs().max()

    alone = mtu.data(pipeline, config_of(tasks="edit")).batch(0, range(5))
    assert list(alone) == ["edit"]
    for key, value in alone["edit"].items():
        same = torch.equal(value, batch["edit"][key]) if torch.is_tensor(value) else value == batch["edit"][key]
        assert same, key


def test_a_share_lacks_the_picture_a_share_the_words_and_a_share_both():
    config = config_of(tasks="edit,sr", caption_dropout=0.4)
    batch = mtu.data(mtu.build(config), config).batch(0, range(1500))
    for task, words_left in (("edit", 0.6), ("sr", 0.0)):
        has_text = torch.tensor([bool(text) for text in batch[task]["captions"]])
        has_picture = batch[task]["source"].flatten(1).any(1)
        assert abs(has_text.float().mean().item() - words_left) < 0.04
        assert abs(has_picture.float().mean().item() - 0.6) < 0.04  # without a caption to drop, too


def test_the_loss_is_the_sum_of_the_tasks_and_begins_as_the_models():
    config = config_of()
    pipeline = mtu.build(config)
    mtu.setup(pipeline, config)
    batch = mtu.data(pipeline, config).batch(0, range(4))
    total, losses = mtu.loss(pipeline, batch, config)
    base = Pipeline.load(config.model)
    for task, own in batch.items():  # scale N: the picture counts nothing yet
        assert torch.equal(losses[task], mtu.denoising_loss(base, own, config))
    assert torch.equal(total, sum(losses.values())) and list(losses) == ["t2i", "edit", "sr", "inpaint"]
    as_the_paper = config_of(scale=1)
    other = mtu.build(as_the_paper)
    mtu.setup(other, as_the_paper)
    assert (mtu.loss(other, batch, as_the_paper)[0] - total).abs() > 1e-3


@pytest.mark.slow
def test_recomputed_activations_are_those_of_their_own_task():
    """The backward pass of one task comes after the forward passes of all."""
    gradients, losses = [], []
    for recompute in (False, True):
        config = config_of(gradient_checkpointing=recompute)
        pipeline = mtu.build(config)
        torch.manual_seed(0)
        params = mtu.setup(pipeline, config)
        change(params)
        if recompute:
            train.enable_gradient_checkpointing(pipeline)
        loss, _ = mtu.loss(pipeline, mtu.data(pipeline, config).batch(0, range(2)), config)
        loss.backward()
        losses.append(loss.item())
        gradients.append([param.grad for param in params])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for whole, recomputed in zip(*gradients):
        assert (whole - recomputed).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.slow
def test_every_task_learns_together():
    config = config_of()
    pipeline = mtu.build(config)
    torch.manual_seed(0)
    params = mtu.setup(pipeline, config)
    batch = mtu.data(pipeline, config).batch(0, range(4))
    _, first = mtu.loss(pipeline, batch, config)
    optimizer = torch.optim.AdamW(params, 3e-3)
    for _ in range(10):
        total, last = mtu.loss(pipeline, batch, config)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for task in first:
        assert last[task] < first[task], task
    assert {id(param) for param in pipeline.parameters() if param.grad is not None} == set(map(id, params))
    weights = set()
    for task in first:
        mtu.select(pipeline.unet, task)
        layer = next(layer for layer in pipeline.unet.modules() if isinstance(layer, MoE))
        weights.add(tuple(layer.expert_weights().tolist()))
    assert len(weights) == 4


# From the command to a picture --------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The run folder of a short training."""
    out = tmp_path_factory.mktemp("run")
    flags = ["--model", str(tiny.folder()), "--scenes", "4", "--batch", "2", "--steps", "2", "--lr", "0.01",
             "--warmup", "0", "--ema", "0", "--experts", "2", "--gradient-checkpointing", "--out", str(out)]
    with tiny.short_drawings():
        assert train.main(["mtu", *flags]) == 0
    return out


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The test runs in a folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("p.png")
    picture(2).crop((0, 0, 64, 48)).save("flat.png")


def run(*flags) -> int:
    """The exit code of `sample.py FLAGS` with the random tiny model, two steps."""
    return sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", *map(str, flags)])


@pytest.mark.slow
def test_what_training_writes(run_folder):
    assert (run_folder / "samples" / "step-000002.png").exists()
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[task] for task in ("t2i", "edit", "sr", "inpaint")), rel=1e-5)
    file = run_folder / "model" / "mtu.safetensors"
    _, metadata = read_header(file)
    assert metadata["paper"] == "mtu"
    assert json.loads(metadata["mtu"]) == {
        "tasks": ["t2i", "edit", "sr", "inpaint"], "pictures": ["edit", "sr", "inpaint"], "experts": 2, "scale": 2,
        "top_k": 0}
    tensors = read_weights(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    changed = tensors["conv_in.tasks.edit.weight"][:, 4:].abs().max().item()
    assert changed == pytest.approx(2 * 0.1, rel=0.5)  # Adam's steps: 10 times the learning rate
    given = to_tensor(open_picture(run_folder / "model" / "inpaint.png"))
    assert (given - TASKS["masked"]((0, "inpaint"), [4]).source[0]).abs().max() < 0.01
    assert not (run_folder / "model" / "t2i.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_flags_reach_the_drawing_and_come_back_with_from(run_folder, task, inside):
    flags = ["--adapter", run_folder / "model", "--task", task, "--n", "1", "--seed", "3"]
    flags += ["--source", "flat.png", "--image-guidance", "2.5"] if task == "edit" else []
    assert run(*flags, "--out", "first.png") == 0
    lazy = Pipeline.load(tiny.folder(), lazy=True)
    adapter = mtu.load_adapter(lazy, run_folder / "model" / "mtu.safetensors")
    mtu.export_task(lazy, adapter, task, "folder")
    given = dict(edit=open_picture("flat.png"), image_guidance=2.5) if task == "edit" else {}
    expected, = Pipeline.load("folder").generate(PROMPT, steps=2, seed=3, **given)
    assert open_picture("first.png").tobytes() == expected.tobytes()
    assert expected.size == ((64, 48) if task == "edit" else (64, 64))
    assert read_saved_settings("first.png")["task"] == task
    assert sample.main(["--from", "first.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == expected.tobytes()


def drawn(pipeline, adapter, task, sources=(), prompt=PROMPT, **settings) -> bytes:
    settings = DrawSettings(prompt, steps=2, **settings)
    return mtu.draw(pipeline, adapter, settings, list(sources), task)[0].tobytes()


@pytest.mark.slow
def test_a_drawing_leaves_the_model_as_it_was_and_tasks_and_sources_matter():
    pipeline = Pipeline.load(tiny.folder())
    _, adapter = trained("sdxl")
    before = pipeline.generate(PROMPT, steps=2)[0].tobytes()
    pictures = [drawn(pipeline, adapter, "t2i")]
    for task, seed in (("edit", 1), ("edit", 2), ("sr", 1)):
        pictures.append(drawn(pipeline, adapter, task, [picture(seed)]))
    assert len({before, *pictures}) == 5
    assert drawn(pipeline, adapter, "t2i") == pictures[0]
    assert pipeline.generate(PROMPT, steps=2)[0].tobytes() == before
    with pytest.raises(ParameterError):  # after a mistake too
        drawn(pipeline, adapter, "sr", [picture()], sampler="none")
    assert pipeline.generate(PROMPT, steps=2)[0].tobytes() == before
    untrained = mtu.Adapter(TRAINED_AS, {name: tensor for name, tensor in task_state_dict(fresh()).items()})
    assert drawn(pipeline, untrained, "t2i") == before


def fresh():
    unet = Pipeline.load(tiny.folder()).unet
    upcycle(unet, **asdict(TRAINED_AS))
    return unet


def test_without_words_there_is_no_guidance():
    pipeline = tiny.model()
    _, adapter = trained("sdxl")
    weak, strong = (drawn(pipeline, adapter, "sr", [picture()], "", guidance=guidance) for guidance in (1.0, 7.0))
    assert weak == strong
    assert drawn(pipeline, adapter, "sr", [picture()], guidance=7.0) != drawn(pipeline, adapter, "sr", [picture()])


@pytest.mark.slow
def test_a_lora_goes_with_it(tmp_path):
    unet = Pipeline.load(tiny.folder()).unet
    lora.inject(unet, 2)
    for seed, layer in enumerate(lora.layers(unet).values()):
        layer.lora_B.weight.data = peers.numbers(layer.lora_B.weight.shape, seed).float()
    save_lora({"unet": lora.lora_state_dict(unet)}, tmp_path / "lora.safetensors")
    _, adapter = trained("sdxl")
    pictures = []
    for lazy in (False, True):
        pipeline = Pipeline.load(tiny.folder(), lazy=lazy)
        pipeline.add_lora(tmp_path / "lora.safetensors")
        pictures.append(drawn(pipeline, adapter, "edit", [picture()]))
    folder = exported("sdxl", "edit")
    merged = Pipeline.load(folder, lora=tmp_path / "lora.safetensors")
    assert pictures[0] == pictures[1] == merged.generate(PROMPT, steps=2, edit=picture())[0].tobytes()
    assert pictures[0] != drawn(tiny.model(), adapter, "edit", [picture()])


@pytest.mark.parametrize("sources", [True, False])
def test_own_pictures(tmp_path, sources):
    """A folder for each task; all pictures are trained on, and the first is shown."""
    sizes = [(96, 48), (96, 48), (80, 80)]
    has_source = {"restore": sources, "draw": False}
    for task in has_source:
        for kind, first in (("target", 0), ("source", 5)):
            if kind == "source" and not has_source[task]:
                continue
            (tmp_path / task / kind).mkdir(parents=True)
            for i, size in enumerate(sizes):
                picture(first + i).resize(size).save(tmp_path / task / kind / f"{i}.png")
                (tmp_path / task / kind / f"{i}.txt").write_text(f"{task} {i}")
    config = config_of(data=str(tmp_path), tasks="restore, draw")
    assert mtu.trained_as(config) == mtu.TrainedAs(("restore", "draw"), ("restore",) * sources, 4, 4)
    pipeline = mtu.build(config)
    mtu.setup(pipeline, config)
    data = mtu.data(pipeline, config)

    means = []  # of the given pictures, in the size of their bucket
    for i in range(3):
        bucket = (64, 64) if i == 2 else (80, 48)
        image = to_tensor(resize_and_crop(picture(5 + i).resize(sizes[i]), bucket))
        with torch.no_grad():
            mean, _ = pipeline.vae.encode(image[None])
        means.append(mean[0])
    rows = {task: set() for task in has_source}
    for step in range(16):
        for task, own in data.batch(step, range(3 * step, 3 * step + 3)).items():
            assert own["captions"] == [f"{task} {row}" for row in own["rows"]]
            assert ("source" in own) == has_source[task]
            rows[task] |= set(own["rows"])
            for source, row in zip(own.get("source", ()), own["rows"]):
                assert (source - means[row]).abs().max() < 0.05 * means[row].abs().max()
    assert rows == {"restore": {0, 1, 2}, "draw": {0, 1, 2}}
    assert torch.isfinite(mtu.loss(pipeline, data.batch(0, range(2)), config)[0])


# Mistakes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("", "--task: is needed; this adapter does t2i, edit, sr, inpaint"),
    ("--task paint", "--task: 'paint' is unknown; this adapter does t2i, edit, sr, inpaint"),
    ("--task edit", "--source: edit needs one given picture, not 0"),
    ("--task edit --source p.png --source flat.png", "--source: edit needs one given picture, not 2"),
    ("--task t2i --source p.png", "--source: t2i is given no picture; leave it out"),
    ("--task edit --source nowhere.png", "nowhere.png: no such picture"),
    ("--task edit --source p.png --edit p.png", "--edit: give the picture as source"),
    ("--task edit --source p.png --size 60x64", "--size: 60x64: width and height must be multiples of 8"),
    ("--task t2i --refiner REFINER", "--refiner: does not go with this adapter"),
    ("--task t2i --model SD15", "mtu.safetensors does not fit this model (see 'down_blocks.0"),
    ("--task t2i --adapter damaged.safetensors", "its metadata does not say how it was trained"),
    ("--task t2i --adapter seven.safetensors", "seven.safetensors does not fit this model (experts: 7 does not")])
def test_a_mistake_in_drawing_is_one_sentence(run_folder, flags, words, inside, capsys):
    tensors = {"a": torch.zeros(2)}
    save_weights(tensors, "damaged.safetensors", {"paper": "mtu", "mtu": "{}"})
    seven = asdict(TRAINED_AS) | {"experts": 7, "scale": 7}
    save_weights(tensors, "seven.safetensors", {"paper": "mtu", "mtu": json.dumps(seven)})
    flags = flags.replace("SD15", str(tiny.folder("sd15"))).replace("REFINER", str(tiny.folder("refiner")))
    assert run("--adapter", run_folder / "model", *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and words in error
    assert not list(Path().glob("pictures/*.png"))


@pytest.mark.parametrize("values", [
    {"experts": "four"}, {"tasks": "edit"}, {"more": 1}, {"scale": None}])
def test_damaged_metadata_is_refused(values, tmp_path):
    changed = asdict(TRAINED_AS) | values
    save_weights({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"paper": "mtu", "mtu": json.dumps(changed)})
    with pytest.raises(InputError, match="a.safetensors"):
        mtu.load_adapter(tiny.model(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("flags, words", [
    ("--tasks paint", "--tasks: 'paint' is unknown; choose from t2i, edit, sr, inpaint"),
    ("--tasks t2i,t2i", "--tasks: expected a list of different names"),
    ("--tasks t2i,", "--tasks: '' is unknown"),
    ("--experts 0", "--experts: must be at least 1"),
    ("--experts 3", "--experts: 3 does not divide the 128 hidden neurons"),
    ("--scale 2", "--scale: of 4 experts must be 4, their number, or 1, not 2"),
    ("--top-k 5", "--top-k: choose 1 to 4, or 0 for all"),
    ("--caption-dropout 0.7", "--caption-dropout: must be at most 0.6"),
    ("--resolution 60", "--resolution: must be a multiple of 16"),
    ("--data nowhere --tasks restore", "nowhere/restore/target: no such folder")])
def test_what_cannot_be_trained_is_refused(flags, words, capsys, tmp_path):
    given = ["--model", str(tiny.folder()), "--scenes", "2", "--steps", "1", "--out", str(tmp_path)]
    assert train.main(["mtu", *given, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error


# The benchmark ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_toy_run_of_the_benchmark_is_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    tiny_model = Path(__file__).parents[1] / "weights" / "tiny"
    program = load_program("mtu")
    names = ["untouched", "cost", "MTU, N=4, scale 1", "norms alone", "single, sr", "LoRA, edit"]
    flags = ["--size", "toy", "--seeds", "1", "--model", str(tiny_model), "--runs", str(tmp_path)]
    for name in names:
        flags += ["--only", name]
    program.main(flags)
    results = json.loads((tmp_path / "toy.json").read_text())["results"]
    rows = {row["name"]: row for row in results}
    assert sorted(rows) == sorted(names) and len(results) == len(names)

    scores = rows["MTU, N=4, scale 1"]["scores"]
    assert list(scores) == ["t2i", "edit", "sr", "inpaint"] and 5 < scores["sr"]["PSNR"] < 60
    assert rows["untouched"]["scores"]["edit"]["kept"] > 0.9  # the pictures as they were
    losses = {}
    for name in names[2:]:
        losses[name] = rows[name]["held-out loss"]
    assert list(losses["single, sr"]) == ["sr"] and list(losses["LoRA, edit"]) == ["edit"]
    # Two steps of training teach little. What differs is a quarter of every feed-forward.
    assert losses["MTU, N=4, scale 1"]["t2i"]["200"] > 1.5 * losses["norms alone"]["t2i"]["200"]
    trained = {name: rows[name]["trained"] for name in names[2:]}
    assert trained["norms alone"] < trained["LoRA, edit"] < trained["single, sr"]
    router = rows["MTU, N=4, scale 1"]["router"]["edit"]
    assert all(sum(weights) == pytest.approx(1, abs=1e-3) for weights in router)
    parameters = rows["cost"]["parameters"]
    assert parameters["before"] < parameters["folded"] < parameters["upcycled"] < 1.2 * parameters["before"]
    for figure in ("loss-of-scales", "router-MTU-N=4-scale-1", "MTU-N=4-scale-1-0-edit"):
        assert open_picture(tmp_path / "figures" / f"{figure}.png").width > 100

    capsys.readouterr()
    monkeypatch.setattr(program, "measure", lambda *given: pytest.fail("measured again"))
    program.main(flags)
    assert capsys.readouterr().out == ""


def load_program(name: str):
    """A program of tests/benchmarks as a module; its name may be that of a paper's."""
    folder = Path(__file__).parent / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_psnr_in_a_hole_counts_nothing_else():
    program = load_program("mtu")
    truth = torch.zeros(2, 3, 8, 8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    images = torch.where(mask, 0.2, 0.9).expand(2, 3, -1, -1)
    assert program.masked_psnr(images, truth, mask) == pytest.approx(20.0, abs=1e-4)  # 10 log10(4 / 0.04)
    assert program.masked_psnr(images, truth, ~mask) == pytest.approx(6.94, abs=0.01)
