"""OneDiffusion: the official program's drawings, batches of frames, the loss, and how it draws."""

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import peers
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sample
import train
from minipic.common import InputError, ParameterError
from minipic.diffusion.frames import dynamic_shift, flow_grid, guided, sample_frames
from minipic.image import open_picture, read_saved_settings, resize_and_crop, to_tensor
from minipic.papers import find_adapter, onediffusion
from minipic.papers.onediffusion import WORLD_TASKS, ways_to_give
from minipic.weights import read_weights, save_weights
from minipic.weights.files import read_header
from minipic.world.rays import frames_of_cameras, orbit, ray_frames, rays_of_frames
from minipic.world.tasks import TASKS
from test_nextdit import GOLDEN, LARGE, TINY, large, network, official
from tiny import PROMPT, picture

LOOPS = ("t2i", "img2img_mask01", "img2img_mask10", "img2img_mask100_nonsquare_noise2", "img2img_mask110_two_targets",
         "multiview_known_poses", "multiview_unknown_pose")


def config_of(**settings) -> onediffusion.Settings:
    defaults = dict(model=str(tiny.folder()), precision="fp32", scenes=6, caption_dropout=0.0, depth=1, hidden_size=96)
    return onediffusion.Settings(**(defaults | settings))


# The official program -----------------------------------------------------------------------------

@large
@pytest.mark.parametrize("name", LOOPS)
def test_drawings_are_the_official_ones(name):
    """Measured: 5e-4 at most, where latents reach 5."""
    path = LARGE / f"pipeline_{name}.safetensors"
    golden = load_file(path)
    about = safe_open(path, "pt").metadata()
    x = golden["latents_in_step0"]
    if name == "t2i":
        x = x[:, None]
    is_drawn = torch.tensor(json.loads(about.get("mask", "[1]"))).bool()
    tokens = float(about.get("noise_scale", 1)) * int(is_drawn.sum()) * x[0, 0, 0].numel() / 4
    grid = flow_grid(int(about["steps"]), dynamic_shift(tokens))
    torch.testing.assert_close(grid.sigmas, golden["sigmas"], rtol=0, atol=5e-7)
    torch.testing.assert_close(grid.timesteps, golden["timesteps"], rtol=0, atol=5e-4)
    model = partial(official(), **json.loads(about.get("forward_kwargs", "{}")))
    text, mask = golden["y"], golden["mask"]
    predict = guided(model, text[1:], mask[1:], text[:1], mask[:1], float(about["guidance"]))
    given = x.clone()
    with torch.no_grad():
        for step, (x, _) in enumerate(sample_frames(predict, x, is_drawn, grid, "last")):
            torch.testing.assert_close(x, golden[f"step{step}.latents_after"], rtol=0, atol=1e-3)
            assert torch.equal(x[:, ~is_drawn], given[:, ~is_drawn])  # bit for bit
    if "ray_frames" in golden and name.endswith("known_poses"):
        angles = zip(json.loads(about["azimuths"]), json.loads(about["elevations"]))
        cameras = torch.stack([orbit(*pair, float(about["distance"])) for pair in angles])
        frames = frames_of_cameras(cameras, 1.3887, 16, 8)
        torch.testing.assert_close(frames, golden["ray_frames"][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("tokens, shift", [(256, 1.648721), (3072, 2.655590), (9216, 7.513239)])
def test_noise_levels_are_the_official_ones(steps, tokens, shift):
    assert dynamic_shift(tokens) == pytest.approx(shift, rel=1e-6)
    grid = flow_grid(steps, dynamic_shift(tokens))
    torch.testing.assert_close(grid.sigmas, GOLDEN[f"scheduler.n{steps}_seq{tokens}.sigmas"], rtol=0, atol=5e-7)
    torch.testing.assert_close(grid.timesteps, GOLDEN[f"scheduler.n{steps}_seq{tokens}.timesteps"], rtol=0, atol=5e-4)


def test_ray_frames_are_the_official_ones_and_come_back():
    rays = GOLDEN["rays.orbit.rays_FHW6"].permute(0, 3, 1, 2)
    expected = GOLDEN["rays.orbit.rays_F16HW_x1.658"]
    torch.testing.assert_close(ray_frames(rays, 16), expected, rtol=0, atol=2e-6)
    for channels, side in ((16, 8), (6, 8), (4, 16), (3, 16)):
        frames = ray_frames(rays, channels)
        assert frames.shape == (6, channels, side, side)
        torch.testing.assert_close(rays_of_frames(frames), rays, rtol=0, atol=1e-6)
    # A patch of 2x2 of four channels holds the numbers of one of the official frames' pixels.
    patches = torch.nn.functional.pixel_unshuffle(ray_frames(rays, 4), 2)
    torch.testing.assert_close(patches, expected, rtol=0, atol=2e-6)


# Drawing frames -----------------------------------------------------------------------------------

@pytest.mark.parametrize("label, told", [("zero", 0.0), ("last", None)])
def test_given_frames_stay_and_the_network_is_told_their_level(label, told):
    """With the exact velocity, steps of any length end at the data."""
    x0 = peers.numbers((2, 3, 4, 4, 4), 1).float()
    noise = peers.numbers((2, 3, 4, 4, 4), 2).float()
    is_drawn = torch.tensor([True, False, True])
    start = torch.where(is_drawn[:, None, None, None], noise, x0)
    grid = flow_grid(5, 3.0)
    levels = []

    def predict(x, t):
        levels.append(t)
        return noise - x0

    for x, x0_found in sample_frames(predict, start, is_drawn, grid, label):
        assert torch.equal(x[:, 1], x0[:, 1]) and torch.equal(x0_found[:, 1], x0[:, 1])
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-5)
    assert torch.stack(levels)[:, :, 1].unique().item() == (grid.timesteps[-1] if told is None else told)
    torch.testing.assert_close(torch.stack(levels)[:, 0, 0], grid.timesteps)


@torch.no_grad()
def test_guidance_is_by_the_text_alone():
    model = network()
    x, t = peers.numbers((2, 2, 4, 8, 8), 0).float(), torch.tensor([[500.0, 0.0]] * 2)
    texts = peers.numbers((2, 5, 20), 1).float()
    masks = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    without, with_text = (model(x, t, texts[i:i + 1].expand(2, -1, -1), masks[i:i + 1].expand(2, -1)) for i in (0, 1))
    for scale in (0.0, 1.0, 4.0):
        found = guided(model, texts[1:], masks[1:], texts[:1], masks[:1], scale)(x, t)
        expected = with_text if scale <= 1 else without + scale * (with_text - without)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# Batches ------------------------------------------------------------------------------------------

def data_of(config):
    pipeline = onediffusion.build(config)
    onediffusion.setup(pipeline, config)
    return pipeline, onediffusion.data(pipeline, config)


def mean_latents(pipeline, images):
    with torch.no_grad():
        mean, _ = pipeline.vae.encode(images)
        return pipeline.vae.scale(mean)


@pytest.mark.slow
@pytest.mark.parametrize("task", WORLD_TASKS)
def test_batches_are_frames_of_the_worlds_tasks(task):
    config = config_of(tasks=task, scenes=6, clean=1.0)
    pipeline, data = data_of(config)
    batch = data.batch(0, range(4))
    frames = batch["x0"].shape[1]
    variants = {"multiview": (4, 6), "subject_driven": (2, 3, 4), "text2image": (1,)}
    assert frames in variants.get(task, (2,))
    # Which example each sample is, by its first frame.
    options = {"multiview": {"views": frames // 2}, "subject_driven": {"references": frames - 1}}.get(task, {})
    number = {"multiview": frames // 2 - 2, "subject_driven": frames - 2}.get(task, 0)
    count = {"multiview": 2, "subject_driven": 3}.get(task, 1)
    pairs = TASKS[WORLD_TASKS[task]](0, range(number, 6, count), **options)
    first = mean_latents(pipeline, pairs.truth["pictures"][:, 0] if task == "multiview" else pairs.target)
    distance = (batch["x0"][:, None, 0] - first[None]).flatten(2).norm(dim=2)
    rows = distance.argmin(1)
    close = 0.05 * batch["x0"].abs().max()
    assert (batch["x0"][:, 0] - first[rows]).abs().max() < close
    if task == "multiview":
        second = mean_latents(pipeline, pairs.truth["pictures"][:, 1])
        assert (batch["x0"][:, 2] - second[rows]).abs().max() < close
        rays = rays_of_frames(batch["x0"][0, 1::2])
        assert rays[0, 3:].abs().max() < 1e-3  # the first camera is the origin
        assert rays[1, 3:].abs().max() > 0.5
    elif frames > 1:
        given = pairs.truth["references"][:, -1] if task == "subject_driven" else pairs.source
        assert (batch["x0"][:, -1] - mean_latents(pipeline, given)[rows]).abs().max() < close
    text = "" if task == "multiview" else pairs.prompts[rows[0]]
    states, mask = onediffusion.encode(pipeline, [f"[[{task}]] {text}".strip()])
    length = int(mask.sum())
    assert batch["mask"][0].sum() == length
    torch.testing.assert_close(batch["text"][0, :length], states[0], rtol=0, atol=1e-5)
    # Given frames are at 0, the others at levels of their own.
    assert torch.equal(batch["t"] == 0, batch["given"])
    if task != "text2image":
        assert batch["given"].any(1).all() and not batch["given"].all(1).any()
        assert {tuple(row) for row in batch["given"].tolist()} <= {tuple(way) for way in ways_to_give(task, frames)}


@pytest.mark.parametrize("task, frames, ways", [
    ("text2image", 1, []),
    ("depth2image", 2, ["01", "10"]),
    ("deblurring", 2, ["01"]),
    ("subject_driven", 4, ["0111"]),
    ("multiview", 4, ["1101", "1100", "1110"]),  # cameras known, unknown, and camera_pose
    ("multiview", 6, ["110101", "110000", "111101", "111000", "111010"])])
def test_which_frames_are_given(task, frames, ways):
    found = ["".join(str(int(given)) for given in way) for way in ways_to_give(task, frames)]
    assert found == ways


def test_a_sample_depends_on_its_number_alone_and_batches_are_of_one_kind():
    config = config_of(tasks="depth2image,deblurring,subject_driven", scenes=9, clean=0.5)
    _, data = data_of(config)
    kinds = set()
    for step in range(30):
        batch = data.batch(step, range(4 * step, 4 * step + 4))
        kinds.add(batch["x0"].shape[1])
        alone = data.batch(step, [4 * step + 2])
        for key in ("x0", "noise", "t", "given"):
            assert torch.equal(alone[key][0], batch[key][2])
    assert kinds == {2, 3, 4}


def test_shares_of_clean_frames_captions_and_levels():
    """1,000 samples: 60% have given frames, 25% no caption; one shared level, or one for each."""
    for shared in (False, True):
        config = config_of(tasks="depth2image", scenes=2, clean=0.6, caption_dropout=0.25, shared_t=shared, shift=2.0)
        _, data = data_of(config)
        samples = [data.sample("depth2image", [0, 1], i) for i in range(1000)]
        assert abs(sum(bool(s["given"].any()) for s in samples) - 600) < 60
        empty = data.texts[""]
        assert abs(sum(s["text"] is empty for s in samples) - 250) < 50
        levels = torch.stack([s["t"] for s in samples if not s["given"].any()]) / 1000
        assert torch.equal(levels[:, 0], levels[:, 1]) == shared
        unshifted = levels / (2 - levels)  # the inverse of 2 s / (1 + s)
        normal = torch.logit(unshifted[:, 0].double())
        assert abs(normal.mean()) < 0.2 and abs(normal.std() - 1) < 0.15


def test_the_loss_is_the_velocitys_error_in_frames_that_are_not_given():
    config = config_of(tasks="depth2image", clean=1.0)
    pipeline, data = data_of(config)
    peers.fill(pipeline.nextdit)
    batch = data.batch(0, range(4))
    given = batch["given"][:, :, None, None, None]
    sigma = batch["t"][:, :, None, None, None] / 1000
    x = (1 - sigma) * batch["x0"] + sigma * batch["noise"]
    assert torch.equal(x[batch["given"]], batch["x0"][batch["given"]])
    velocity = pipeline.nextdit(x, batch["t"], batch["text"], batch["mask"])
    error = (velocity - (batch["noise"] - batch["x0"])).square()
    expected = (error * ~given).flatten(1).sum(1) / (~given).expand_as(error).flatten(1).sum(1)
    found = onediffusion.loss(pipeline, batch, config)
    torch.testing.assert_close(found, expected.mean(), rtol=1e-5, atol=0)
    other = batch | {"noise": torch.where(given, -batch["noise"], batch["noise"])}
    assert torch.equal(onediffusion.loss(pipeline, other, config), found)  # noise that is not used


def test_training_learns():
    """On one depth pair the loss falls in a few steps, and the task's name is optional."""
    torch.manual_seed(0)
    config = config_of(tasks="depth2image", scenes=1, task_token=False)
    pipeline, data = data_of(config)
    params = onediffusion.setup(pipeline, config)
    assert data.text(data.examples[0]) == data.examples[0].text
    batch = data.batch(0, range(8))
    optimizer = torch.optim.AdamW(params, 3e-3)
    losses = []
    for _ in range(15):
        value = onediffusion.loss(pipeline, batch, config)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.6 * losses[0]


# Trained, saved and drawn -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder that a short training saves."""
    out = tmp_path_factory.mktemp("onediffusion")
    flags = "--tasks text2image,depth2image,image_editing,multiview,subject_driven --scenes 10 --batch 2 --steps 3"
    flags += " --depth 1 --hidden-size 96 --warmup 0 --ema 0 --precision fp32 --sample-every 0 --lr 0.01"
    with tiny.short_drawings():
        assert train.main(["onediffusion", "--model", str(tiny.folder()), "--out", str(out), *flags.split()]) == 0
    return out / "model"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("a.png")
    picture(2).save("b.png")


def run(folder, *flags) -> int:
    return sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", "--n", "1",
                        "--adapter", str(folder), *flags])


def test_after_the_largest_seed_comes_the_first(trained):
    flags = ["--task", "image2depth", "--source", "a.png"]
    assert run(trained, *flags, "--n", "2", "--seed", str(2**64 - 1), "--out", "two") == 0
    assert run(trained, *flags, "--seed", "0", "--out", "zero.png") == 0
    second, zero = (to_tensor(open_picture(name)) for name in ("two/picture-0002.png", "zero.png"))
    assert (second - zero).abs().max() < 2.5 / 127.5  # two grey levels: drawn in batches of two and of one


def test_what_is_saved_says_how_to_draw(trained):
    assert find_adapter(trained) == ("onediffusion", trained / "diffusion_pytorch_model.safetensors")
    _, metadata = read_header(trained / "diffusion_pytorch_model.safetensors")
    values = json.loads(metadata["onediffusion"])
    assert values["size"] == [64, 64] and values["tasks"][1] == "depth2image" and values["focal"] == 1.6
    assert json.loads((trained / "config.json").read_text())["_class_name"] == "NextDiT"


@pytest.mark.parametrize("flags, frames", [
    ("--task text2image", 1),
    ("--task depth2image --source a.png", 1),
    ("--task image2depth --source a.png", 1),
    ("--task depth2image", 2),  # both, side by side
    ("--task image_editing --source a.png", 1),
    ("--task subject_driven --source a.png --source b.png", 1),
    ("--task multiview --source a.png --camera 0,15 --camera 30,15 --camera 60,20", 2),
    ("--task multiview --source a.png --source b.png --views 3", 1),
    ("--task multiview --views 2", 2)])
def test_any_frame_can_be_given(flags, frames, trained):
    assert run(trained, *flags.split(), "--out", "drawn.png") == 0
    assert open_picture("drawn.png").size == (64 * frames, 64)


def test_drawing_is_the_sampler_with_the_frames_in_their_places(trained):
    """The picture of sample.py, from the parts: the VAE, the encoders, the network, the sampler."""
    model = tiny.model()
    assert run(trained, "--task", "image2depth", "--source", "a.png", "--seed", "3", "--label", "last",
               "--out", "drawn.png") == 0
    adapter = onediffusion.load_adapter(model, trained / "diffusion_pytorch_model.safetensors")
    mean = mean_latents(model, to_tensor(picture(1))[None])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    x = torch.stack([mean[0], noise[1]])[None]
    text, mask = onediffusion.encode(model, ["", f"[[depth2image]] {PROMPT}"])
    predict = guided(adapter.network, text[1:], mask[1:], text[:1], mask[:1], 5.0)
    with torch.no_grad():
        for x, _ in sample_frames(predict, x, torch.tensor([False, True]), flow_grid(2), "last"):
            pass
    expected = model.decode(x[:, 1])[0]
    assert open_picture("drawn.png").tobytes() == expected.tobytes()
    kept = read_saved_settings("drawn.png")
    assert (kept["task"], kept["label"], kept["sampler"]) == ("image2depth", "last", "flow_euler")
    assert sample.main(["--from", "drawn.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == expected.tobytes()


def test_camera_pose_prints_cameras(trained, capsys, monkeypatch):
    """The rays of a known camera in the place of those that are drawn: its place is printed."""
    known = torch.stack([orbit(0, 0), orbit(30, 20)])
    frames = frames_of_cameras(known, 1.6, 4, 16)
    draw_frames = onediffusion.draw_frames

    def perfect(pipeline, adapter, given, is_drawn, *settings):
        assert is_drawn.tolist() == [False, False, False, True]
        x = draw_frames(pipeline, adapter, given, is_drawn, *settings)
        torch.testing.assert_close(x[0, 1], frames[0], rtol=0, atol=1e-5)
        x[:, 3] = frames[1]
        return x

    monkeypatch.setattr(onediffusion, "draw_frames", perfect)
    assert run(trained, "--task", "camera_pose", "--source", "a.png", "--source", "b.png", "--out", "rays.png") == 0
    lines = capsys.readouterr().out.splitlines()
    # The oracle's (-0.705, 0.513, 0.279) is for a distance of 1.5; here it is 1.7.
    assert lines[1].startswith("view 2: at (-0.80, 0.58, 0.32), looks along (0.47, -0.34, 0.81)")
    assert open_picture("rays.png").size == (128, 64)


@pytest.mark.parametrize("flags, places", [
    ("--task subject_driven", (1, 2)), ("--task multiview --views 3", (0, 2)), ("--task camera_pose", (0, 2))])
def test_sources_fill_the_given_places_in_their_order(flags, places, trained, monkeypatch):
    draw_frames = onediffusion.draw_frames
    seen = []

    def spy(pipeline, adapter, frames, is_drawn, *settings):
        seen.append(frames)
        assert not is_drawn[list(places)].any()
        return draw_frames(pipeline, adapter, frames, is_drawn, *settings)

    monkeypatch.setattr(onediffusion, "draw_frames", spy)
    assert run(trained, *flags.split(), "--source", "a.png", "--source", "b.png", "--out", "drawn.png") == 0
    for place, number in zip(places, (1, 2)):
        expected = mean_latents(tiny.model(), to_tensor(picture(number))[None])[0]
        torch.testing.assert_close(seen[0][place], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_lora_starts_as_the_network_and_is_drawn_on_it(trained, tmp_path):
    flags = f"--model {tiny.folder()} --start {trained} --tasks depth2image --scenes 2 --batch 2 --precision fp32"
    flags += " --lora-rank 2 --ema 0 --warmup 0 --sample-every 0 --lr 0 --steps 1"
    for name, own in (("start", flags), ("moved", flags.replace("--lr 0 --steps 1", "--lr 0.02 --steps 3"))):
        assert train.main(["onediffusion", *own.split(), "--out", name]) == 0
        assert sorted(path.name for path in Path(name, "model").iterdir()) == ["lora.safetensors"]
    drawn = {}
    for name, folder in (("whole", trained), ("start", "start/model"), ("moved", "moved/model")):
        assert run(folder, "--task", "depth2image", "--source", "a.png", "--out", f"{name}.png") == 0
        drawn[name] = open_picture(f"{name}.png").tobytes()
    assert drawn["whole"] == drawn["start"] != drawn["moved"]


# Own pictures -------------------------------------------------------------------------------------

def own_folder(*names) -> Path:
    root = Path("own")
    for number, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(2):
            picture(10 * number + i).save(folder / f"{i}.png")
            if folder.name == "target":
                (folder / f"{i}.txt").write_text(f"picture {i}")
    return root


def test_own_pictures_are_tasks_of_their_folders_names():
    root = own_folder("text2image/target", "sketch2image/target", "sketch2image/source", "lift/target", "lift/source",
                      "lift/source2")
    config = config_of(data=str(root), clean=1.0)
    pipeline, data = data_of(config)
    assert data.trained_as.tasks == ("lift", "sketch2image", "text2image")
    frames = {task: {shape[0] for shape in shapes} for task, shapes in data.groups.items()}
    assert frames == {"lift": {3}, "sketch2image": {2}, "text2image": {1}}
    row = data.groups["lift"][torch.Size([3, 4, 16, 16])][1]
    for frame, seed in zip(data.frames[row], (31, 41, 51)):
        expected = mean_latents(pipeline, to_tensor(picture(seed))[None])[0]
        assert (frame.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert data.text(data.examples[row]) == "[[lift]] picture 1"
    assert onediffusion.trained_task(data.trained_as, "image2sketch") == "sketch2image"


def own_scene(change=lambda values: None, focal=1.2):
    """Four photos of 64x48 pixels around a point, with the transforms.json that nerfstudio writes."""
    folder = Path("own/multiview/shelf")
    folder.mkdir(parents=True)
    frames = []
    for i, azimuth in enumerate((0, 25, 60, 100)):
        picture(i).resize((64, 48)).save(folder / f"{i}.png")
        camera = torch.cat([orbit(azimuth, 20, 3.0), torch.tensor([[0.0, 0, 0, 1]])]).double()
        pose = camera.inverse() * torch.tensor([1.0, -1.0, -1.0, 1.0])
        frames.append({"file_path": f"{i}.png", "transform_matrix": pose.tolist()})
    values = {"w": 64, "h": 48, "fl_x": 48 * focal, "frames": frames, "caption": "a shelf"}
    change(values)
    (folder / "transforms.json").write_text(json.dumps(values))


def test_own_views_have_their_rays():
    own_scene()
    pipeline, data = data_of(config_of(data="own"))
    assert data.trained_as.focal == pytest.approx(1.2) and data.trained_as.tasks == ("multiview",)
    assert [len(example.pictures) for example in data.examples] == [2, 3, 2, 3]
    example, frames = data.examples[1], data.frames[1].float()
    angles = [(0, 25, 60, 100)[int(photo.path.stem)] for photo in example.pictures]
    assert angles[0] == 25 and len(set(angles)) == 3
    cameras = torch.stack([orbit(azimuth, 20) for azimuth in angles])  # at the distance of training
    expected = frames_of_cameras(cameras, 1.2, 4, 16)
    torch.testing.assert_close(frames[1::2], expected, rtol=0, atol=3e-3)  # kept in 16 bits
    middle = resize_and_crop(open_picture(example.pictures[0].path), (64, 64))
    latent = mean_latents(pipeline, to_tensor(middle)[None])[0]
    assert (frames[0] - latent).abs().max() < 0.05 * latent.abs().max()
    assert data.text(example) == "[[multiview]] a shelf"


def matrix_of(values, number):
    return values["frames"][number]["transform_matrix"]


@pytest.mark.parametrize("change, words", [
    (lambda v: v.update(frames=v["frames"][:1]), "transforms.json: lists fewer than two frames"),
    (lambda v: v["frames"][1].update(file_path="lost.png"), "frame 1: own/multiview/shelf/lost.png is not there"),
    (lambda v: v["frames"][2].pop("file_path"), "frame 2 has no file_path"),
    (lambda v: v["frames"][0].update(transform_matrix=[[1, 2]]), "frame 0: its transform_matrix is not 4 rows"),
    (lambda v: v["frames"][0].pop("transform_matrix"), "frame 0: its transform_matrix is not 4 rows"),
    (lambda v: matrix_of(v, 3)[0].__setitem__(0, 5.0), "frame 3: its transform_matrix does not begin with a rotation"),
    (lambda v: v.pop("fl_x"), "has neither a focal length fl_x nor camera_angle_x"),
    (lambda v: v.update(fl_x="long"), "has neither a focal length"),
    (lambda v: [f.update(transform_matrix=matrix_of(v, 0)) for f in v["frames"]], "look at no common point")])
def test_scenes_with_mistakes_are_refused(change, words):
    own_scene(change)
    with pytest.raises(InputError, match=words):
        data_of(config_of(data="own"))


def test_an_angle_or_no_endings_do_as_well():
    def change(values):
        del values["fl_x"]
        values["camera_angle_x"] = 2 * torch.atan(torch.tensor(64 / (2 * 48 * 1.2))).item()
        for frame in values["frames"]:
            frame["file_path"] = frame["file_path"].removesuffix(".png")

    own_scene(change)
    _, data = data_of(config_of(data="own"))
    assert data.trained_as.focal == pytest.approx(1.2)


@pytest.mark.parametrize("names, words", [
    ((), "no such folder"), (("depth2image/source",), "depth2image has no target/"),
    (("lift/target",), "lift has no source/; only the task text2image needs none"),
    (("multiview/target",), "multiview has no scene, such as")])
def test_own_folders_with_mistakes_are_refused(names, words):
    own_folder(*names)
    with pytest.raises(InputError, match=words):
        data_of(config_of(data="own"))


# Mistakes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("", "--task: is needed; choose one of text2image, depth2image, image2depth, image_editing, multiview, camera_pose"),
    ("--task image2text", "--task: invalid choice: 'image2text'"),
    ("--task text2image --source a.png", "--source: text2image is given no picture"),
    ("--task depth2image --source a.png --source b.png", "--source: depth2image is given one picture or none, not 2"),
    ("--task image_editing", "--source: image_editing needs a picture"),
    ("--task camera_pose --source a.png", "--source: camera_pose needs two pictures or more, not 1"),
    ("--task multiview --camera 1", "--camera: 1: expected degrees of azimuth and elevation"),
    ("--task multiview --camera 1,90", "the elevation must be between -90 and 90"),
    ("--task multiview --source a.png --camera 0,0", "--source: 1 pictures leave no view of 1 to draw"),
    ("--task multiview --source a.png --source b.png", "--source: 2 pictures leave no view of 2 to draw"),
    ("--task multiview --views 0", "--source: 0 pictures leave no view of 0 to draw"),
    ("--task depth2image --camera 1,2", "--camera: only multiview follows cameras"),
    ("--task text2image --size 60x64", "--size: 60x64: width and height must be multiples of 8"),
    ("--task multiview --size 64x96", "--size: 64x96: views must be square"),
    ("--task text2image --sampler euler", "--sampler: this adapter draws with flow_euler"),
    ("--task text2image --image a.png", "--image: does not go with this adapter; give pictures as source"),
    ("--task text2image --shift -1", "--shift: must be 0 or more")])
def test_a_mistake_in_drawing_is_one_sentence(flags, words, trained, capsys):
    assert run(trained, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and words in error


def test_a_task_that_was_not_trained_is_refused():
    one = onediffusion.TrainedAs(("depth2image",), (64, 64))
    two = onediffusion.TrainedAs(("text2image", "multiview"), (64, 64))
    assert onediffusion.trained_task(one, None) == onediffusion.trained_task(one, "image2depth") == "depth2image"
    assert onediffusion.trained_task(two, "camera_pose") == "multiview"
    for task, words in ((None, "is needed"), ("image2text", "was not trained"), ("depth2image", "was not trained")):
        with pytest.raises(ParameterError, match=f"{words}; choose one of text2image, multiview, camera_pose"):
            onediffusion.trained_task(two, task)


@pytest.mark.parametrize("settings, words", [
    ({"tasks": "depth2image,dream"}, "tasks: 'dream' is unknown"), ({"hidden_size": 100}, "must be a multiple of 96"),
    ({"clean": 1.5}, "clean: must be at most 1"), ({"lora_rank": 4}, "lora_rank: needs start"),
    ({"balanced": True}, "balanced: a velocity's loss"), ({"min_snr": 5.0}, "min_snr: a velocity's loss")])
def test_a_mistake_in_settings_is_one_sentence(settings, words):
    with pytest.raises(ParameterError, match=words):
        config_of(**settings)


def test_files_that_do_not_fit_are_refused(trained, capsys):
    tensors = read_weights(trained / "diffusion_pytorch_model.safetensors")
    save_weights(tensors, "alone/diffusion_pytorch_model.safetensors", {"paper": "onediffusion", "onediffusion": "{"})
    assert run("alone", "--task", "text2image") == 2
    assert "its metadata does not say how it was trained" in capsys.readouterr().err
    other = replace(TINY, caption_channels=40, in_channels=16)
    onediffusion.write_json(onediffusion.config_to_json(other), trained.parent / "other" / "config.json")
    values = {"tasks": ["text2image"], "size": [64, 64]}
    save_weights(network(other).state_dict(), trained.parent / "other" / "diffusion_pytorch_model.safetensors",
                 {"paper": "onediffusion", "onediffusion": json.dumps(values)})
    assert run(trained.parent / "other", "--task", "text2image") == 2
    assert "takes latents of 16 channels and text of 40, this model has 4 and 40" in capsys.readouterr().err


# The benchmark ------------------------------------------------------------------------------------

def benchmark():
    """The program in tests/benchmarks as a module; the paper has the same name."""
    folder = Path(__file__).parent / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_onediffusion", folder / "onediffusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_toy_run_of_the_benchmark_is_kept_and_not_repeated(tmp_path):
    program = benchmark()
    flags = ["--size", "toy", "--model", str(tiny.folder()), "--runs", str(tmp_path), "--only", "all tasks"]
    lines = []
    program.main(flags, lines.append)
    row, then = json.loads((tmp_path / "toy.json").read_text())["results"]
    assert row["name"] == "all tasks" and len(lines) == 2
    assert then["name"] == "all tasks, then shift 3" and then["steps of training"] == 2 + 1
    assert then["made"]["flags"] == row["made"]["flags"] and "--shift" in then["made"]["then"]
    names = {"text2image", "deblurring", "super_resolution", "image_inpainting", "image_editing", "subject_driven",
             "multiview", "camera_pose", "joint", "composed"}
    for kind in ("depth", "normals", "semanticmap", "boundingbox", "canny"):
        names |= {f"{kind}2image", f"image2{kind}"}
    assert set(row["scores"]) == names
    assert row["scores"]["deblurring"]["copied"] > row["scores"]["deblurring"]["PSNR"]
    program.main(flags, lines.append)
    assert len(lines) == 2  # nothing was left to do


@pytest.mark.slow
def test_a_training_of_the_benchmark_can_be_stopped_and_is_measured(tmp_path, monkeypatch):
    program = benchmark()
    monkeypatch.setitem(program.SIZES, "toy", program.SIZES["toy"]._replace(few_steps=100_000))
    flags = ["--size", "toy", "--model", str(tiny.folder()), "--runs", str(tmp_path), "--only", "single, deblurring",
             "--first-seed", "2", "--minutes", "0.2"]
    program.main(flags, lambda line: None)
    row, = json.loads((tmp_path / "toy.json").read_text())["results"]
    assert row["seed"] == 2 and "100000" in row["made"]["flags"]
    assert 10 <= row["steps of training"] < 100_000
    assert row["scores"]["deblurring"]["PSNR"] > 5


def test_the_benchmark_knows_good_maps_from_bad_ones():
    program = benchmark()
    for task, key, best in (("depth2image", "abs_rel", 0.001), ("normals2image", "degrees", 1.0),
                            ("canny2image", "F1", None), ("semanticmap2image", "mIoU", None)):
        pairs = TASKS[WORLD_TASKS[task]](0, range(3))
        good = program.map_scores(task, pairs.source, pairs)[key]
        bad = program.map_scores(task, pairs.source.roll(1, 0), pairs)[key]
        assert (good < best and bad > 5 * best) if best else (good > 0.99 and bad < 0.8)
