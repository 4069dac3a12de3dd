"""Files in and out: every layout gives the same networks; damaged and foreign files are refused.

Each refusal is one sentence that names the file.
"""

import dataclasses
import json
import os
import shutil
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import ldm_vae, networks, old_vae, single_file, tiny
from torch import nn

from minipic.common import InputError, ParameterError, find_file, message_of
from minipic.diffusion.schedule import Schedule
from minipic.image import open_picture
from minipic.models.unet import SDXL_BASE, UNetConfig
from minipic.weights import files, layouts, load_lora, read_weights, save_weights
from minipic.weights.controlnet import open_controlnet
from minipic.weights.files import check_writable, read_header, read_json
from minipic.weights.folders import check_parts_fit
from minipic.weights.keys import foreign_kind
from minipic.weights.lora import compile_patterns
from minipic.weights.single_file import SINGLE_FILES, from_single_file
from minipic.weights.configs import READERS, read_config

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


def test_names_that_almost_fit_a_pattern_take_no_time():
    """For each "lora_B" a pattern could look through the rest of the name."""
    start = time.process_time()
    assert foreign_kind(["lora_B." * 40_000], besides="a LoRA") is None
    assert time.process_time() - start < 3
    assert foreign_kind(["unet.x.lora_B.bias"])[0] == foreign_kind(["unet.x.lora_B.cat.bias"])[0]
    assert foreign_kind(["unet.x.lora_B.bias"])[0] == "a LoRA with biases of its own"


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
    '{"w": {"dtype": "F32", "data_offsets": [0, 8], "shape": [' + "9" * 4000 + ",1]}}",
    '{"' + "lora_B." * 1_000_000 + '": 1}'])
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
    "dtype": ({"w": entry("F8_E8M0", (8,))}, bytes(8), "tensor 'w' is stored as F8_E8M0"),
    "gguf": (None, b"GGUF\x03\x00\x00\x00" + bytes(40), "a GGUF file"),
    "onnx": (None, b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(40), "an ONNX file"),
    "fp8 nan": ({"w": entry("F8_E4M3", (8,))}, bytes(7) + b"\x7f", "tensor 'w' holds NaN"),
    "escapes": ({"\x1b[2J\nw": entry("\x1b[31m")}, bytes(8), r"tensor '\x1b[2J\nw' is stored as \x1b[31m"),
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
    assert str(path) in message and words in message and message.isprintable()


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


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_special_files_are_refused_at_once(tmp_path, kind):
    """Opening a pipe would wait for a writer."""
    path = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    name = {"pipe": "a named pipe", "socket": "a socket", "device": "a device"}[kind]
    for reader in (read_weights, read_json, files.read_text, files.sha256, open_picture, layouts.open_vae, open_for_sdxl):
        with pytest.raises(InputError, match=rf"x\.safetensors is {name}; give an ordinary file"):
            reader(path)


def open_for_sdxl(path):
    return open_controlnet(path, SDXL_BASE, 8)


def test_a_folder_may_be_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reader in (layouts.open_vae, open_for_sdxl):
        with pytest.raises(InputError, match="^config.json: cannot read it .No such file or directory"):
            reader(".")


def test_a_name_that_is_too_long_is_one_sentence():
    with pytest.raises(InputError, match="x: cannot be opened .File name too long.; give its path"):
        find_file("x" * 300)


def test_names_from_files_are_never_printed_raw(tmp_path, models):
    """A terminal would obey them. In a header, as a key of JSON, in metadata, and as a file's name."""
    hostile = "\x1b]0;owned\x07\x9b2J\u202e\r\n" + "x" * 100_000
    path = tmp_path / "\x1b[31mred.safetensors"
    whole = single_file("sdxl", models["sdxl"])
    for tensors, metadata in (
            (whole | {hostile: torch.ones(1)}, {}), (whole, {"modelspec.prediction_type": hostile})):
        save_weights(tensors, path, metadata)
        with pytest.raises(InputError) as caught:
            from_single_file(path, *tiny("sdxl"))
        check_printed(caught.value)
    for values in ({hostile: 1}, {"act_fn": hostile}, {"block_out_channels": [hostile]}):
        with pytest.raises(InputError) as caught:
            read_config(UNetConfig, values, path)
        check_printed(caught.value)
    check_printed(ParameterError("model", hostile))


def check_printed(error):
    message = message_of(error)
    assert message.isprintable() and r"\x1b" in message and len(message) < 3000


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


@pytest.mark.slow
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
    ending = f".safetensors.index{middle}.json"
    (folder / (stem + ending)).write_text(json.dumps(index))
    path.unlink()
    return folder / names[1]


@pytest.mark.parametrize("middle", ["", ".fp16", ".bf16"])
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


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_in_16_bits(folder, models, variant):
    """Used when alone; beside the full file only on request."""
    full = folder / "vae" / "diffusion_pytorch_model.safetensors"
    half = full.with_name(f"diffusion_pytorch_model.{variant}.safetensors")
    shutil.copy(full, half)
    save_weights({key: x.float() for key, x in models["sdxl"]["vae"].state_dict().items()}, full)
    assert list(layouts.open_model(folder).parts["vae"].files) == [full]
    assert list(layouts.open_model(folder, half=True).parts["vae"].files) == [half]
    full.unlink()
    assert list(layouts.open_model(folder).parts["vae"].files) == [half]
    copy = full.with_name("diffusion_pytorch_model.non_ema.safetensors")
    half.rename(copy)
    assert list(layouts.open_model(folder).parts["vae"].files) == [copy]  # another variant, alone
    shutil.copy(copy, copy.with_name("diffusion_pytorch_model.ema.safetensors"))
    with pytest.raises(InputError, match="neither diffusion_pytorch_model.safetensors"):
        layouts.open_model(folder)
    copy.with_name("diffusion_pytorch_model.ema.safetensors").unlink()
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
    "an index of 900 digits": (
        lambda t: t | {f"input_blocks.{'9' * 900}.x": torch.ones(1)}, "1 unexpected"),
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
    "only ONNX": (
        lambda f: (f / "vae" / WEIGHTS).rename(f / "vae" / "model.onnx"), ["vae", "only ONNX files"]),
    "other pipeline's parts": (
        lambda f: rewrite(f / "model_index.json", _class_name="StableDiffusionXLControlNetXSPipeline"),
        ["model_index", "StableDiffusionXLControlNetXSPipeline"]),
    "other sizes": (
        lambda f: rewrite(f / UNET, addition_time_embed_dim=4), ["unet takes 72 numbers of pooled"]),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), ["scheduler_config.json"]),
    "escape": (
        lambda f: with_index(f, '{"weight_map": {"a": "../../secret.safetensors"}}'),
        ["index.json", "same folder"]),
    "no file's name": (
        lambda f: with_index(f, '{"weight_map": {"a": "b\\u0000"}}'), ["cannot be the name of a file"]),
    "no shards": (lambda f: with_index(f, '{"weight_map": {}}'), ["index.json", "names no files"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_refused_by_name(folder, kind):
    harm, words = BROKEN[kind]
    harm(folder)
    with pytest.raises(InputError) as caught:
        layouts.open_model(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words])


@pytest.mark.parametrize("part, change, words", [
    ("vae", {"in_channels": 4}, "vae takes 4 colours and makes 3"),
    ("text_encoder", {"max_position_embeddings": 64}, "text_encoder reads 64 tokens"),
    ("text_encoder_2", {"projection_dim": 23}, "a text encoder of 23 does not fit"),
    ("text_encoder_2", {"with_projection": False}, "a text encoder of 0 does not fit"),
    ("text_encoder_2", {"hidden_size": 22}, "make 38 numbers a token, its UNet takes 40")])
def test_parts_that_do_not_fit_each_other(tmp_path, part, change, words):
    """Each by itself is what its config says."""
    parts = dict(tiny("sdxl")[0])
    check_parts_fit(parts, tmp_path)
    changed = dataclasses.replace(parts[part].config, **change)
    parts[part] = dataclasses.replace(parts[part], config=changed)
    with pytest.raises(InputError, match=words):
        check_parts_fit(parts, tmp_path)


@pytest.mark.parametrize("name, plain", [
    ("DiffusionPipeline", "StableDiffusionXLPipeline"),
    ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    ("StableDiffusionXLInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLPipeline"),
    ("StableDiffusionXLControlNetInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    ("StableDiffusionXLControlNetPAGImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    ("StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLPipeline"),
    ("StableDiffusionXLAdapterPipeline", "StableDiffusionXLPipeline"),
    ("StableDiffusionXLKDiffusionPipeline", "StableDiffusionXLPipeline"),
    ("StableDiffusionXLDifferentialImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    ("StableDiffusionXLLongPromptWeightingPipeline", "StableDiffusionXLPipeline"),
    ("StableDiffusionPanoramaPipeline", "StableDiffusionPipeline")])
def test_folders_of_other_pipelines_with_the_same_parts(folder, models, name, plain):
    """What they add is left out, also when the model is saved again."""
    more = {"controlnet": ["diffusers", "ControlNetModel"], "adapter": ["diffusers", "T2IAdapter"],
            "image_encoder": [None, None], "feature_extractor": [None, None]}
    rewrite(folder / "model_index.json", _class_name=name, **more)
    source = layouts.open_model(folder)
    assert source.index["_class_name"] == plain and "controlnet" not in source.index
    assert all_equal(loaded(source.parts), states(models["sdxl"]))


def test_the_folder_above_a_model_is_answered_with_the_model(folder, tmp_path):
    """As in the cache of huggingface_hub, whose files are links into another folder."""
    model = tmp_path / "models--a--b" / "snapshots" / "0123"
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        link = model / path.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(blob)
    assert layouts.open_model(model).parts.keys() == tiny("sdxl")[0].keys()
    for above in (tmp_path / "models--a--b", model.parent):
        with pytest.raises(InputError, match=f"is no model: .*; give the model in it, such as {model}"):
            layouts.open_model(above)


@pytest.mark.parametrize("wrap", [
    "_fsdp_wrapped_module._checkpoint_wrapped_module.", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_that_torch_compile_or_ddp_saved(folder, tmp_path, models, wrap):
    """At the start of all names, as of one network in a folder; and inside, as of a UNet in a model."""
    path = folder / "unet" / WEIGHTS
    edit(path, lambda tensors: {wrap + name: x for name, x in tensors.items()})
    assert equal(loaded(layouts.open_model(folder).parts)["unet"], models["sdxl"]["unet"].state_dict())
    one = {}
    for name, x in single_file("sdxl", models["sdxl"]).items():
        one[wrap + name.replace("diffusion_model.", "diffusion_model.module._orig_mod.")] = x
    save_weights(one, tmp_path / "one.safetensors")
    source = from_single_file(tmp_path / "one.safetensors", *tiny("sdxl"))
    assert all_equal(loaded(source.parts), states(models["sdxl"]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_widened_exactly(tmp_path, models, dtype):
    """As ComfyUI stores a UNet's matrices. All 256 numbers but NaN and infinity."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = numbers[numbers.float().isfinite()]
    save_file({"x": numbers}, tmp_path / "x.safetensors")
    back = read_weights(tmp_path / "x.safetensors")
    assert back["x"].dtype == torch.float16 and torch.equal(back["x"].double(), numbers.double())
    for bad in (float("nan"), float("inf")):
        if dtype == torch.float8_e5m2 or bad != bad:  # e4m3fn has no infinity
            save_file({"x": torch.tensor([1.0, bad]).to(dtype)}, tmp_path / "x.safetensors")
            with pytest.raises(InputError, match="'x' holds NaN or infinity"):
                read_weights(tmp_path / "x.safetensors")

    stored, expected = {}, {}
    for name, x in single_file("sdxl", models["sdxl"]).items():
        is_matrix = name.startswith("model.diffusion_model.") and x.ndim > 1
        stored[name] = x.to(dtype).contiguous() if is_matrix else x.clone()
    save_file(stored, tmp_path / "one.safetensors")
    parts = from_single_file(tmp_path / "one.safetensors", *tiny("sdxl")).parts
    for name, x in models["sdxl"]["unet"].state_dict().items():
        expected[name] = x.to(dtype).float() if x.ndim > 1 else x.float()
    assert equal(loaded(parts, dtype=torch.float32)["unet"], expected)
    assert loaded(parts)["unet"]["conv_in.weight"].dtype == torch.float16


def test_projections_in_other_spellings(tmp_path, models):
    """diffusers' converter writes OpenCLIP's as the weight of a Linear, ComfyUI the first encoder's unused one."""
    path = tmp_path / "one.safetensors"
    whole = single_file("sdxl", models["sdxl"])
    openclip = "conditioner.embedders.1.model.text_projection"
    whole[f"{openclip}.weight"] = whole.pop(openclip).T.contiguous()
    whole["conditioner.embedders.0.transformer.text_projection.weight"] = torch.eye(16)
    whole["conditioner.embedders.0.logit_scale"] = torch.tensor(4.6)
    save_weights(whole, path)
    assert all_equal(loaded(from_single_file(path, *tiny("sdxl")).parts), states(models["sdxl"]))


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
    with pytest.raises(InputError, match=r"control\.safetensors does not fit"):
        open_controlnet(path, SDXL_BASE, 8)


def test_a_single_file_may_say_that_it_predicts_v(tmp_path, models):
    path, tensors = tmp_path / "one.safetensors", single_file("sdxl", models["sdxl"])
    mark, zero_mark = {"v_pred": torch.empty(0)}, {"ztsnr": torch.empty(0)}
    for more, metadata, kind, zero in (
            ({}, {}, "epsilon", False),
            ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
            ({}, {"modelspec.predict_key": "v"}, "v_prediction", False),
            ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
            (mark, {}, "v_prediction", False),
            (mark | zero_mark, {}, "v_prediction", True)):
        save_weights(more | tensors, path, metadata)
        source = from_single_file(path, *tiny("sdxl"))
        schedule = read_config(Schedule, source.scheduler)
        assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == (kind, zero)
        assert all_equal(loaded(source.parts), states(models["sdxl"]))


@pytest.mark.parametrize("metadata, first", [
    ({}, 1), ({"modelspec.title": "Stable Diffusion XL 1.0 Base"}, 1),
    ({"modelspec.title": "SDXL Turbo"}, 999), ({"modelspec.architecture": "stable-diffusion-xl-turbo-v1"}, 999),
    ({"modelspec.title": "DMD2"}, 999), ({"modelspec.title": "My LCM merge"}, 999),
    ({"modelspec.title": "sdxl_lightning_4step"}, 999), ({"modelspec.title": "Hyper-SDXL"}, 999)])
def test_a_single_file_may_say_that_it_draws_in_few_steps(tmp_path, models, metadata, first):
    save_weights(single_file("sdxl", models["sdxl"]), tmp_path / "one.safetensors", metadata)
    source = from_single_file(tmp_path / "one.safetensors", *tiny("sdxl"))
    assert read_config(Schedule, source.scheduler).grid(1).timesteps.tolist() == [first]


@pytest.mark.parametrize("absent, words", [
    (["conditioner."], "holds no text_encoder: it is a UNet alone or a merge without text encoders"),
    (["conditioner.embedders.1."], "holds no text_encoder_2"),
    (["conditioner.", "first_stage_model."], "it is a UNet alone")])
def test_a_file_without_text_encoders_is_named(tmp_path, models, absent, words):
    whole = single_file("sdxl", models["sdxl"])
    for start in absent:
        whole = {name: x for name, x in whole.items() if not name.startswith(start)}
    save_weights(whole, tmp_path / "one.safetensors")
    with pytest.raises(InputError, match=words):
        from_single_file(tmp_path / "one.safetensors", *tiny("sdxl"))


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


@pytest.mark.parametrize("cls", READERS)
@pytest.mark.parametrize("value", [
    -10**9, 10**9, 10**400, float("inf"), float("-inf"), float("nan"), "1", {}, None, (1,) * 10**5])
def test_no_number_in_a_config_takes_time_or_memory(cls, value):
    """Each is refused by its name, before a network is built or a table computed."""
    start = time.process_time()
    for field in dataclasses.fields(cls):
        is_number = type(field.default) in (int, float, tuple) and field.type != tuple[str, ...]
        if not is_number or (value is None and "None" in str(field.type)):
            continue
        with pytest.raises(ParameterError, match=f"^{field.name}: ") as caught:
            cls(**{field.name: value})
        assert len(str(caught.value)) < 3000
    assert time.process_time() - start < 2


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
    (r"transformer_blocks\.\d\.attn1.to_[^kv]", True), ("attn2.to_q", False), ("to_k", False),
    (".*", True), (".*attn1.*", True), (r"down_blocks\.\d+\.attentions.+to_(q|k|v)", True),
    (r"(down|up)_blocks\.\d{1,2}.*attn[12]\.to_(?:q|k)", True), ("to_k|to_q", True),
    ("(transformer_)?blocks.0.attn1.to_q", True), (r"attn\d+\.to_(k|v)", False), ("up.*", False)])
def test_alpha_by_the_end_of_a_modules_name(tmp_path, pattern, fits):
    settings = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"nothing": 1, pattern: 5, "to_q$": 7}}
    loras = load_lora(*write_lora(tmp_path / "x.safetensors", settings))
    assert loras["unet"][MODULE][2] == (5 if fits else 7)


@pytest.mark.parametrize("pattern", [
    "(a+)+$", r"(\w+_?)+!", r"(.*)*x", r"(\w|\w\w)+!", ".*" * 30 + "!", r"\w+" * 200 + "!",
    "a{9999}{9999}", "[" * 5000, "a" * 100_000, "(?:" * 300, ".*" * 500, "(d|d)(o|o)" * 100,
    "a?" * 500, "(a*)*b", "(a|b*)+", "(.*)(.*)(.*)(.*)x", r"\w{1,9}" * 90, "(?=to_q)", r"(a)\1", "(?i)to_q"])
def test_patterns_that_could_keep_re_busy_are_refused_at_once(tmp_path, pattern):
    path, models = write_lora(tmp_path / "x.safetensors", {"unet.alpha_pattern": {pattern: 5}})
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load_lora(path, models)
    message = str(caught.value)
    assert str(path) in message and repr(pattern[:20])[1:-1] in message and len(message) < 600
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", [
    ".*.*.*z", ".*.*(.|.)(.|.)(.|.)z", r"\d+" * 8 + "z", "(d|.)(o|.)(w|.)" * 2 + "z", ".*" + "(.|.)" * 6 + "z"])
def test_the_slowest_patterns_that_are_read_take_a_moment(tmp_path, pattern):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    compiled = compile_patterns((pattern,))
    start = time.process_time()
    for _ in range(100):  # SDXL's UNet has seven times as many layers
        assert not compiled[0].fullmatch(name)
    assert time.process_time() - start < 1


def test_very_many_patterns_are_refused(tmp_path):
    settings = {"unet.alpha_pattern": {f"layer{i}": 5 for i in range(5000)}}
    with pytest.raises(InputError, match=r"x\.safetensors.*one of its patterns has 5,000 entries"):
        load_lora(*write_lora(tmp_path / "x.safetensors", settings))


# Damage at random -------------------------------------------------------------------------------


def test_damaged_files_of_every_kind_give_the_same_values_or_one_clear_error(tmp_path):
    from fuzz_weights import fuzz
    counts = fuzz(tmp_path, 12, seed=1)
    assert len(counts) == 10
    for kind, outcomes in counts.items():
        assert outcomes["failed"] == 0 and outcomes["refused"] >= 6, (kind, outcomes)
        assert kind != "checkpoint" or outcomes["other values"] == 0
