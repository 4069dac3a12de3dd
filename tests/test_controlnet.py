"""ControlNet: official keys, diffusers' values, files, whole drawings, flags and the recipe."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import single_files
import tiny
import torch
from torch import nn

import sample
import train
from minipic.common import InputError, ParameterError
from minipic.image import open_picture, save_new
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.unet import SD15, SDXL_BASE, UNet
from minipic.pipeline import Pipeline
from minipic.recipes import controlnet, t2i
from minipic.weights import read_weights, save_weights
from minipic.weights.configs import config_to_json, read_config
from minipic.weights.controlnet import config_from_shapes, find_mismatch, open_controlnet
from minipic.weights.folders import save_part
from minipic.weights.layouts import open_model
from minipic.weights.parts import Uninitialised, load_part
from minipic.world.tasks import TASKS
from pipelines import assert_same, final, final64, peer, run_peer
from tiny import NEGATIVE, PROMPT, picture

FULL = ControlNetConfig()
MID = replace(FULL, transformer_layers_per_block=(0, 0, 1))
SMALL = replace(FULL, transformer_layers_per_block=(0, 0, 0), down_block_types=("DownBlock2D",) * 3)
OF_SD15 = read_config(ControlNetConfig, {"cross_attention_dim": 768})
SIZES = {  # size: (config, number of tensors, of parameters)
    "full": (FULL, 844, 1_251_014_160), "mid": (MID, 224, 272_586_000), "small": (SMALL, 140, 160_111_120),
    "sd15": (OF_SD15, 340, 361_279_120)}
FILE = {  # config.json as the first files for SDXL have it
    "_class_name": "ControlNetModel", "_diffusers_version": "0.20.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None,
    "conditioning_channels": 3, "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "global_pool_conditions": False, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None,
    "only_cross_attention": False, "projection_class_embeddings_input_dim": 2816, "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": [1, 2, 10], "upcast_attention": None, "use_linear_projection": True}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def on_meta(build, *given):
    """What build(*given) makes, without memory for its weights."""
    with torch.device("meta"), Uninitialised():
        return build(*given)


def diffusers_model(config: ControlNetConfig):
    return pytest.importorskip("diffusers").ControlNetModel.from_config(config_to_json(config))


# The network --------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", SIZES)
def test_full_size_keys_and_shapes(size):
    config, tensors, parameters = SIZES[size]
    table = peers.key_table(on_meta(ControlNet, config))
    assert table[:2] == (tensors, parameters)
    assert table == peers.key_table(on_meta(diffusers_model, config))


def test_configs_are_the_presets():
    assert read_config(ControlNetConfig, FILE) == FULL
    assert read_config(ControlNetConfig, FILE | {"transformer_layers_per_block": [0, 0, 1]}) == MID
    assert all(getattr(OF_SD15, key) == getattr(SD15, key) for key in vars(OF_SD15) if hasattr(SD15, key))
    assert read_config(ControlNetConfig, json.loads(json.dumps(config_to_json(SMALL)))) == SMALL
    written = json.loads(on_meta(diffusers_model, MID).to_json_string())
    assert read_config(ControlNetConfig, written) == MID


@pytest.mark.parametrize("change", [
    {"global_pool_conditions": True}, {"controlnet_conditioning_channel_order": "bgr"}, {"colour": 1},
    {"mid_block_type": "UNetMidBlock2D"}, {"down_block_types": ["AttnDownBlock2D"] * 3}])
def test_what_the_network_cannot_be_is_refused_by_name(change):
    name, = change if "down_block_types" not in change else ["AttnDownBlock2D"]
    with pytest.raises(InputError, match=f"some/config.json.*{name}"):
        read_config(ControlNetConfig, FILE | change, "some/config.json")


def filled(unet: UNet, factor: int = 8) -> ControlNet:
    """A ControlNet for a UNet with random weights everywhere."""
    model = peers.fill(ControlNet.from_unet(unet, factor))
    for conv in model.controlnet_cond_embedding.modules():
        if isinstance(conv, nn.Conv2d):  # which `fill` takes for a table and leaves large
            conv.weight.data /= conv.weight[0].numel() ** 0.5
    return model


class Both(nn.Module):
    """A UNet and its ControlNet as one network."""

    def __init__(self, unet, controlnet):
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet


def our_outputs(both, x, t, context, hint, pooled=None, size_ids=None):
    residuals = both.controlnet(x, t, context, hint, pooled, size_ids, 0.7)
    prediction = both.unet(x, t, context, pooled, size_ids, residuals)
    return {"prediction": prediction, **by_name(residuals)}


def peer_outputs(both, x, t, context, hint, pooled=None, size_ids=None):
    added = {"text_embeds": pooled, "time_ids": size_ids}
    down, mid = both.controlnet(x, t, context, hint, 0.7, added_cond_kwargs=added, return_dict=False)
    made = both.unet(x, t, context, added_cond_kwargs=added, down_block_additional_residuals=down,
                     mid_block_additional_residual=mid)
    return {"prediction": made.sample, **by_name([*down, mid])}


def by_name(residuals) -> dict[str, torch.Tensor]:
    return {f"residual {i}": x for i, x in enumerate(residuals)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_values_and_gradients_are_those_of_diffusers(name):
    _, unet, _ = peers.ours("unet", name)
    _, peer_unet, _ = peers.peer("unet", name)
    controlnet = filled(unet)
    model, expected_model = Both(unet, controlnet), Both(peer_unet, diffusers_model(controlnet.config))
    expected_model.controlnet.load_state_dict(controlnet.state_dict())
    hint = peers.numbers((2, 3, 80, 112), 4) / 4 + 0.5

    def given():
        return peers.inputs("unet", unet.config) | {"hint": hint.clone()}  # a run keeps its gradients in them

    found, _ = peers.run(our_outputs, model, given())
    expected, _ = peers.run(peer_outputs, expected_model, given())
    assert found.keys() == expected.keys() and len(found) == len(controlnet.skip_channels) + 2
    assert max(peers.distance(found[key], expected[key]) for key in expected) <= 1e-6

    for each in (model, expected_model):
        each.double().zero_grad()
    _, found = peers.run(our_outputs, model, given())
    _, expected = peers.run(peer_outputs, expected_model, given())
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-9 * max(gradient.abs().max(), floor), key


@pytest.mark.parametrize("small", [False, True])
def test_a_new_one_changes_no_bit_and_learns(small):
    outputs, unet, given = peers.ours("unet", "sdxl")
    given = {key: x.float() for key, x in given.items()}
    torch.manual_seed(0)
    model = ControlNet.from_unet(unet, small=small)
    assert any("transformer_blocks" in name for name in model.state_dict()) != small
    state = unet.state_dict()
    copied = {name for name, x in model.state_dict().items() if name in state and torch.equal(x, state[name])}
    assert set(model.state_dict()) - copied == {name for name in model.state_dict() if name.startswith("controlnet_")}

    hint = torch.rand(1, 3, 80, 112)
    inputs = given["x"], given["t"], given["context"], hint, given["pooled"], given["size_ids"]
    residuals = model(*inputs)
    prediction = unet(**given, residuals=residuals)
    assert torch.equal(prediction, outputs(unet, **given)["prediction"])
    prediction.sum().backward()
    assert all(conv.weight.grad.abs().max() > 0 for conv in (*model.controlnet_down_blocks, model.controlnet_mid_block))
    assert 0.8 < model.controlnet_cond_embedding(hint).std() < 1.25  # or it learns very late to look at the map
    model.enable_gradient_checkpointing()
    assert all(map(torch.equal, model(*inputs), residuals))


def test_whether_it_fits_a_unet_is_said_in_words():
    _, unet, _ = peers.ours("unet", "sdxl")
    config, wide = ControlNet.from_unet(unet).config, replace(unet.config, in_channels=9)
    larger = ControlNet.from_unet(unet, 4).config
    assert find_mismatch(config, unet.config, 8) is None is find_mismatch(larger, unet.config, 4)
    assert find_mismatch(config, wide, 8) is None  # an inpainting UNet: it sees x alone
    sixteen = replace(unet.config, out_channels=16)
    assert find_mismatch(config, sixteen, 8) == "takes 4 channels and the UNet makes 16"
    assert find_mismatch(config, unet.config, 4).startswith("takes 3 channels of 8 times")


# Files and pipelines ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """{kind of model: the folder of a random ControlNet for it, "another KIND": of a second one}."""
    paths = {}
    for kind in ("sdxl", "sd15"):
        model = filled(tiny.model(kind).unet, 4)
        for name in (kind, f"another {kind}"):
            paths[name] = tmp_path_factory.mktemp("controlnet")
            save_part(model, paths[name])
            for param in model.parameters():
                param.data = param.data.roll(1)
    return paths


def controlled(*paths: Path, kind: str = "sdxl", **load) -> Pipeline:
    """The pipeline of a tiny model with the ControlNets at these paths."""
    pipeline = Pipeline.load(tiny.folder(kind), **load)
    for path in paths:
        pipeline.add_controlnet(path)
    return pipeline


@functools.cache
def shared(*paths: Path, kind: str = "sdxl", dtype: torch.dtype = torch.float32) -> Pipeline:
    """`controlled`, loaded once for all tests, none of which may change it.

    In float64 for `final64`, as `load64`.
    """
    pipeline = controlled(*paths, kind=kind).to(dtype)
    pipeline.schedule.table  # made now, in float32
    return pipeline


def test_files_come_back_and_diffusers_reads_them(folders):
    peer_model = pytest.importorskip("diffusers").ControlNetModel
    found = shared(folders["sdxl"]).controlnet.state_dict()
    written = read_weights(folders["sdxl"] / WEIGHTS)
    other = peer_model.from_pretrained(folders["sdxl"]).state_dict()
    assert found.keys() == written.keys() == other.keys()
    assert all(torch.equal(found[name], x) and torch.equal(other[name], x) for name, x in written.items())


WRONG = {  # what is wrong: words of the refusal
    "no such file": "nowhere.*cannot read it",
    "a file for another model": r"block_out_channels: \(16, 32\) here and \(16, 32, 32\) in the UNet",
    "a UNet's file": "is a UNet alone; expected an ordinary ControlNet",
    "a file without a bias": "1 missing .controlnet_mid_block.bias",
    "a file without a width": r"block_out_channels: \(16, 0, 32\) is out of range",
    "a file without the hint's width": r"conditioning_embedding_out_channels: \(0, ",
    "a file of one tensor": r"block_out_channels: \(\) here and",
    "half a file": "is truncated",
    "a file that shuffles": "one that averages over",
    "a whole model": "is a whole model; expected a ControlNet",
    "a UNet's folder": "describes a UNet2DConditionModel; expected a ControlNetModel",
    "a folder for another model": r"has block_out_channels=\(16, 32\) and the UNet \(16, 32, 32\)",
    "a folder for larger latents": "of 8 times .* of 4 times",
    "a folder without a bias": "1 missing .controlnet_mid_block.bias",
    "half a folder": WEIGHTS,
}


def without(file: Path, name: str) -> Path:
    """The file without one of its tensors."""
    tensors = read_weights(file)
    tensors = {key: x.clone() for key, x in tensors.items() if key != name}
    save_weights(tensors, file)
    return file


def halved(file: Path) -> Path:
    """The file with its end cut off."""
    file.write_bytes(file.read_bytes()[:-1000])
    return file


def wrong_path(case: str, folder: Path, other: Path) -> Path:
    """What is given in the place of a ControlNet.

    folder: of a good one, to be damaged. other: of one for SD 1.5.
    """
    file = folder / WEIGHTS
    bias = "controlnet_mid_block.bias"
    match case:
        case "no such file":
            return folder / "nowhere"
        case "a file for another model":
            return other / WEIGHTS
        case "a UNet's file":
            return tiny.folder() / "unet" / WEIGHTS
        case "a file without a bias":
            return without(file, bias)
        case "a file without a width":
            return without(file, "down_blocks.1.resnets.0.conv1.bias")
        case "a file without the hint's width":
            return without(file, "controlnet_cond_embedding.conv_in.bias")
        case "a file of one tensor":
            save_weights({bias: read_weights(file)[bias].clone()}, file)
            return file
        case "half a file":
            return halved(file)
        case "a file that shuffles":
            return file.rename(folder / "a_shuffle.safetensors")
        case "a whole model":
            return tiny.folder()
        case "a UNet's folder":
            return tiny.folder() / "unet"
        case "a folder for another model":
            return other
        case "a folder for larger latents":
            save_part(ControlNet.from_unet(tiny.model().unet), folder)
            return folder
        case "a folder without a bias":
            return without(file, bias).parent
        case "half a folder":
            return halved(file).parent


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_controlnet_for_this_model_is_refused(case, folders, tmp_path):
    for kind in ("sdxl", "sd15"):
        shutil.copytree(folders[kind], tmp_path / kind)
    path = wrong_path(case, tmp_path / "sdxl", tmp_path / "sd15")
    with pytest.raises(InputError, match=WRONG[case]) as error:
        controlled(path, lazy=True)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", SIZES)
def test_the_config_is_read_from_full_size_shapes(size):
    config, unet = SIZES[size][0], SD15 if size == "sd15" else SDXL_BASE
    network = on_meta(ControlNet, config)
    shapes = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    found = config_from_shapes(shapes, unet)
    assert peers.key_table(on_meta(ControlNet, found)) == peers.key_table(network)
    assert config_from_shapes(shapes, replace(unet, in_channels=9)) == found
    assert found.per_level(found.attention_head_dim) == config.per_level(config.attention_head_dim)
    unseen = dict(transformer_layers_per_block=config.transformer_layers_per_block,
                  use_linear_projection=config.use_linear_projection)  # which shapes do not tell
    assert replace(found, **unseen) == config and find_mismatch(found, unet, 8) is None


@pytest.mark.parametrize("prefix", [
    "control_model.", "", "_orig_mod.", "module.control_model.", "control_model.module._orig_mod."])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_single_file_in_ldm_names_is_the_same_network(family, prefix, tmp_path):
    parts, _, _ = single_files.tiny(family)
    unet, path = UNet(parts["unet"].config), tmp_path / "control.safetensors"
    model = ControlNet.from_unet(unet)
    for param in model.parameters():
        param.data.normal_()
    halves = {name: x.half() for name, x in model.state_dict().items()}
    in_ldm_names = single_files.ldm_controlnet(halves, unet.config)
    save_weights({prefix + name.removeprefix("control_model."): x for name, x in in_ldm_names.items()}, path)
    part = open_controlnet(path, unet.config, 8)
    found = load_part(part, torch.float32).state_dict()
    assert found.keys() == halves.keys() and all(torch.equal(found[name], x.float()) for name, x in halves.items())
    config = replace(part.config, transformer_layers_per_block=model.config.transformer_layers_per_block)
    assert config == replace(model.config, down_block_types=config.down_block_types)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_file_of_diffusers_names_draws_as_its_folder(kind, folders):
    settings = dict(steps=2, control=[(picture(1), 1.0)])
    expected = final(shared(folders[kind], kind=kind), **settings)
    assert torch.equal(final(controlled(folders[kind] / WEIGHTS, kind=kind), **settings), expected)


def test_a_controlnet_is_no_model(folders):
    with pytest.raises(InputError, match="is a ControlNet; expected a single-file"):
        open_model(folders["sdxl"])


CASES = {  # name: (kind of model, settings of the drawing)
    "sdxl": ("sdxl", dict(negative=NEGATIVE, control=[(picture(1), 0.7)])),
    "size": ("sdxl", dict(control=[(picture(1).resize((96, 80)), 1.0)], size=(96, 80), guidance=1.0)),
    "image": ("sdxl", dict(control=[(picture(1), 1.0)], image=picture(), strength=0.6)),
    "two": ("sdxl", dict(negative=NEGATIVE, control=[(picture(1), 0.5), (picture(2), 0.7)])),
    "two in sd15": ("sd15", dict(control=[(picture(1), 1.0), (picture(1), 0.3)])),
    "sd15": ("sd15", dict(negative=NEGATIVE, control=[(picture(1), 1.0)])),
}


@functools.cache
def peer_controlnet(path: Path):
    """diffusers' ControlNet with the weights in a folder, in float64."""
    return pytest.importorskip("diffusers").ControlNetModel.from_pretrained(path).double()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_final_latents_equal_diffusers(case, folders):
    diffusers = pytest.importorskip("diffusers")
    kind, settings = CASES[case]
    paths = [folders[kind], folders[f"another {kind}"]][:len(settings["control"])]

    family = "StableDiffusionXL" if kind == "sdxl" else "StableDiffusion"
    base, scheduler = peer(f"{family}Pipeline", tiny.folder(kind))
    networks = [peer_controlnet(path) for path in paths]
    pictures = [followed for followed, _ in settings["control"]]
    scales = [scale for _, scale in settings["control"]]
    if len(paths) == 1:
        networks, pictures, scales = networks[0], pictures[0], scales[0]
    given = {"image": pictures}
    if "image" in settings:
        family += "ControlNetImg2Img"
        given = {"image": settings["image"], "control_image": pictures, "strength": settings["strength"]}
    else:
        family += "ControlNet"
    pipeline = getattr(diffusers, f"{family}Pipeline")(**base.components, controlnet=networks)
    pipeline.set_progress_bar_config(disable=True)
    expected = run_peer(
        pipeline, scheduler, negative_prompt=settings.get("negative"), guidance_scale=settings.get("guidance", 5.0),
        controlnet_conditioning_scale=scales, **given)

    model = shared(*paths, kind=kind, dtype=torch.float64)
    found = final64(model, **settings)
    assert_same(found, expected)
    assert (found - final64(model, **(settings | {"control": ()}))).abs().max() > 0.1


def test_off_is_the_same_bits_and_lazy_is_the_same(folders):
    lazy = controlled(folders["sdxl"], lazy=True)
    plain = final(tiny.model(), steps=2)
    assert torch.equal(final(lazy, steps=2, control=[(picture(1), 0.0)]), plain)
    assert next(lazy.controlnet.parameters()).is_meta
    whole = final(shared(folders["sdxl"]), steps=2, control=[(picture(1), 1.0)])
    found = final(lazy, steps=2, control=[(picture(1), 1.0)])
    assert torch.equal(found, whole) and not torch.equal(found, plain)
    half = controlled(folders["sdxl"], dtype=torch.bfloat16)
    assert next(half.controlnet.parameters()).dtype == torch.bfloat16
    assert (final(half, steps=2, control=[(picture(1), 1.0)]) - found).std() < 0.1 * found.std()


def test_several_add_up_and_each_has_its_own_picture_and_scale(folders):
    first, second = (picture(1), 0.5), (picture(2), 0.7)
    paths = folders["sdxl"], folders["another sdxl"]
    both = shared(*paths)
    assert both.controlnets == ["controlnet", "controlnet_2"]
    assert torch.equal(final(both, steps=2), final(tiny.model(), steps=2))
    found = final(both, steps=2, control=[first, second])
    first_alone = final(shared(paths[0]), steps=2, control=[first])
    second_alone = final(shared(paths[1]), steps=2, control=[second])
    assert torch.equal(final(both, steps=2, control=[first, (picture(2), 0.0)]), first_alone)
    assert torch.equal(final(both, steps=2, control=[(picture(1), 0), second]), second_alone)
    swapped = final(both, steps=2, control=[second, first])
    for other in (first_alone, second_alone, swapped):
        assert (found - other).abs().max() > 1e-3
    assert torch.equal(final(controlled(*paths, lazy=True), steps=2, control=[first, second]), found)
    with pytest.raises(ParameterError, match="control: 1 for 2 ControlNets; give one for each"):
        final(both, steps=2, control=[first])


# sample.py ----------------------------------------------------------------------------------------

@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The test runs in a folder with two pictures to follow."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("1.png")
    picture(2).save("2.png")


def run(*flags: str) -> int:
    """The exit code of `sample.py FLAGS` with the random tiny model, two steps."""
    return sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", "--n", "1", *flags])


def pixels(path: str) -> bytes:
    return open_picture(path).tobytes()


def test_flags_reach_the_pipeline_and_come_back_with_from(folders, inside):
    model = shared(folders["sdxl"])
    assert run("--controlnet", str(folders["sdxl"]), "--control", "1.png", "--control-scale", "0.5") == 0
    expected, = model.generate(PROMPT, steps=2, control=[(picture(1), 0.5)])
    assert pixels("pictures/picture.png") == expected.tobytes()
    again = ["--from", "pictures/picture.png", "--device", "cpu", "--out"]
    assert sample.main([*again, "again.png"]) == 0
    assert pixels("again.png") == expected.tobytes()
    assert sample.main([*again, "changed.png", "--control", "2.png", "--control-scale", "0.9"]) == 0  # flags win
    expected, = model.generate(PROMPT, steps=2, control=[(picture(2), 0.9)])
    assert pixels("changed.png") == expected.tobytes()


def test_flags_are_paired_in_order(folders, inside):
    first, second = folders["sdxl"], folders["another sdxl"]
    assert run("--controlnet", str(first), "--control", "1.png", "--control-scale", "0.5",
               "--controlnet", str(second), "--control", "2.png", "--control-scale", "0.7") == 0
    settings = dict(steps=2, control=[(picture(1), 0.5), (picture(2), 0.7)])
    expected, = shared(first, second).generate(PROMPT, **settings)
    assert pixels("pictures/picture.png") == expected.tobytes()
    assert sample.main(["--from", "pictures/picture.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert pixels("again.png") == expected.tobytes()


@pytest.mark.parametrize("kept", [
    {"controlnet": "A", "control": "a.png", "control_scale": 0.5},
    {"controlnet": None, "control": None, "control_scale": 1.0}])
def test_pictures_that_keep_one_value_can_still_be_drawn_from(kept, tmp_path):
    path = save_new(picture(1), tmp_path / "old.png", {**vars(sample.Settings()), "prompt": PROMPT, **kept})
    found, paper = sample.read_flags(["--from", str(path)])
    assert paper is None and found.prompt == (PROMPT,)
    assert (found.controlnet, found.control) == ((("A",), ("a.png",)) if kept["control"] else ((), ()))
    assert found.control_scale == (kept["control_scale"],)
    changed, _ = sample.read_flags(["--from", str(path), "--controlnet", "B", "--control", "b.png"])
    assert (changed.controlnet, changed.control) == (("B",), ("b.png",))
    if not kept["control"]:
        assert sample.open_controls(found) == []


@pytest.mark.parametrize("flags, words", [
    ("--control 1.png", "--control: needs --controlnet; without it this does nothing"),
    ("--controlnet HERE", "needs --control, the picture to follow"),
    ("--controlnet HERE --controlnet HERE --control 1.png", "2 times, --control 1 and --control-scale 1; give"),
    ("--controlnet HERE --control 1.png --control-scale 1 --control-scale 0", "1 and --control-scale 2"),
    ("--controlnet HERE --control 1.png --control 1.png", "is given 1 times, --control 2"),
    ("--controlnet HERE --control nowhere.png", "nowhere.png: no such picture"),
    ("--controlnet nowhere --control 1.png", "nowhere"),
    ("--controlnet HERE --control 1.png --control-scale -1", "--control-scale: choose 0 (off) to about 2, not -1.0"),
    ("--controlnet HERE --control 1.png --control-scale nan", "--control-scale: invalid float value: 'nan'"),
    ("--controlnet HERE --control 1.png --control-scale much", "--control-scale: invalid float value: 'much'")])
def test_a_wrong_value_is_one_sentence(flags, words, folders, inside, capsys):
    assert run(*flags.replace("HERE", str(folders["sdxl"])).split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1 and words in output.err
    assert not output.out and not Path("pictures/picture.png").exists()


# The recipe ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("control", ["edges", "depth", "segmentation"])
def test_pairs_are_the_worlds(control):
    config = controlnet.Settings(control=control, scenes=3, batch=4, caption_dropout=0.0, precision="fp32",
                                 model=str(tiny.folder()))
    pipeline = controlnet.build(config)
    batch = controlnet.data(pipeline, config).batch(0, range(4))
    pairs = TASKS[control](0, range(3))
    captions = TASKS["edges"](0, range(3)).prompts  # of the scenes, for every map
    for hint, row, caption in zip(batch["hint"], batch["rows"], batch["captions"]):
        assert (hint * 2 - 1 - pairs.source[row]).abs().max() < 1 / 255 and caption == captions[row]
    assert batch["hint"].shape == (4, 3, 64, 64) and 0 <= batch["hint"].min() and batch["hint"].max() <= 1
    assert batch["x0"].shape == (4, 4, 16, 16) and batch["size_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]


def test_loss_begins_as_t2i_and_every_trained_weight_gets_a_gradient():
    config = controlnet.Settings(scenes=4, precision="fp32", model=str(tiny.folder()))
    pipeline = controlnet.build(config)
    params, batch = controlnet.setup(pipeline, config), controlnet.data(pipeline, config).batch(0, range(4))
    assert torch.equal(controlnet.loss(pipeline, batch, config), t2i.loss(pipeline, batch, t2i.Settings()))
    pipeline.requires_grad_(False)
    optimizer = torch.optim.AdamW([param.requires_grad_() for param in params], 1e-3)
    losses = []
    for _ in range(8):
        losses.append(controlnet.loss(pipeline, batch, config))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(param.grad is not None for param in params) and losses[-1] < losses[0]
    assert {id(param) for param in params} == {id(param) for param in pipeline.controlnet.parameters()}


@pytest.mark.slow
def test_from_the_command_to_a_picture(tmp_path):
    flags = ["--model", str(tiny.folder()), "--out", str(tmp_path), "--scenes", "4", "--batch", "2", "--steps", "2"]
    with tiny.short_drawings():  # in bf16 where the CPU has it
        assert train.main(["controlnet", *flags, "--control", "depth", "--gradient-checkpointing"]) == 0
    assert (tmp_path / "samples" / "step-000002.png").exists()
    model = controlled(tmp_path / "model")
    example = open_picture(tmp_path / "model" / "example.png")
    drawn, = model.generate(PROMPT, steps=2, control=[(example, 1.0)])
    assert drawn.tobytes() != model.generate(PROMPT, steps=2)[0].tobytes()
    state = read_weights(tmp_path / "model" / WEIGHTS)
    assert {x.dtype for x in state.values()} == {torch.float16}


def small_for_sdxl() -> ControlNet:
    return ControlNet.from_unet(UNet(SDXL_BASE), small=True)


def test_a_small_one_is_sdxls_and_its_folder_is_read_by_diffusers(tmp_path):
    model = on_meta(small_for_sdxl)
    assert model.config == SMALL and peers.key_table(model)[:2] == SIZES["small"][1:]
    flags = ["--scenes", "2", "--batch", "2", "--steps", "1", "--sample-every", "0", "--out", str(tmp_path)]
    assert train.main(["controlnet", "--small", "--model", str(tiny.folder()), *flags]) == 0
    state = controlled(tmp_path / "model").controlnet.state_dict()
    assert not any("transformer_blocks" in name for name in state)
    other = pytest.importorskip("diffusers").ControlNetModel.from_pretrained(tmp_path / "model").state_dict()
    assert other.keys() == state.keys()
    assert all(torch.equal(other[name], x) for name, x in state.items())


def test_a_resolution_that_does_not_halve_is_refused(capsys):
    assert train.main(["controlnet", "--resolution", "60"]) == 2
    assert "--resolution: must be a multiple of 16" in capsys.readouterr().err
