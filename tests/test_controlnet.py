"""ControlNet: official keys, diffusers' values, files, whole pipelines, sample.py's flags and the recipe."""

import json
from dataclasses import replace

import peers
import pytest
import tiny
import torch
from single_files import ldm_controlnet
from single_files import tiny as small
from test_pipeline import assert_same, final, mine, peer, picture
from torch import nn

import sample
import train
from minipic.common import InputError
from minipic.image import open_picture, save_new
from minipic.layouts import Uninitialised, load_part, open_controlnet, open_model, save_part
from minipic.methods import controlnet, t2i
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.unet import SD15, SDXL_BASE, UNet
from minipic.pipeline import Pipeline
from minipic.weights import read_weights, save_weights
from minipic.world.tasks import TASKS
from tiny import NEGATIVE, PROMPT

FULL = ControlNetConfig()
MID = replace(FULL, transformer_layers_per_block=(0, 0, 1))
SMALL = replace(FULL, transformer_layers_per_block=(0, 0, 0), down_block_types=("DownBlock2D",) * 3)
OF_SD15 = ControlNetConfig.from_json({"cross_attention_dim": 768})
SIZES = {"full": (FULL, 844, 1_251_014_160), "mid": (MID, 224, 272_586_000), "small": (SMALL, 140, 160_111_120),
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


def meta(build):
    with torch.device("meta"), Uninitialised():
        return build()


def diffusers_model(config):
    return pytest.importorskip("diffusers").ControlNetModel.from_config(config.to_json())


# The network ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", SIZES)
def test_full_size_keys_and_shapes(size):
    config, tensors, parameters = SIZES[size]
    table = peers.key_table(meta(lambda: ControlNet(config)))
    assert table[:2] == (tensors, parameters)
    assert table == peers.key_table(meta(lambda: diffusers_model(config)))


def test_configs_are_the_presets():
    assert ControlNetConfig.from_json(FILE) == FULL
    assert ControlNetConfig.from_json(FILE | {"transformer_layers_per_block": [0, 0, 1]}) == MID
    assert all(getattr(OF_SD15, key) == getattr(SD15, key) for key in vars(OF_SD15) if hasattr(SD15, key))
    assert ControlNetConfig.from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL
    written = json.loads(meta(lambda: diffusers_model(MID)).to_json_string())
    assert ControlNetConfig.from_json(written) == MID


@pytest.mark.parametrize("change", [
    {"global_pool_conditions": True}, {"controlnet_conditioning_channel_order": "bgr"}, {"colour": 1},
    {"mid_block_type": "UNetMidBlock2D"}, {"down_block_types": ["AttnDownBlock2D"] * 3}])
def test_what_the_network_cannot_be_is_refused_by_name(change):
    name, = change if "down_block_types" not in change else ["AttnDownBlock2D"]
    with pytest.raises(InputError, match=f"some/config.json.*{name}"):
        ControlNetConfig.from_json(FILE | change, "some/config.json")


def filled(unet, factor=8):
    """A ControlNet for a UNet with random weights everywhere."""
    model = peers.fill(ControlNet.from_unet(unet, factor))
    for conv in model.controlnet_cond_embedding.modules():
        if isinstance(conv, nn.Conv2d):  # which `fill` takes for a table and leaves large
            conv.weight.data /= conv.weight[0].numel() ** 0.5
    return model


class Both(nn.Module):
    def __init__(self, unet, controlnet):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet


def ours(both, x, t, context, hint, pooled=None, size_ids=None):
    residuals = both.controlnet(x, t, context, hint, pooled, size_ids, 0.7)
    return {"prediction": both.unet(x, t, context, pooled, size_ids, residuals), **named(residuals)}


def theirs(both, x, t, context, hint, pooled=None, size_ids=None):
    added = {"text_embeds": pooled, "time_ids": size_ids}
    down, mid = both.controlnet(x, t, context, hint, 0.7, added_cond_kwargs=added, return_dict=False)
    made = both.unet(x, t, context, added_cond_kwargs=added, down_block_additional_residuals=down,
                     mid_block_additional_residual=mid)
    return {"prediction": made.sample, **named([*down, mid])}


def named(residuals):
    return {f"residual {i}": x for i, x in enumerate(residuals)}


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_values_and_gradients_are_those_of_diffusers(name):
    _, unet, _ = peers.ours("unet", name)
    _, other, _ = peers.peer("unet", name)
    mine = filled(unet)
    model, expected = Both(unet, mine), Both(other, diffusers_model(mine.config))
    expected.controlnet.load_state_dict(mine.state_dict())
    hint = peers.numbers((2, 3, 80, 112), 4) / 4 + 0.5
    given = lambda: peers.inputs("unet", unet.config) | {"hint": hint.clone()}  # a run keeps its gradients in them
    found, right = peers.run(ours, model, given())[0], peers.run(theirs, expected, given())[0]
    assert found.keys() == right.keys() and len(found) == len(mine.skips) + 2
    assert max(peers.distance(found[key], right[key]) for key in right) <= 1e-6
    model.double().zero_grad(), expected.double().zero_grad()
    found, right = peers.run(ours, model, given())[1], peers.run(theirs, expected, given())[1]
    assert found.keys() == right.keys()
    floor = 1e-6 * max(g.abs().max() for g in right.values())
    for key, gradient in right.items():
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
    residuals = model(given["x"], given["t"], given["context"], hint, given["pooled"], given["size_ids"])
    assert torch.equal(unet(**given, residuals=residuals), outputs(unet, **given)["prediction"])
    unet(**given, residuals=residuals).sum().backward()
    assert all(conv.weight.grad.abs().max() > 0 for conv in (*model.controlnet_down_blocks, model.controlnet_mid_block))
    assert 0.8 < model.controlnet_cond_embedding(hint).std() < 1.25  # or it learns very late to look at the map
    model.checkpointing = True
    again = model(given["x"], given["t"], given["context"], hint, given["pooled"], given["size_ids"])
    assert all(map(torch.equal, again, residuals))
    assert ControlNet.from_unet(unet, 4).config.misfit(unet.config, 4) is None is model.config.misfit(unet.config, 8)
    assert model.config.misfit(replace(unet.config, in_channels=9), 8) is None  # an inpainting UNet: it sees x alone
    assert model.config.misfit(replace(unet.config, out_channels=16), 8) == "takes 4 channels and the UNet makes 16"


# Files and pipelines ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind of model: the folder of a random ControlNet for it, ("another", kind): that of another}."""
    found = {}
    for kind in ("sdxl", "sd15"):
        found[kind], found["another", kind] = tmp_path_factory.mktemp(kind), tmp_path_factory.mktemp(kind)
        model = filled(mine(kind).unet, 4)
        save_part(model, found[kind])
        for p in model.parameters():
            p.data = p.data.roll(1)
        save_part(model, found["another", kind])
    return found


def test_files_come_back_and_diffusers_reads_them(folders):
    ControlNetModel = pytest.importorskip("diffusers").ControlNetModel
    found, written = (controlled(folders["sdxl"]).controlnet.state_dict(),
                      read_weights(folders["sdxl"] / "diffusion_pytorch_model.safetensors"))
    other = ControlNetModel.from_pretrained(folders["sdxl"]).state_dict()
    assert found.keys() == written.keys() == other.keys()
    assert all(torch.equal(found[name], x) and torch.equal(other[name], x) for name, x in written.items())


def controlled(folder, model=None, **load):
    """The pipeline of a tiny model with the ControlNet in `folder`."""
    pipeline = Pipeline.load(model or tiny.folder(), **load)
    pipeline.add_control(folder)
    return pipeline


WRONG = {
    "nowhere": (lambda folder: folder / "nowhere", "nowhere.*cannot read it"),
    "file of sd15": (lambda folder: weights(folder.with_name("sd15")), r"has block_out_channels=\(16, 32\) and"),
    "wrong file": (lambda folder: weights(tiny.folder() / "unet"), "is a UNet alone; expected an ordinary ControlNet"),
    "lost of file": (lambda folder: weights(rewritten(folder, lose="controlnet_mid_block.bias")), "1 missing .contr"),
    "lost width": (lambda folder: weights(rewritten(folder, lose="down_blocks.1.resnets.0.conv1.bias")), "=.16, 0, 3"),
    "lost hint": (lambda folder: weights(rewritten(folder, lose="controlnet_cond_embedding.conv_in.bias")), "1 mis"),
    "one tensor": (lambda folder: weights(rewritten(folder, keep="controlnet_mid_block.bias")), r"=\(\) and the UNet"),
    "half a file": (lambda folder: weights(rewritten(folder, cut=1000)), "is truncated"),
    "shuffle": (lambda folder: weights(folder).rename(folder / "a_shuffle.safetensors"), "one that averages over"),
    "model": (lambda folder: tiny.folder(), "is a whole model; expected a ControlNet"),
    "unet": (lambda folder: tiny.folder() / "unet", "describes a UNet2DConditionModel; expected a ControlNetModel"),
    "of sd15": (lambda folder: folder.with_name("sd15"), r"has block_out_channels=\(16, 32\) and the UNet \(16, 32, "),
    "factor": (lambda folder: rewritten(folder, ControlNet.from_unet(mine().unet)), "of 8 times .* of 4 times"),
    "lost": (lambda folder: rewritten(folder, lose="controlnet_mid_block.bias"), "1 missing .controlnet_mid_bl"),
    "half": (lambda folder: rewritten(folder, cut=1000), "diffusion_pytorch_model.safetensors"),
}


def weights(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def rewritten(folder, model=None, lose=None, keep=None, cut=None):
    """The folder with another ControlNet, without a tensor, with one alone, or with its weights cut off."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if model:
        save_part(model, folder)
    if lose or keep:
        found = read_weights(path)
        save_weights({name: x for name, x in found.items() if name == keep or (lose and name != lose)}, path)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_control_net_for_this_model_is_refused(case, tmp_path):
    for kind in ("sdxl", "sd15"):
        save_part(ControlNet.from_unet(mine(kind).unet, 4), tmp_path / kind)
    damage, words = WRONG[case]
    with pytest.raises(InputError, match=words) as error:
        controlled(damage(tmp_path / "sdxl"), lazy=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", SIZES)
def test_the_config_is_told_from_full_size_shapes(size):
    config, unet = SIZES[size][0], SD15 if size == "sd15" else SDXL_BASE
    table = meta(lambda: ControlNet(config)).state_dict()
    found = ControlNetConfig.told({name: tuple(x.shape) for name, x in table.items()}, unet)
    assert peers.key_table(meta(lambda: ControlNet(found))) == peers.key_table(meta(lambda: ControlNet(config)))
    assert ControlNetConfig.told({name: tuple(x.shape) for name, x in table.items()}, replace(unet, in_channels=9)) == found
    assert found.per_level(found.attention_head_dim) == config.per_level(config.attention_head_dim)
    assert replace(found, transformer_layers_per_block=config.transformer_layers_per_block,
                   use_linear_projection=config.use_linear_projection) == config and found.misfit(unet, 8) is None


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_single_file_in_ldm_names_is_the_same_network(family, prefix, tmp_path):
    unet, path = UNet(small(family)[0]["unet"].config), tmp_path / "control.safetensors"
    model = ControlNet.from_unet(unet)
    for p in model.parameters():
        p.data.normal_()
    named = ldm_controlnet({name: x.half() for name, x in model.state_dict().items()}, unet.config)
    save_weights({prefix + name.removeprefix("control_model."): x for name, x in named.items()}, path)
    part = open_controlnet(path, unet.config, 8)
    found = load_part(part, torch.float32)
    assert all(torch.equal(found.state_dict()[name], x.half().float()) for name, x in model.state_dict().items())
    told = replace(part.config, transformer_layers_per_block=model.config.transformer_layers_per_block)
    assert told == replace(model.config, down_block_types=told.down_block_types)


def test_a_file_of_diffusers_names_draws_as_its_folder(folders, tmp_path):
    for kind in ("sdxl", "sd15"):
        file, folder = tmp_path / f"{kind}.safetensors", folders[kind]
        file.write_bytes(weights(folder).read_bytes())
        expected = final(controlled(folder, tiny.folder(kind)), steps=2, control=[(picture(1), 1.0)])
        assert torch.equal(final(controlled(file, tiny.folder(kind)), steps=2, control=[(picture(1), 1.0)]), expected)


def test_a_control_net_is_no_model(folders):
    with pytest.raises(InputError, match="is a ControlNet; expected a single-file"):
        open_model(folders["sdxl"])


CASES = {"sdxl": ("sdxl", dict(negative=NEGATIVE, control=[(picture(1), 0.7)])),
         "size": ("sdxl", dict(control=[(picture(1).resize((96, 80)), 1.0)], size=(96, 80), guidance=1.0)),
         "image": ("sdxl", dict(control=[(picture(1), 1.0)], image=picture(), strength=0.6)),
         "two": ("sdxl", dict(negative=NEGATIVE, control=[(picture(1), 0.5), (picture(2), 0.7)])),
         "two in sd15": ("sd15", dict(control=[(picture(1), 1.0), (picture(1), 0.3)])),
         "sd15": ("sd15", dict(negative=NEGATIVE, control=[(picture(1), 1.0)]))}


@pytest.mark.parametrize("case", CASES)
def test_final_latents_equal_diffusers(case, folders):
    diffusers, (kind, settings) = pytest.importorskip("diffusers"), CASES[case]
    name, image = f"StableDiffusion{'XL' * (kind == 'sdxl')}", "image" in settings
    base, _ = peer(f"{name}Pipeline", tiny.folder(kind))
    pictures, scales = map(list, zip(*settings["control"]))
    paths = folders[kind], folders["another", kind]
    control = [diffusers.ControlNetModel.from_pretrained(path) for path, _ in zip(paths, scales)]
    one = len(control) == 1
    control, pictures, scales = (x[0] if one else x for x in (control, pictures, scales))
    pipeline = getattr(diffusers, f"{name}ControlNet{'Img2Img' * image}Pipeline")(**base.components, controlnet=control)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(base.scheduler.config)
    given = {"image": settings["image"], "control_image": pictures, "strength": 0.6} if image else {
        "image": pictures}
    expected = pipeline(
        PROMPT, negative_prompt=settings.get("negative"), guidance_scale=settings.get("guidance", 5.0), **given,
        num_inference_steps=8, num_images_per_prompt=2, output_type="latent",
        generator=[torch.Generator().manual_seed(3 + i) for i in range(2)],
        controlnet_conditioning_scale=scales).images
    model = controlled(folders[kind], tiny.folder(kind))
    if not one:
        model.add_control(folders["another", kind])
    found = final(model, **{"steps": 8, "seed": 3, "n": 2, "sampler": "euler", **settings})
    assert_same(found, expected)
    assert (found - final(model, **{"steps": 8, "seed": 3, "n": 2, **settings, "control": ()})).abs().max() > 0.1


def test_off_is_the_same_bits_and_lazy_is_the_same(folders):
    lazy = controlled(folders["sdxl"], lazy=True)
    plain = final(mine(), steps=2)
    assert torch.equal(final(lazy, steps=2, control=[(picture(1), 0.0)]), plain)
    assert next(lazy.controlnet.parameters()).is_meta
    whole, found = controlled(folders["sdxl"]), final(lazy, steps=2, control=[(picture(1), 1.0)])
    assert torch.equal(found, final(whole, steps=2, control=[(picture(1), 1.0)])) and not torch.equal(found, plain)
    half = controlled(folders["sdxl"], dtype=torch.bfloat16)
    assert next(half.controlnet.parameters()).dtype == torch.bfloat16
    assert (final(half, steps=2, control=[(picture(1), 1.0)]) - found).std() < 0.1 * found.std()


def test_several_add_up_and_each_has_its_own_picture_and_scale(folders):
    first, second = (picture(1), 0.5), (picture(2), 0.7)
    both, other = controlled(folders["sdxl"]), controlled(folders["another", "sdxl"])
    both.add_control(folders["another", "sdxl"])
    assert both.controlnets == ["controlnet", "controlnet_2"] and final(both, steps=2).equal(final(mine(), steps=2))
    found = final(both, steps=2, control=[first, second])
    alone = {"first": final(controlled(folders["sdxl"]), steps=2, control=[first]),
             "second": final(other, steps=2, control=[second])}
    assert torch.equal(final(both, steps=2, control=[first, (picture(2), 0.0)]), alone["first"])
    assert torch.equal(final(both, steps=2, control=[(picture(1), 0), second]), alone["second"])
    assert all((found - x).abs().max() > 1e-3 for x in alone.values())
    assert (found - final(both, steps=2, control=[second, first])).abs().max() > 1e-3
    lazy = controlled(folders["sdxl"], lazy=True)
    lazy.add_control(folders["another", "sdxl"])
    assert torch.equal(final(lazy, steps=2, control=[first, second]), found)
    with pytest.raises(InputError, match="--control: 1 for 2 ControlNets; give one for each"):
        final(both, steps=2, control=[first])


# sample.py --------------------------------------------------------------------------------------------------------

def run(*flags):
    return sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", "--steps", "2", "--n", "1", *flags])


def test_flags_reach_the_pipeline_and_come_back_with_from(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("control.png")
    assert run("--controlnet", str(folders["sdxl"]), "--control", "control.png", "--control-scale", "0.5") == 0
    expected, = controlled(folders["sdxl"]).generate(PROMPT, steps=2, control=[(picture(1), 0.5)])
    assert open_picture("pictures/picture.png").tobytes() == expected.tobytes()
    assert sample.main(["--from", "pictures/picture.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == expected.tobytes()
    picture(2).save("other.png")
    flags = ["--from", "pictures/picture.png", "--device", "cpu", "--out", "changed.png"]  # flags win
    assert sample.main([*flags, "--control", "other.png", "--control-scale", "0.9"]) == 0
    expected, = controlled(folders["sdxl"]).generate(PROMPT, steps=2, control=[(picture(2), 0.9)])
    assert open_picture("changed.png").tobytes() == expected.tobytes()


def test_flags_are_paired_in_order(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("1.png"), picture(2).save("2.png")
    first, second = (str(folders[name]) for name in ("sdxl", ("another", "sdxl")))
    assert run("--controlnet", first, "--control", "1.png", "--control-scale", "0.5",
               "--controlnet", second, "--control", "2.png", "--control-scale", "0.7") == 0
    model = controlled(first)
    model.add_control(second)
    expected, = model.generate(PROMPT, steps=2, control=[(picture(1), 0.5), (picture(2), 0.7)])
    assert open_picture("pictures/picture.png").tobytes() == expected.tobytes()
    assert sample.main(["--from", "pictures/picture.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("kept", [{"controlnet": "A", "control": "a.png", "control_scale": 0.5},
                                  {"controlnet": None, "control": None, "control_scale": 1.0}])
def test_pictures_that_keep_one_value_can_still_be_drawn_from(kept, tmp_path):
    path = save_new(picture(1), tmp_path / "old.png", {**vars(sample.Settings()), "prompt": PROMPT, **kept})
    found = sample.read_flags(["--from", str(path)])
    assert (found.controlnet, found.control) == ((("A",), ("a.png",)) if kept["control"] else ((), ()))
    assert found.control_scale == (kept["control_scale"],)
    assert sample.read_flags(["--from", str(path), "--control", "b.png"]).control == ("b.png",)
    if not kept["control"]:
        assert sample.open_controls(found) == []


@pytest.mark.parametrize("flags, words", [
    ("--control control.png", "--control: needs --controlnet"),
    ("--controlnet HERE", "needs --control, the picture to follow"),
    ("--controlnet HERE --controlnet HERE --control control.png", "2 times, --control 1 and --control-scale 1; give"),
    ("--controlnet HERE --control control.png --control-scale 1 --control-scale 0", "1 and --control-scale 2"),
    ("--controlnet HERE --control control.png --control control.png", "is given 1 times, --control 2"),
    ("--controlnet HERE --control nowhere.png", "nowhere.png: no such picture"),
    ("--controlnet nowhere --control control.png", "nowhere"),
    ("--controlnet HERE --control control.png --control-scale -1", "--control-scale -1.0: choose 0"),
    ("--controlnet HERE --control control.png --control-scale nan", "--control-scale: invalid float value: 'nan'"),
    ("--controlnet HERE --control control.png --control-scale much", "argument --control-scale: invalid float")])
def test_a_wrong_value_is_one_sentence(flags, words, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(1).save("control.png")
    assert run(*flags.replace("HERE", str(folders["sdxl"])).split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1 and words in output.err
    assert not output.out and not list(tmp_path.glob("pictures/*.png"))


# The recipe -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("control", ["edges", "depth", "segmentation"])
def test_pairs_are_the_worlds(control):
    config = controlnet.Recipe(control=control, scenes=3, batch=4, drop=0.0, precision="fp32", model=str(tiny.folder()))
    pipeline = controlnet.build(config)
    batch = controlnet.data(pipeline, config)(0, range(4))
    pairs, said = TASKS[control](0, range(3)), TASKS["edges"](0, range(3)).prompts  # of the scenes, for every map
    for hint, row, caption in zip(batch["hint"], batch["rows"], batch["captions"]):
        assert (hint * 2 - 1 - pairs.source[row]).abs().max() < 1 / 255 and caption == said[row]
    assert batch["hint"].shape == (4, 3, 64, 64) and 0 <= batch["hint"].min() and batch["hint"].max() <= 1
    assert batch["x0"].shape == (4, 4, 16, 16) and batch["size_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]


def test_loss_begins_as_t2i_and_every_trained_weight_gets_a_gradient():
    config = controlnet.Recipe(scenes=4, precision="fp32", model=str(tiny.folder()))
    pipeline = controlnet.build(config)
    params, batch = controlnet.setup(pipeline, config), controlnet.data(pipeline, config)(0, range(4))
    assert torch.equal(controlnet.loss(pipeline, batch, config), t2i.loss(pipeline, batch, t2i.Recipe()))
    pipeline.requires_grad_(False)
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in params], 1e-3)
    losses = []
    for _ in range(8):
        losses.append(controlnet.loss(pipeline, batch, config))
        optimizer.zero_grad(), losses[-1].backward(), optimizer.step()
    assert all(p.grad is not None for p in params) and losses[-1] < losses[0]
    assert {id(p) for p in params} == {id(p) for p in pipeline.controlnet.parameters()}


def test_from_the_command_to_a_picture(tmp_path):
    flags = ["--model", str(tiny.folder()), "--out", str(tmp_path), "--scenes", "4", "--batch", "2", "--steps", "2"]
    assert train.main(["controlnet", *flags, "--control", "depth", "--checkpointing"]) == 0  # in bf16, its default
    assert (tmp_path / "samples" / "step-000002.png").exists()
    model = controlled(tmp_path / "model")
    example = open_picture(tmp_path / "model" / "example.png")
    drawn, = model.generate(PROMPT, steps=2, control=[(example, 1.0)])
    assert drawn.tobytes() != model.generate(PROMPT, steps=2)[0].tobytes()
    state = read_weights(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float16}


def test_a_small_one_is_sdxls_and_its_folder_is_read_by_diffusers(tmp_path):
    model = meta(lambda: ControlNet.from_unet(UNet(SDXL_BASE), small=True))
    assert model.config == SMALL and peers.key_table(model)[:2] == SIZES["small"][1:]
    flags = ["--scenes", "2", "--batch", "2", "--steps", "1", "--sample-every", "0", "--out", str(tmp_path)]
    assert train.main(["controlnet", "--small", "--model", str(tiny.folder()), *flags]) == 0
    mine = controlled(tmp_path / "model").controlnet
    assert not any("transformer_blocks" in name for name in mine.state_dict())
    other = pytest.importorskip("diffusers").ControlNetModel.from_pretrained(tmp_path / "model").state_dict()
    assert other.keys() == mine.state_dict().keys()
    assert all(torch.equal(other[name], x) for name, x in mine.state_dict().items())


def test_a_side_that_does_not_halve_is_refused(capsys):
    assert train.main(["controlnet", "--side", "60"]) == 2
    assert "--side must be a multiple of 16" in capsys.readouterr().err
