"""Files in and out: every layout gives the same networks, and a damaged or foreign file is refused in one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import ldm_vae, networks, old_vae, single_file, tiny

from minipic import layouts, weights
from minipic.common import InputError
from minipic.diffusion.schedule import Schedule
from minipic.weights import read_header, read_weights, save_weights

FAMILIES = list(layouts.SINGLE_FILES)
PICKLE = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix"


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def loaded(parts, **kinds):
    return {name: layouts.load_part(part, **kinds).state_dict() for name, part in parts.items()}


def states(models):
    return {name: model.state_dict() for name, model in models.items()}


def all_equal(a, b):
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def models():
    """{family: tiny networks with random fp16 weights}"""
    return {family: networks(tiny(family)[0]) for family in FAMILIES}


@pytest.fixture
def folder(tmp_path, models):
    layouts.save_folder(tmp_path / "model", models["sdxl"], *tiny("sdxl")[1:])
    return tmp_path / "model"


def raw(path, header, data=b""):
    """A file with this header (JSON value, or bytes as they are), whatever its data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_weights_come_back(tmp_path):
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(3, 5), "half": torch.randn(7).half(), "brain": torch.randn(2, 2).bfloat16(),
               "double": torch.randn(3).double(), "count": torch.tensor(12), "none": torch.empty(0, 4),
               "flags": torch.tensor([True, False]), "state": torch.arange(9, dtype=torch.uint8),
               "turned": torch.randn(4, 6).T, "wide": torch.randn(600, 600)}  # wide: several pieces in is_finite
    save_weights(tensors, tmp_path / "deep" / "w.safetensors", {"step": "3"})
    back = read_weights(tmp_path / "deep" / "w.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert read_header(tmp_path / "deep" / "w.safetensors")[1] == {"format": "pt", "step": "3"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_a_long_header_is_no_damage(tmp_path):
    notes = {"tags": "x" * (9 << 20)}
    save_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors", notes)
    assert read_header(tmp_path / "w.safetensors")[1]["tags"] == notes["tags"] and read_weights(tmp_path / "w.safetensors")


def test_changing_a_loaded_tensor_leaves_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(4)}, path)
    read_weights(path)["a"].mul_(2)
    assert read_weights(path)["a"].tolist() == [1, 1, 1, 1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(4)}, path)
    with pytest.raises(InputError, match=r"w\.safetensors: cannot write"):
        with weights.replacing(path, 16) as temporary:
            temporary.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
    assert read_weights(path)["a"].tolist() == [1, 1, 1, 1] and [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_weights({"a": torch.ones(4)}, tmp_path / "file" / "w.safetensors")


DAMAGED = {  # name: (header or None for bytes as they are, data, words of the message)
    "empty": (None, b"", "is empty"),
    "short": (None, b"\x01\x02", "truncated to 2 bytes"),
    "pickle": (None, PICKLE, "a pickle"),
    "zip pickle": (None, b"PK\x03\x04" + bytes(40), "a pickle"),
    "web page": (None, b"<!DOCTYPE html><html>sign in</html>", "a web page"),
    "lfs pointer": (None, b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git-lfs pointer"),
    "json": (None, b'{"error": "Repository not found"}', "text (JSON)"),
    "noise": (None, bytes(range(7, 99)), "not a safetensors file"),
    "huge header": (None, (1 << 40).to_bytes(8, "little") + b'{"a":1}', "not a safetensors file"),
    "cut in header": (None, (500).to_bytes(8, "little") + b'{"a": {"dtype"', "is truncated"),
    "broken json": (b'{"a": {"dtype": "F32",,}}', b"", "not valid JSON"),
    "deep json": (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "twice": (b'{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "w": {"dtype":"F32","shape":[2],'
              b'"data_offsets":[0,8]}}', bytes(8), "'w' is in the header twice"),
    "no entry": ({"w": 3}, b"", "tensor 'w'"),
    "extra field": ({"w": entry() | {"x": 1}}, bytes(8), "tensor 'w'"),
    "dtype": ({"w": entry("F8_E4M3", (8,))}, bytes(8), "tensor 'w' is stored as F8_E4M3"),
    "negative shape": ({"w": entry(shape=(-1, -2))}, bytes(8), "tensor 'w'"),
    "overflow": ({"w": entry(shape=(0, 2**62, 2**62), end=0)}, b"", "tensor 'w'"),
    "true shape": ({"w": entry(shape=(True, 2))}, bytes(8), "tensor 'w'"),
    "wrong size": ({"w": entry(shape=(3,))}, bytes(8), "tensor 'w' has 8 bytes, but F32 [3] takes 12"),
    "gap": ({"v": entry(), "w": entry(start=12, end=20)}, bytes(20), "tensor 'w' begins"),
    "overlap": ({"v": entry(), "w": entry(start=4, end=12)}, bytes(12), "tensor 'w' begins"),
    "cut in data": ({"v": entry(), "w": entry(start=8, end=16)}, bytes(12), "tensor 'w' ends at byte 16"),
    "trailing": ({"v": entry()}, bytes(9), "1 bytes after"),
    "nan": ({"v": entry(), "w": entry(start=8, end=16)}, bytes(12) + b"\x00\x00\xc0\x7f", "tensor 'w' holds NaN"),
    "infinity": ({"w": entry("F16", (2,), 0, 4)}, b"\x00\x00\x00\xfc", "tensor 'w' holds NaN or infinity"),
    "bf16 nan": ({"w": entry("BF16", (2,), 0, 4)}, b"\xff\xff\x00\x00", "tensor 'w' holds NaN"),
    "f64 nan": ({"w": entry("F64", (1,))}, b"\x00\x00\x00\x00\x00\x00\xf0\x7f", "tensor 'w' holds NaN"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path, kind):
    header, data, words = DAMAGED[kind]
    path = tmp_path / "some file.safetensors"
    path.write_bytes(data) if header is None else raw(path, header, data)
    with pytest.raises(InputError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message


@pytest.mark.parametrize("values", [[65504.0, -65504.0, 0.0, -0.0], [6e-8, -6e-8]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_and_small_numbers_are_finite(values, dtype):
    x = torch.tensor(values, dtype=dtype)
    assert weights.is_finite(x) and weights.is_finite(x[0]) and weights.is_finite(x[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not weights.is_finite(torch.tensor([1.0] * 300_000 + [bad], dtype=dtype))


def test_paths_that_are_not_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError, match=str(path)):
            read_weights(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_and_folder_give_the_same_networks(tmp_path, models, family):
    parts, index, scheduler = tiny(family)
    save_weights(single_file(family, models[family]), tmp_path / "one.safetensors")
    layouts.save_folder(tmp_path / "folder", models[family], index, scheduler)
    one = layouts.from_single_file(tmp_path / "one.safetensors", *tiny(family))
    many = layouts.open_model(tmp_path / "folder")
    assert all_equal(loaded(one.parts), states(models[family]))
    assert all_equal(loaded(many.parts), states(models[family]))
    assert many.scheduler == one.scheduler
    assert {k: many.index.get(k) for k in one.index} == one.index
    assert {name: part.config for name, part in one.parts.items()} == {n: part.config for n, part in many.parts.items()}


def test_converting_while_loading(monkeypatch, folder, models):
    """The same values as converting afterwards, however the file is cut into groups."""
    parts = layouts.open_model(folder).parts
    wanted = {name: {key: x.bfloat16() for key, x in s.items()} for name, s in states(models["sdxl"]).items()}
    for group in (1, 5000, 1 << 28):
        monkeypatch.setattr(weights, "GROUP", group)
        assert all_equal(loaded(parts, dtype=torch.bfloat16), wanted)


def test_convolutions_are_channels_last_in_memory_in_16_bits_and_plain_on_disk(folder, tmp_path):
    part = layouts.open_model(folder).parts["unet"]
    plain, model = (layouts.load_part(part, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert plain.conv_in.weight.is_contiguous() and not model.conv_in.weight.is_contiguous()
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    path, = part.files
    for name, network in (("plain", plain.bfloat16()), ("model", model)):
        layouts.save_part(network, tmp_path / name)
    assert (tmp_path / "plain" / path.name).read_bytes() == (tmp_path / "model" / path.name).read_bytes()


def shard(folder, stem, middle=""):
    """Replace a part's file by two shards and their index, as large models are published."""
    path = folder / f"{stem}.safetensors"
    tensors, names = load_file(path), []
    items = list(tensors.items())
    for i, half in enumerate((items[::2], items[1::2]), 1):
        names.append(f"{stem}{middle}-0000{i}-of-00002.safetensors")
        save_file(dict(half), folder / names[-1])
    index = {"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(tensors)}}
    ending = ".safetensors.index.fp16.json" if middle else ".safetensors.index.json"
    (folder / (stem + ending)).write_text(json.dumps(index))
    path.unlink()
    return folder / names[1]


@pytest.mark.parametrize("middle", ["", ".fp16"])
def test_shards(folder, models, middle):
    shard(folder / "unet", "diffusion_pytorch_model", middle)
    second = shard(folder / "text_encoder_2", "model", middle)
    assert all_equal({k: dict(sorted(s.items())) for k, s in loaded(layouts.open_model(folder).parts).items()},
                     {k: dict(sorted(s.items())) for k, s in states(models["sdxl"]).items()})
    second.unlink()
    with pytest.raises(InputError, match=second.name):
        layouts.open_model(folder)


def test_fp16_variants(folder, models):
    """Used when alone; beside the full file only on request."""
    full = folder / "vae" / "diffusion_pytorch_model.safetensors"
    half = full.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(full, half)
    save_weights({key: x.float() for key, x in models["sdxl"]["vae"].state_dict().items()}, full)
    assert list(layouts.open_model(folder).parts["vae"].files) == [full]
    assert list(layouts.open_model(folder, half=True).parts["vae"].files) == [half]
    full.unlink()
    assert list(layouts.open_model(folder).parts["vae"].files) == [half]
    copy = full.with_name("diffusion_pytorch_model.non_ema.safetensors")
    index, shard = full.with_name(full.name + ".index.json"), full.with_name(full.stem + "-00001-of-00001.safetensors")
    index.touch(), shard.touch(), copy.touch(), full.with_name("notes.txt").touch()
    layouts.save_part(models["sdxl"]["vae"], folder / "vae")  # saved in place, nothing old is read any more
    assert list(layouts.open_model(folder, half=True).parts["vae"].files) == [full]
    assert {path.name for path in full.parent.iterdir()} == {full.name, copy.name, "config.json", "notes.txt"}


@pytest.mark.parametrize("spelling", [
    lambda s: s, ldm_vae, old_vae, lambda s: {"first_stage_model." + name: x for name, x in ldm_vae(s).items()},
    lambda s: ldm_vae(s) | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(1)}])
def test_a_vae_alone(tmp_path, models, spelling):
    vae = models["sdxl"]["vae"]
    save_weights(spelling(vae.state_dict()), tmp_path / "vae.safetensors")
    back = layouts.load_part(layouts.open_vae(tmp_path / "vae.safetensors", vae.config))
    assert equal(back.state_dict(), vae.state_dict())


def test_a_vae_folder(folder, models):
    for path in (folder, folder / "vae"):
        assert equal(layouts.load_part(layouts.open_vae(path)).state_dict(), models["sdxl"]["vae"].state_dict())


def test_clip_files_with_and_without_prefix(folder, models):
    path = folder / "text_encoder" / "model.safetensors"
    state = models["sdxl"]["text_encoder"].state_dict()
    ids = {"embeddings.position_ids": torch.arange(77)[None]}
    save_weights({key.removeprefix("text_model."): x for key, x in state.items()} | ids, path)
    assert equal(layouts.load_part(layouts.open_model(folder).parts["text_encoder"]).state_dict(), state)


def edit(path, change):
    save_weights(change(dict(load_file(path))), path)


def without(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


UNFIT = {  # change to the UNet's file: words of the message
    "missing": (lambda t: without(t, "conv_in.bias"), "1 missing (conv_in.bias)"),
    "unexpected": (lambda t: t | {"conv_in.scale": torch.ones(1)}, "1 unexpected (conv_in.scale)"),
    "misshapen": (lambda t: t | {"conv_in.bias": torch.ones(3)}, "conv_in.bias is [3] instead of [16]"),
    "renamed": (lambda t: without(t, "conv_in.bias") | {"conv_in.bais": t["conv_in.bias"]},
                "1 missing (conv_in.bias); 1 unexpected (conv_in.bais)"),
    "whole numbers": (lambda t: t | {"conv_in.bias": torch.arange(16)}, "'conv_in.bias' is stored as I64"),
    "two halves": (lambda t: t | {"conv_in.bias": t["conv_in.bias"].bfloat16()}, "'conv_in.bias' is BF16"),
    "a LoRA": (lambda t: {"unet.conv_in.lora_A.weight": torch.ones(1, 1)}, "is a LoRA; expected the weights of a UNet"),
    "a ControlNet": (lambda t: t | {"controlnet_mid_block.weight": torch.ones(1)}, "is a ControlNet"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, kind):
    change, words = UNFIT[kind]
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit(path, change)
    with pytest.raises(InputError) as caught:
        layouts.open_model(folder)
    assert str(path) in str(caught.value) and words in str(caught.value) and len(str(caught.value)) < 600


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {  # what is done to a folder: words of the message
    "no unet": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), ["unet", "neither"]),
    "pickle only": (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").rename(
        f / "vae" / "diffusion_pytorch_model.bin"), ["vae", "only pickle files"]),
    "no index": (lambda f: (f / "model_index.json").unlink(), ["neither model_index.json"]),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), ["vae", "config.json"]),
    "bad config": (lambda f: (f / "vae" / "config.json").write_text("<html>"), ["config.json", "not valid JSON"]),
    "list config": (lambda f: (f / "vae" / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "unknown key": (lambda f: rewrite(f / "unet" / "config.json", magic=1), ["config.json", "magic"]),
    "other class": (lambda f: rewrite(f / "unet" / "config.json", _class_name="ControlNetModel"),
                    ["config.json", "ControlNetModel", "UNet2DConditionModel"]),
    "other pipeline": (lambda f: rewrite(f / "model_index.json", _class_name="FluxPipeline"), ["model_index", "Flux"]),
    "other part": (lambda f: rewrite(f / "model_index.json", transformer=["diffusers", "X"]), ["'transformer'"]),
    "no vae": (lambda f: rewrite(f / "model_index.json", vae=[None, None]), ["model_index.json", "'vae'"]),
    "no text encoder": (lambda f: rewrite(f / "model_index.json", text_encoder=[None, None]),
                        ["its text encoders make", "its UNet takes"]),
    "no size": (lambda f: rewrite(f / "unet" / "config.json", sample_size=None), ["sample_size=None", "wrong type"]),
    "two sizes": (lambda f: rewrite(f / "unet" / "config.json", layers_per_block=[1, 1]), ["layers_per_block=(1, 1)"]),
    "one width": (lambda f: rewrite(f / "vae" / "config.json", block_out_channels=32), ["block_out_channels=32", "type"]),
    "deep list": (lambda f: rewrite(f / "unet" / "config.json", transformer_layers_per_block=[[1], [2]]), ["wrong type"]),
    "few heads": (lambda f: rewrite(f / "unet" / "config.json", attention_head_dim=[1]), ["attention_head_dim must have"]),
    "text for a number": (lambda f: rewrite(f / "text_encoder" / "config.json", hidden_size="64"), ["hidden_size='64'"]),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), ["scheduler_config.json"]),
    "escape": (lambda f: [(f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
                          (f / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
                              '{"weight_map": {"a": "../../secret.safetensors"}}')], ["index.json", "same folder"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_refused_by_name(folder, kind):
    harm, words = BROKEN[kind]
    harm(folder)
    with pytest.raises(InputError) as caught:
        layouts.open_model(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words])


@pytest.mark.parametrize("channels", [5, 8, 9])
def test_a_unet_may_see_a_picture_to_edit_or_a_mask(channels, folder):
    rewrite(folder / "unet" / "config.json", in_channels=channels)
    edit(folder / "unet" / "diffusion_pytorch_model.safetensors",
         lambda tensors: tensors | {"conv_in.weight": torch.ones(16, channels, 3, 3)})
    if channels != 5:
        assert layouts.open_model(folder).parts["unet"].config.in_channels == channels
    else:
        with pytest.raises(InputError, match="unet takes 5 channels .* 8 .edits. or 9 .inpainting"):
            layouts.open_model(folder)


def test_single_files_that_are_no_model(tmp_path, models):
    path = tmp_path / "one.safetensors"
    for tensors, words in (({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, "is a LoRA"),
                           ({"control_model.x": torch.ones(1)}, "is a ControlNet"),
                           ({"emb_params": torch.ones(1, 768)}, "is a textual inversion"),
                           (ldm_vae(models["sdxl"]["vae"].state_dict()), "is a VAE alone"),
                           (models["sdxl"]["unet"].state_dict(), "is a UNet alone"),
                           (models["sdxl"]["text_encoder"].state_dict(), "is a text encoder alone")):
        save_weights(tensors, path)
        with pytest.raises(InputError) as caught:
            layouts.open_model(path)
        assert str(path) in str(caught.value) and words in str(caught.value)
    with pytest.raises(InputError, match="is a text encoder alone; expected a VAE"):
        layouts.open_vae(path)
    with pytest.raises(InputError, match="no such file"):
        layouts.open_model(tmp_path / "nothing")


def test_a_single_file_may_say_that_it_predicts_v(tmp_path, models):
    path, tensors = tmp_path / "one.safetensors", single_file("sdxl", models["sdxl"])
    for more, noted, kind, zero in (({}, {}, "epsilon", False), ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
                                    ({"v_pred": torch.empty(0)}, {}, "v_prediction", False),
                                    ({"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, {}, "v_prediction", True)):
        save_weights(more | tensors, path, noted)
        source = layouts.from_single_file(path, *tiny("sdxl"))
        schedule = Schedule.from_json(source.scheduler)
        assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == (kind, zero)
        assert all_equal(loaded(source.parts), states(models["sdxl"]))


def test_a_file_without_a_vae_takes_another(tmp_path, models, monkeypatch):
    """As files that are called noVAE, which draw with the VAE that a user has anyway."""
    path, vae = tmp_path / "noVAE.safetensors", models["sdxl"]["vae"]
    save_weights({name: x for name, x in single_file("sdxl", models["sdxl"]).items() if not name.startswith("first_stage")}, path)
    monkeypatch.setattr(layouts, "open_file", lambda path: layouts.from_single_file(path, *tiny("sdxl")))
    layouts.save_part(vae, tmp_path / "vae")
    with pytest.raises(InputError, match="noVAE.safetensors holds no VAE; name one that does with --vae"):
        layouts.open_model(path)
    assert all_equal(loaded(layouts.open_model(path, vae=tmp_path / "vae").parts), states(models["sdxl"]))


def test_strangers_in_a_single_file(tmp_path, models):
    path = tmp_path / "one.safetensors"
    save_weights(single_file("sdxl", models["sdxl"]) | {"conditioner.embedders.9.x": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"one\.safetensors holds 1 unexpected tensors: conditioner\.embedders\.9\.x"):
        layouts.from_single_file(path, *tiny("sdxl"))


def test_two_layouts_in_one_file(tmp_path, models):
    vae = models["sdxl"]["vae"]
    ldm = {name: x.clone() for name, x in ldm_vae(vae.state_dict()).items()}
    save_weights(vae.state_dict() | ldm, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="same weight"):
        layouts.open_vae(tmp_path / "vae.safetensors", vae.config)


def test_verify_knows_official_files(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(100)}, path)
    files = {"w.safetensors": [path.stat().st_size, weights.sha256(path)]}
    monkeypatch.setattr(weights, "OFFICIAL", tmp_path / "official.json")
    weights.OFFICIAL.write_text(json.dumps({"repositories": {"someone/model": {"files": files}}}))
    assert weights.verify(path) == "someone/model/w.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="w.safetensors.* size of someone/model/w.safetensors but not its contents"):
        weights.verify(path)
    with pytest.raises(InputError, match="may be fine"):
        weights.verify(weights.OFFICIAL)


def test_parts_that_are_not_saved_are_listed_as_absent(tmp_path, models):
    index = tiny("sd15")[1] | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    layouts.save_folder(tmp_path, models["sd15"], index, tiny("sd15")[2])
    saved = weights.read_json(tmp_path / "model_index.json")
    assert saved["safety_checker"] == [None, None] and saved["tokenizer"] == ["transformers", "CLIPTokenizer"]


def test_diffusers_loads_what_is_saved(folder, models):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float16, tokenizer=None, tokenizer_2=None, low_cpu_mem_usage=False)
    for name, model in models["sdxl"].items():
        theirs, ours = getattr(peer, name).state_dict(), model.state_dict()
        theirs = {key: x for key, x in theirs.items() if not key.endswith("position_ids")}
        if name == "text_encoder":  # newer transformers leave the prefix out in memory
            ours = {key.removeprefix("text_model."): x for key, x in ours.items()}
            theirs = {key.removeprefix("text_model."): x for key, x in theirs.items()}
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours), name
    assert peer.vae.config.scaling_factor == 0.13025 and peer.scheduler.config.timestep_spacing == "leading"
    assert peer.config.force_zeros_for_empty_prompt


def test_mutated_files_are_refused_or_unchanged_in_structure(tmp_path, models):
    from fuzz_weights import fuzz
    counts = fuzz(tmp_path, 60, seed=1)
    assert counts["crashed"] == 0 and counts["unnamed"] == 0 and counts["structural accepted"] == 0
    assert counts["refused"] > 30
