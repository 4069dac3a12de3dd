"""Files in and out: every layout gives the same networks; damaged and foreign files are refused.

Each refusal is one sentence that names the file.
"""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import ldm_vae, networks, old_vae, single_file, tiny
from torch import nn

from minipic.common import InputError
from minipic.diffusion.schedule import Schedule
from minipic.models.unet import SDXL_BASE
from minipic.weights import files, layouts, load_lora, read_weights, save_weights
from minipic.weights.controlnet import open_controlnet
from minipic.weights.files import check_writable, read_header, read_json
from minipic.weights.single_file import SINGLE_FILES, from_single_file
from minipic.weights.configs import read_config

PICKLE = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix"


def equal(a, b):
    """Whether two {name: tensor} are the same, also in their order and dtypes."""
    return list(a) == list(b) and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def loaded(parts, **kinds):
    return {name: layouts.load_part(part, **kinds).state_dict() for name, part in parts.items()}


def states(models):
    return {name: model.state_dict() for name, model in models.items()}


def all_equal(a, b):
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def models():
    """{family: tiny networks with random fp16 weights}"""
    return {family: networks(tiny(family)[0]) for family in SINGLE_FILES}


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
    tensors = {
        "a.weight": torch.randn(3, 5), "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(), "double": torch.randn(3).double(),
        "count": torch.tensor(12), "none": torch.empty(0, 4), "flags": torch.tensor([True, False]),
        "state": torch.arange(9, dtype=torch.uint8), "turned": torch.randn(4, 6).T,
        "wide": torch.randn(600, 600)}
    save_weights(tensors, tmp_path / "deep" / "w.safetensors", {"step": "3"})
    back = read_weights(tmp_path / "deep" / "w.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert read_header(tmp_path / "deep" / "w.safetensors")[1] == {"format": "pt", "step": "3"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_long_notes_are_no_damage(tmp_path):
    path = tmp_path / "w.safetensors"
    notes = {"tags": "x" * (7 << 20)}
    save_weights({"a": torch.ones(2)}, path, notes)
    assert read_header(path)[1]["tags"] == notes["tags"]
    assert read_weights(path).keys() == {"a"}


@pytest.mark.parametrize("length", [(8 << 20) + 1, 99_000_000])
def test_a_header_of_more_than_8_mb_is_refused_before_it_is_parsed(tmp_path, monkeypatch, length):
    """The safetensors library takes up to 100 MB, for which Python's parser needs 1.5 GB."""
    path = tmp_path / "w.safetensors"
    raw(path, b'{"a": "' + b"x" * (length - 9) + b'"}')
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(InputError, match=rf"w\.safetensors: its header takes {length:,} bytes"):
        read_weights(path)


def entries_in_header(count):
    return "{" + ",".join(f'"{i}":1' for i in range(count)) + "}"


@pytest.mark.parametrize("header", [
    entries_in_header(500_000)[:-1] + ',"0":1}',  # a name twice
    '{"w": {"dtype": "F32", "data_offsets": [0, 8], "shape": [' + "99," * 1_000_000 + "99]}}",
    '{"w": {"dtype": "F32", "data_offsets": [0, 8], "shape": [' + "9" * 4000 + ",1]}}"])
def test_headers_that_take_long_to_check_are_refused_in_seconds(tmp_path, header):
    start = time.process_time()
    with pytest.raises(InputError, match=r"w\.safetensors"):
        read_header(raw(tmp_path / "w.safetensors", header.encode()))
    assert time.process_time() - start < 10


def test_changing_a_loaded_tensor_leaves_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(4)}, path)
    read_weights(path)["a"].mul_(2)
    assert read_weights(path)["a"].tolist() == [1, 1, 1, 1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(4)}, path)
    with pytest.raises(InputError, match=r"w\.safetensors: cannot write"):
        with files.replacing(path, 16) as temporary:
            temporary.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
    assert read_weights(path)["a"].tolist() == [1, 1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_weights({"a": torch.ones(4)}, tmp_path / "file" / "w.safetensors")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    check_writable("out", tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^--out file: cannot write there .*; choose"):
        check_writable("--out file", tmp_path / "file")


TWICE = (b'{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, '
         b'"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n"
DAMAGED = {  # name: (header or None for bytes as they are, data, words of the message)
    "empty": (None, b"", "is empty"),
    "short": (None, b"\x01\x02", "truncated to 2 bytes"),
    "pickle": (None, PICKLE, "a pickle"),
    "zip pickle": (None, b"PK\x03\x04" + bytes(40), "a pickle"),
    "web page": (None, b"<!DOCTYPE html><html>sign in</html>", "a web page"),
    "lfs pointer": (None, LFS, "git-lfs pointer"),
    "json": (None, b'{"error": "Repository not found"}', "text (JSON)"),
    "noise": (None, bytes(range(7, 99)), "not a safetensors file"),
    "huge header": (None, (1 << 40).to_bytes(8, "little") + b'{"a":1}', "not a safetensors file"),
    "cut in header": (None, (500).to_bytes(8, "little") + b'{"a": {"dtype"', "is truncated"),
    "broken json": (b'{"a": {"dtype": "F32",,}}', b"", "not valid JSON"),
    "deep json": (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "twice": (TWICE, bytes(8), "'w' is in the header twice"),
    "no entry": ({"w": 3}, b"", "tensor 'w'"),
    "extra field": ({"w": entry() | {"x": 1}}, bytes(8), "tensor 'w'"),
    "dtype": ({"w": entry("F8_E4M3", (8,))}, bytes(8), "tensor 'w' is stored as F8_E4M3"),
    "negative shape": ({"w": entry(shape=(-1, -2))}, bytes(8), "tensor 'w'"),
    "overflow": ({"w": entry(shape=(0, 2**62, 2**62), end=0)}, b"", "tensor 'w'"),
    "true shape": ({"w": entry(shape=(True, 2))}, bytes(8), "tensor 'w'"),
    "wrong size": (
        {"w": entry(shape=(3,))}, bytes(8), "tensor 'w' has 8 bytes, but F32 [3] takes 12"),
    "gap": ({"v": entry(), "w": entry(start=12, end=20)}, bytes(20), "tensor 'w' begins"),
    "overlap": ({"v": entry(), "w": entry(start=4, end=12)}, bytes(12), "tensor 'w' begins"),
    "cut in data": (
        {"v": entry(), "w": entry(start=8, end=16)}, bytes(12), "tensor 'w' ends at byte 16"),
    "trailing": ({"v": entry()}, bytes(9), "1 bytes after"),
    "nan": (
        {"v": entry(), "w": entry(start=8, end=16)}, bytes(12) + b"\x00\x00\xc0\x7f",
        "tensor 'w' holds NaN"),
    "infinity": (
        {"w": entry("F16", (2,), 0, 4)}, b"\x00\x00\x00\xfc", "tensor 'w' holds NaN or infinity"),
    "bf16 nan": ({"w": entry("BF16", (2,), 0, 4)}, b"\xff\xff\x00\x00", "tensor 'w' holds NaN"),
    "f64 nan": (
        {"w": entry("F64", (1,))}, b"\x00\x00\x00\x00\x00\x00\xf0\x7f", "tensor 'w' holds NaN"),
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
    assert files.is_finite(x) and files.is_finite(x[0]) and files.is_finite(x[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not files.is_finite(torch.tensor([1.0] * 300_000 + [bad], dtype=dtype))


def test_paths_that_are_not_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError, match=str(path)):
            read_weights(path)


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_single_file_and_folder_give_the_same_networks(tmp_path, models, family):
    parts, index, scheduler = tiny(family)
    save_weights(single_file(family, models[family]), tmp_path / "one.safetensors")
    layouts.save_folder(tmp_path / "folder", models[family], index, scheduler)
    one = from_single_file(tmp_path / "one.safetensors", *tiny(family))
    many = layouts.open_model(tmp_path / "folder")
    assert all_equal(loaded(one.parts), states(models[family]))
    assert all_equal(loaded(many.parts), states(models[family]))
    assert many.scheduler == one.scheduler
    assert {k: many.index.get(k) for k in one.index} == one.index
    assert one.parts.keys() == many.parts.keys()
    assert all(many.parts[name].config == part.config for name, part in one.parts.items())


def test_converting_while_loading(monkeypatch, folder, models):
    """The same values as converting afterwards, however the file is cut into groups."""
    parts = layouts.open_model(folder).parts
    wanted = {}
    for name, state in states(models["sdxl"]).items():
        wanted[name] = {key: x.bfloat16() for key, x in state.items()}
    for size in (1, 5000, 1 << 28):
        monkeypatch.setattr(files, "GROUP_BYTES", size)
        assert all_equal(loaded(parts, dtype=torch.bfloat16), wanted)


def test_convolutions_are_channels_last_in_memory_in_16_bits_and_plain_on_disk(folder, tmp_path):
    part = layouts.open_model(folder).parts["unet"]
    plain, model = (layouts.load_part(part, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert plain.conv_in.weight.is_contiguous() and not model.conv_in.weight.is_contiguous()
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    path, = part.files
    for name, network in (("plain", plain.bfloat16()), ("model", model)):
        layouts.save_part(network, tmp_path / name)
    plain_bytes = (tmp_path / "plain" / path.name).read_bytes()
    assert plain_bytes == (tmp_path / "model" / path.name).read_bytes()


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
    theirs, ours = loaded(layouts.open_model(folder).parts), states(models["sdxl"])
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert equal(dict(sorted(theirs[name].items())), dict(sorted(ours[name].items())))
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
    for name in (full.name + ".index.json", full.stem + "-00001-of-00001.safetensors", copy.name,
                 "notes.txt"):
        full.with_name(name).touch()
    layouts.save_part(models["sdxl"]["vae"], folder / "vae")  # in place: nothing old is read
    assert list(layouts.open_model(folder, half=True).parts["vae"].files) == [full]
    left = {path.name for path in full.parent.iterdir()}
    assert left == {full.name, copy.name, "config.json", "notes.txt"}


@pytest.mark.parametrize("spelling", [
    lambda s: s, ldm_vae, old_vae,
    lambda s: {"first_stage_model." + name: x for name, x in ldm_vae(s).items()},
    lambda s: ldm_vae(s) | {
        "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(1)}])
def test_a_vae_alone(tmp_path, models, spelling):
    vae = models["sdxl"]["vae"]
    save_weights(spelling(vae.state_dict()), tmp_path / "vae.safetensors")
    back = layouts.load_part(layouts.open_vae(tmp_path / "vae.safetensors", vae.config))
    assert equal(back.state_dict(), vae.state_dict())


def test_a_vae_folder(folder, models):
    for path in (folder, folder / "vae"):
        back = layouts.load_part(layouts.open_vae(path))
        assert equal(back.state_dict(), models["sdxl"]["vae"].state_dict())


def test_clip_files_with_and_without_prefix(folder, models):
    path = folder / "text_encoder" / "model.safetensors"
    state = models["sdxl"]["text_encoder"].state_dict()
    ids = {"embeddings.position_ids": torch.arange(77)[None]}
    save_weights({key.removeprefix("text_model."): x for key, x in state.items()} | ids, path)
    back = layouts.load_part(layouts.open_model(folder).parts["text_encoder"])
    assert equal(back.state_dict(), state)


def edit(path, change):
    save_weights(change(dict(load_file(path))), path)


def without(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


UNFIT = {  # change to the UNet's file: words of the message
    "missing": (lambda t: without(t, "conv_in.bias"), "1 missing (conv_in.bias)"),
    "unexpected": (lambda t: t | {"conv_in.scale": torch.ones(1)}, "1 unexpected (conv_in.scale)"),
    "misshapen": (
        lambda t: t | {"conv_in.bias": torch.ones(3)}, "conv_in.bias is [3] instead of [16]"),
    "renamed": (
        lambda t: without(t, "conv_in.bias") | {"conv_in.bais": t["conv_in.bias"]},
        "1 missing (conv_in.bias); 1 unexpected (conv_in.bais)"),
    "whole numbers": (
        lambda t: t | {"conv_in.bias": torch.arange(16)}, "'conv_in.bias' is stored as I64"),
    "two halves": (
        lambda t: t | {"conv_in.bias": t["conv_in.bias"].bfloat16()}, "'conv_in.bias' is BF16"),
    "a LoRA": (
        lambda t: {"unet.conv_in.lora_A.weight": torch.ones(1, 1)},
        "is a LoRA; expected the weights of a UNet"),
    "a ControlNet": (
        lambda t: t | {"controlnet_mid_block.weight": torch.ones(1)}, "is a ControlNet"),
    "an index of 5,000 digits": (
        lambda t: t | {f"input_blocks.{'9' * 5000}.x": torch.ones(1)}, "1 unexpected"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, kind):
    change, words = UNFIT[kind]
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit(path, change)
    with pytest.raises(InputError) as caught:
        layouts.open_model(folder)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message
    assert len(message) < 600 or "digits" in kind


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UNET, VAE = "unet/config.json", "vae/config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def with_index(folder, content):
    """The VAE's weights are said to lie in other files."""
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "vae" / f"{WEIGHTS}.index.json").write_text(content)


BROKEN = {  # what is done to a folder: words of the message
    "no unet": (lambda f: (f / "unet" / WEIGHTS).unlink(), ["unet", "neither"]),
    "pickle only": (
        lambda f: (f / "vae" / WEIGHTS).rename(f / "vae" / "diffusion_pytorch_model.bin"),
        ["vae", "only pickle files"]),
    "no index": (lambda f: (f / "model_index.json").unlink(), ["neither model_index.json"]),
    "no config": (lambda f: (f / VAE).unlink(), ["vae", "config.json"]),
    "bad config": (lambda f: (f / VAE).write_text("<html>"), ["config.json", "not valid JSON"]),
    "list config": (lambda f: (f / VAE).write_text("[]"), ["config.json", "JSON object"]),
    "unknown key": (lambda f: rewrite(f / UNET, magic=1), ["config.json", "magic"]),
    "other class": (
        lambda f: rewrite(f / UNET, _class_name="ControlNetModel"),
        ["config.json", "ControlNetModel", "UNet2DConditionModel"]),
    "other pipeline": (
        lambda f: rewrite(f / "model_index.json", _class_name="FluxPipeline"),
        ["model_index", "Flux"]),
    "other part": (
        lambda f: rewrite(f / "model_index.json", transformer=["diffusers", "X"]),
        ["'transformer'"]),
    "no vae": (
        lambda f: rewrite(f / "model_index.json", vae=[None, None]), ["model_index.json", "'vae'"]),
    "no text encoder": (
        lambda f: rewrite(f / "model_index.json", text_encoder=[None, None]),
        ["its text encoders make", "its UNet takes"]),
    "no size": (lambda f: rewrite(f / UNET, sample_size=None), ["sample_size", "wrong type"]),
    "two sizes": (
        lambda f: rewrite(f / UNET, layers_per_block=[1, 1]), ["layers_per_block", "(1, 1)"]),
    "one width": (lambda f: rewrite(f / VAE, block_out_channels=32), ["block_out_channels", "32"]),
    "deep list": (
        lambda f: rewrite(f / UNET, transformer_layers_per_block=[[1], [2]]), ["wrong type"]),
    "few heads": (
        lambda f: rewrite(f / UNET, attention_head_dim=[1]), ["attention_head_dim", "must have"]),
    "text for a number": (
        lambda f: rewrite(f / "text_encoder/config.json", hidden_size="64"),
        ["hidden_size", "'64'"]),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), ["scheduler_config.json"]),
    "escape": (
        lambda f: with_index(f, '{"weight_map": {"a": "../../secret.safetensors"}}'),
        ["index.json", "same folder"]),
    "no shards": (lambda f: with_index(f, '{"weight_map": {}}'), ["index.json", "names no files"]),
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
    edit(folder / "unet" / WEIGHTS,
         lambda tensors: tensors | {"conv_in.weight": torch.ones(16, channels, 3, 3)})
    if channels != 5:
        assert layouts.open_model(folder).parts["unet"].config.in_channels == channels
    else:
        with pytest.raises(InputError, match="unet takes 5 channels .* 8 .edits. or 9 .inpainting"):
            layouts.open_model(folder)


def test_single_files_that_are_no_model(tmp_path, models):
    path = tmp_path / "one.safetensors"
    sdxl = models["sdxl"]
    for tensors, words in (
            ({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, "is a LoRA"),
            ({"control_model.x": torch.ones(1)}, "is a ControlNet"),
            ({"emb_params": torch.ones(1, 768)}, "is a textual inversion"),
            (ldm_vae(sdxl["vae"].state_dict()), "is a VAE alone"),
            (sdxl["unet"].state_dict(), "is a UNet alone"),
            (sdxl["text_encoder"].state_dict(), "is a text encoder alone")):
        save_weights(tensors, path)
        with pytest.raises(InputError) as caught:
            layouts.open_model(path)
        assert str(path) in str(caught.value) and words in str(caught.value)
    with pytest.raises(InputError, match="is a text encoder alone; expected a VAE"):
        layouts.open_vae(path)
    with pytest.raises(InputError, match="no such file"):
        layouts.open_model(tmp_path / "nothing")


def test_stacked_weights_of_too_few_rows_are_refused_by_name(tmp_path, models):
    """OpenCLIP's q, k and v are one tensor, which is cut in three."""
    path, tensors = tmp_path / "one.safetensors", single_file("sdxl", models["sdxl"])
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    for rows in (0, 1, 4):
        save_weights(tensors | {name: torch.ones(rows, 24).half()}, path)
        with pytest.raises(InputError, match=r"one\.safetensors does not fit"):
            from_single_file(path, *tiny("sdxl"))


def test_a_controlnet_whose_shapes_make_no_config_is_refused_by_name(tmp_path):
    path = tmp_path / "control.safetensors"
    save_weights({"control_model.zero_convs.0.0.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"^controlnet: .*control\.safetensors does not fit"):
        open_controlnet(path, SDXL_BASE, 8)


def test_a_single_file_may_say_that_it_predicts_v(tmp_path, models):
    path, tensors = tmp_path / "one.safetensors", single_file("sdxl", models["sdxl"])
    mark, zero_mark = {"v_pred": torch.empty(0)}, {"ztsnr": torch.empty(0)}
    for more, metadata, kind, zero in (
            ({}, {}, "epsilon", False),
            ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
            (mark, {}, "v_prediction", False),
            (mark | zero_mark, {}, "v_prediction", True)):
        save_weights(more | tensors, path, metadata)
        source = from_single_file(path, *tiny("sdxl"))
        schedule = read_config(Schedule, source.scheduler)
        assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == (kind, zero)
        assert all_equal(loaded(source.parts), states(models["sdxl"]))


def test_a_file_without_a_vae_takes_another(tmp_path, models, monkeypatch):
    """As files that are called noVAE, which draw with the VAE that a user has anyway."""
    path = tmp_path / "noVAE.safetensors"
    whole = single_file("sdxl", models["sdxl"])
    save_weights({key: x for key, x in whole.items() if not key.startswith("first_stage")}, path)
    monkeypatch.setattr(
        layouts, "open_single_file", lambda path: from_single_file(path, *tiny("sdxl")))
    layouts.save_part(models["sdxl"]["vae"], tmp_path / "vae")
    with pytest.raises(InputError, match=r"^vae: .*noVAE\.safetensors holds no VAE; name one that"):
        layouts.open_model(path)
    source = layouts.open_model(path, vae=tmp_path / "vae")
    assert all_equal(loaded(source.parts), states(models["sdxl"]))


def test_strangers_in_a_single_file(tmp_path, models):
    path = tmp_path / "one.safetensors"
    stranger = {"conditioner.embedders.9.x": torch.ones(1)}
    save_weights(single_file("sdxl", models["sdxl"]) | stranger, path)
    words = r"one\.safetensors holds 1 unexpected tensors: conditioner\.embedders\.9\.x"
    with pytest.raises(InputError, match=words):
        from_single_file(path, *tiny("sdxl"))


def test_two_layouts_in_one_file(tmp_path, models):
    vae = models["sdxl"]["vae"]
    ldm = {name: x.clone() for name, x in ldm_vae(vae.state_dict()).items()}
    save_weights(vae.state_dict() | ldm, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="same weight"):
        layouts.open_vae(tmp_path / "vae.safetensors", vae.config)


def test_parts_that_are_not_saved_are_listed_as_absent(tmp_path, models):
    _, index, scheduler = tiny("sd15")
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    layouts.save_folder(tmp_path, models["sd15"], index | checker, scheduler)
    saved = read_json(tmp_path / "model_index.json")
    assert saved["safety_checker"] == [None, None]
    assert saved["tokenizer"] == ["transformers", "CLIPTokenizer"]


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
        assert theirs.keys() == ours.keys(), name
        assert all(torch.equal(theirs[key], ours[key]) for key in ours), name
    assert peer.vae.config.scaling_factor == 0.13025
    assert peer.scheduler.config.timestep_spacing == "leading"
    assert peer.config.force_zeros_for_empty_prompt


# LoRA files: test_lora.py has their spellings ---------------------------------------------------

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_lora(path, settings):
    """A LoRA of rank 4 for one layer, with PEFT's settings in the header -> (path, models)."""
    tensors = {f"unet.{MODULE}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_weights(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    model = nn.Linear(4, 4)
    for name in reversed(MODULE.split(".")):
        model = nn.ModuleDict({name: model})
    return path, {"unet": model}


@pytest.mark.parametrize("pattern, fits", [
    ("to_q", True), ("attn1.to_q", True), (MODULE, True), (r"attn[12]\.to_q", True),
    ("^to_q", False),
    ("^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q$", True), ("o_q", False),
    (r"transformer_blocks\.\d\.attn1.to_[^kv]", True), ("attn2.to_q", False), ("to_k", False)])
def test_alpha_by_the_end_of_a_modules_name(tmp_path, pattern, fits):
    settings = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"nothing": 1, pattern: 5, "to_q$": 7}}
    loras = load_lora(*write_lora(tmp_path / "x.safetensors", settings))
    assert loras["unet"][MODULE][2] == (5 if fits else 7)


@pytest.mark.parametrize("pattern", [
    "(a+)+$", r"(\w+_?)+!", r"(.*)*x", r"(\w|\w\w)+!", ".*" * 30 + "!", r"\w+" * 200 + "!",
    "a{9999}{9999}", "[" * 5000, "a" * 100_000, "(?:" * 300])
def test_patterns_that_could_keep_re_busy_are_refused_at_once(tmp_path, pattern):
    path, models = write_lora(tmp_path / "x.safetensors", {"unet.alpha_pattern": {pattern: 5}})
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load_lora(path, models)
    message = str(caught.value)
    assert str(path) in message and repr(pattern[:20])[1:-1] in message and len(message) < 600
    assert time.process_time() - start < 5


def test_very_many_patterns_are_refused(tmp_path):
    settings = {"unet.alpha_pattern": {f"layer{i}": 5 for i in range(5000)}}
    with pytest.raises(InputError, match=r"x\.safetensors.*alpha_pattern has 5,000 entries"):
        load_lora(*write_lora(tmp_path / "x.safetensors", settings))


# Damage at random -------------------------------------------------------------------------------


def test_mutated_files_are_refused_or_unchanged_in_structure(tmp_path, models):
    from fuzz_weights import fuzz
    counts = fuzz(tmp_path, 60, seed=1)
    assert counts["crashed"] == 0 and counts["unnamed"] == 0 and counts["structural accepted"] == 0
    assert counts["refused"] > 30
