"""Training on a folder of pictures: what is found, what is refused, and a LoRA from it that sample.py draws with."""

import json
import os
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample
import train
from minipic import training
from minipic.common import InputError
from minipic.folder import Photo, buckets, fit, read_folder
from minipic.image import open_picture, to_tensor
from minipic.methods import t2i
from minipic.models.vae import VAE
from minipic.pipeline import Pipeline
from minipic.weights import read_weights


def picture(path, width, height, caption=None):
    pixels = np.random.RandomState(width).randint(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    picture(tmp_path / "photos/a.png", 64, 64, "a  red\ncube")
    picture(tmp_path / "photos/b.JPG", 200, 100, "a wide one")
    picture(tmp_path / "photos/deep/c.png", 100, 210)
    row = {"file_name": "deep/c.png", "text": "a tall one"}
    (tmp_path / "photos/metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    return tmp_path / "photos"


def test_buckets_have_equal_area_and_the_nearest_shape_is_taken():
    sizes = buckets(1024, 64)
    assert (1024, 1024) in sizes and (832, 1216) in sizes and (1216, 832) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and max(height / width, width / height) <= 2
        assert 1024**2 - 64 * height < height * width <= 1024**2
    assert fit((3000, 2000), sizes) == (1216, 832) and fit((500, 500), sizes) == (1024, 1024)


def test_pictures_captions_and_size_ids(folder):
    said = []
    photos = {photo.path.name: photo for photo in read_folder(folder, 64, 16, say=said.append)}
    assert {name: photo.text for name, photo in photos.items()} == {
        "a.png": "a red cube", "b.JPG": "a wide one", "c.png": "a tall one"}
    assert photos["a.png"].size_ids.tolist() == [64, 64, 0, 0, 64, 64]
    assert torch.equal(Photo.draw([photos["a.png"]])[0], to_tensor(open_picture(folder / "a.png")))
    assert photos["b.JPG"].size == (48, 80) and photos["c.png"].size == (80, 48)
    for photo in photos.values():
        height, width, top, left, *target = photo.size_ids.tolist()
        assert (height, width) == photo.original and tuple(target) == photo.size == Photo.draw([photo])[0].shape[1:]
        scale = max(photo.size[0] / height, photo.size[1] / width)
        assert abs(2 * top + photo.size[0] - height * scale) <= 1 and abs(2 * left + photo.size[1] - width * scale) <= 1
    assert said[0].endswith("3 pictures, 3 usable") and "  bucket 64x64: 1" in said


def test_everything_wrong_is_listed_before_anything_is_trained(folder):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:400])
    (folder / "cut.txt").write_text("cut off")
    picture(folder / "silent.png", 64, 64)
    picture(folder / "empty.png", 64, 64, " ")
    picture(folder / "latin.png", 64, 64)
    (folder / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic"), (folder / "photo.txt").write_text("a photo")
    (folder / "latin.caption").write_bytes("ein Würfel".encode("latin-1"))
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "gone"}\nnonsense\n')
    said = []
    with pytest.raises(InputError, match="7 problems.*--bad-images skip"):
        read_folder(folder, 64, 16, say=said.append)
    for words in ("cut.png: expected a PNG", "photo.HEIC: expected a PNG", "silent.png: has no caption; write silent.txt", "empty.png: its caption",
                  "latin.caption: is not UTF-8", "gone.png: named in metadata.jsonl", "metadata.jsonl, line 4: expected"):
        assert words in said[0]
    assert len(read_folder(folder, 64, 16, skip=True, say=said.append)) == 3


def test_captions_are_read_as_windows_writes_them(folder):
    """With a byte order mark, carriage returns, kohya's ending, ./ before the name, and U+2028, which ends no line in JSON."""
    (folder / "a.txt").unlink()
    (folder / "a.caption").write_bytes(b"\xef\xbb\xbfa red cube\r\n")
    rows = [{"file_name": "./deep/c.png", "text": "a tall\u2028one"}, {"file_name": "b.JPG", "text": "wide"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [photo.text for photo in read_folder(folder, 64, 16, say=str)] == ["a red cube", "wide", "a tall one"]


@pytest.mark.parametrize("line", [b'{"file_name": "a.png", "text": "caf\xe9"}', b'{"file_name": 3, "text": "x"}',
                                  b'{"file_name": null, "text": "x"}', b"[" * 100_000,
                                  rb'{"file_name": "a.png", "text": "half an emoji: \ud83d"}',
                                  rb'{"file_name": "\ud83d.png", "text": "x"}'])
def test_a_bad_line_of_metadata_is_listed(line, folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "deep/c.png", "text": "x"}\n' + line)
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, say=said.append)
    assert "metadata.jsonl, line 2: expected a JSON object in UTF-8 with file_name and text" in said[0]


def test_every_folder_may_have_a_metadata_of_its_own(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "deep/metadata.jsonl").write_text('{"file_name": "c.png", "text": "deep down"}\n\n')
    texts = [photo.text for photo in read_folder(folder, 64, 16, caption="none", say=str)]
    assert texts == ["a red cube", "a wide one", "deep down"]
    (folder / "deep/metadata.jsonl").write_text('{"file_name": "a.png", "text": "not here"}')
    with pytest.raises(InputError, match="2 problems"):  # a.png is not there, c.png has no caption
        read_folder(folder, 64, 16, say=str)


def test_a_name_that_is_no_utf8_is_listed(folder):
    picture(folder / "cafe.png", 64, 64)
    (folder / "cafe.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, say=said.append)
    assert b"caf?.png: has no caption" in said[0].encode()  # a terminal takes nothing else


def test_a_folder_without_pictures_is_refused(tmp_path):
    for name, words in (("nowhere", "no such folder"), (".", "no usable picture")):
        with pytest.raises(InputError, match=words):
            read_folder(tmp_path / name, 64, 16, say=str)


def test_of_several_processes_one_reports(folder, capsys, monkeypatch):
    config = t2i.Recipe(data=str(folder))
    for first in (True, False):
        monkeypatch.setattr(training, "first", lambda: first)
        assert len(t2i.pictures_of(tiny.build(), config)) == 3
        assert ("3 pictures, 3 usable" in capsys.readouterr().out) == first


def test_settings_that_make_no_sense_are_refused(folder, capsys):
    for flags, words in ((("--lora-rank", "-3"), "--lora-rank must be at least 0, not -3"),
                         (("--lora-alpha", "nan"), "argument --lora-alpha: invalid float value: 'nan'"),
                         (("--drop", "2"), "--drop must be at most 1"), (("--min-snr", "-1"), "--min-snr must be at least 0"),
                         (("--scenes", "0"), "--scenes must be at least 1"), (("--balanced", "--min-snr", "5"), "--balanced and --min-snr are two weightings"),
                         (("--side", "8"), "--side 8: must be at least 16"), (("--lora-alpha", "4"), "--lora-alpha and --lora-format kohya: need --lora-rank"),
                         (("--lora-format", "kohya"), "need --lora-rank")):
        assert train.main(["t2i", "--data", str(folder), "--model", str(tiny.folder()), "--steps", "1", "--out",
                           str(folder.parent / "run"), *flags]) == 2
        assert words in capsys.readouterr().err
    for flag in ("--out", "--save"):
        assert train.main(["t2i", "--data", str(folder), "--model", str(tiny.folder()), "--steps", "1", "--batch", "2", flag,
                           str(folder / "run")]) == 2
        assert f"{flag} {folder / 'run'}: lies in --data" in capsys.readouterr().err
    assert train.main(["t2i", "--side", "32"]) == 2 and "--side: the world's pictures have" in capsys.readouterr().err


def test_kohyas_names_are_for_sdxl(folder, capsys):
    assert train.main(["t2i", "--data", str(folder), "--model", str(tiny.folder("sd15")), "--lora-rank", "2", "--lora-format",
                       "kohya", "--steps", "1", "--batch", "2", "--out", str(folder.parent / "run")]) == 2
    assert "--lora-format kohya: writes names that only SDXL's" in capsys.readouterr().err


def test_a_refiner_is_refused_before_anything_is_encoded(folder, capsys, tmp_path):
    tiny.build("refiner", folder=tmp_path / "refiner")
    assert train.main(["t2i", "--data", str(folder), "--model", str(tmp_path / "refiner"), "--out", str(tmp_path / "run")]) == 2
    assert f"--model {tmp_path / 'refiner'}: is a refiner" in capsys.readouterr().err


def test_texts_encoded_once_are_those_encoded_each_time(folder):
    pipeline, config = tiny.build(), t2i.Recipe(data=str(folder), seed=1, drop=0.6)
    batch = t2i.data(pipeline, config)(0, range(12))
    assert {None, ""} < set(batch["captions"])
    context, pooled = t2i.encode_batch(pipeline, batch["captions"], False)
    torch.testing.assert_close(batch["context"], context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["pooled"], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [(), ("--train-text",), ("--lora-format", "kohya", "--lora-alpha", "8")])
def test_a_lora_from_a_folder_is_drawn_with(folder, tmp_path, extra, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(tiny.folder())
    assert train.main(["t2i", "--data", str(folder), "--model", model, "--lora-rank", "4", "--steps", "2", "--batch",
                       "2", "--sample-every", "2", "--ema", "0", "--warmup", "0", "--out", "run", *extra]) == 0
    found = read_weights("run/model/lora.safetensors")
    kohya = "kohya" in extra
    parts = {"unet" if name.startswith("lora_unet_") else name.split(".")[0] for name in found}
    assert parts == ({"unet", "text_encoder", "text_encoder_2"} if "--train-text" in extra else {"unet"})
    learned = [x.abs().max() > 0 for name, x in found.items() if ("lora_up" if kohya else "lora_B") in name]
    assert all(learned) and len(learned) == len(found) // (3 if kohya else 2)  # kohya's have an alpha each
    assert not any("text_encoder.text_model.encoder.layers.2." in name for name in found)  # the UNet never sees it
    assert sample.main(["a red cube", "--model", model, "--steps", "2", "--n", "1", "--device", "cpu", "--lora",
                        "run/model/lora.safetensors"]) == 0
    plain = Pipeline.load(model).generate("a red cube", steps=2)[0]
    assert open_picture("pictures/picture.png").tobytes() != plain.tobytes()


def test_bad_pictures_stop_training_with_exit_code_2(folder, tmp_path, capsys):
    picture(folder / "silent.png", 64, 64)
    flags = ["t2i", "--data", str(folder), "--model", str(tiny.folder()), "--lora-rank", "4", "--steps", "1", "--batch",
             "2", "--sample-every", "0", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 2
    output = capsys.readouterr()
    assert "silent.png: has no caption" in output.out and "1 problems" in output.err
    assert train.main([*flags, "--bad-images", "skip"]) == 0
    assert train.main([*flags, "--from-nothing"]) == 2
    assert "leave out --from-nothing" in capsys.readouterr().err


# --cache ----------------------------------------------------------------------------------------------------------

def counted(monkeypatch):
    """A list that grows by each size the VAE encodes and each list of texts that is encoded from now on."""
    made, encode_image, encode_text = [], VAE.encode, t2i.encode
    monkeypatch.setattr(VAE, "encode", lambda vae, x: made.append(tuple(x.shape)) or encode_image(vae, x))
    monkeypatch.setattr(t2i, "encode", lambda texts, *towers: made.append(texts) or encode_text(texts, *towers))
    return made


RECIPES = {
    "t2i": ("--lora-rank", "2"), "inversion": ("--word", "one", "--like", "cyan"),
    "dreambooth": ("--lora-rank", "2", "--caption", "a sks cube", "--prior", "a cube", "--prior-pictures", "2")}


@pytest.mark.parametrize("name", RECIPES)
def test_with_the_cache_training_is_the_same_bits(name, folder, tmp_path, monkeypatch):
    if name == "inversion":
        (folder / "a.txt").write_text("one cube")
    made, read, cache = counted(monkeypatch), [], ["--cache", str(tmp_path / "kept")]
    for run, flags in (("plain", []), ("cold", cache), ("warm", cache)):
        if run != "plain" and name == "dreambooth":  # the class's pictures, drawn before any training
            shutil.copytree(tmp_path / "plain/prior", tmp_path / run / "prior")
        made.clear()
        assert train.main([name, "--data", str(folder), "--model", str(tiny.folder()), "--steps", "1", "--batch", "2",
                           "--sample-every", "0", "--ema", "0", "--warmup", "0", "--drop", "0.5", "--out",
                           str(tmp_path / run), *RECIPES[name], *flags]) == 0
        files = (tmp_path / run / "model").glob("*.safetensors")
        read.append({(path.name, key): x for path in files for key, x in read_weights(path).items()})
        assert sum(isinstance(x, tuple) for x in made) == (0 if run == "warm" else 5 if name == "dreambooth" else 3)
        assert name == "inversion" or bool(made) == (run != "warm")  # whose texts change as it learns
    plain, *others = read
    assert plain and all(plain.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in plain.items())
               for other in others)


@pytest.mark.parametrize("name", [*RECIPES, "controlnet", "edit", "onepic"])
def test_a_recipe_that_was_cut_goes_on_with_the_same_bits(name, folder, tmp_path):
    if name == "inversion":
        (folder / "a.txt").write_text("one cube")
    given = ["--data", str(folder), "--drop", "0.5"] if name in RECIPES else ["--scenes", "4"]
    flags = [name, *given, *RECIPES.get(name, ()), "--model", str(tiny.folder()), "--batch", "2", "--precision", "fp32",
             "--sample-every", "0", "--warmup", "0", "--schedule", "constant"]
    for run, *more in (("whole", "--steps", "3"), ("cut", "--steps", "1"), ("cut", "--steps", "3", "--resume", "latest")):
        assert train.main([*flags, *more, "--out", str(tmp_path / run)]) == 0
    whole, cut = ({path.relative_to(tmp_path / run): read_weights(path)
                   for path in (tmp_path / run / "model").rglob("*.safetensors")} for run in ("whole", "cut"))
    assert whole and whole.keys() == cut.keys()
    assert all(torch.equal(x, cut[path][key]) for path, tensors in whole.items() for key, x in tensors.items())


def test_what_has_changed_is_encoded_anew(folder, tmp_path, monkeypatch):
    pipeline, made = tiny.build(), counted(monkeypatch)

    def found(**settings):
        made.clear()
        config = t2i.Recipe(data=str(folder), cache=str(tmp_path / "kept"), drop=0.0, **settings)
        batch, kept = t2i.data(pipeline, config), made.copy()
        fresh = t2i.data(pipeline, t2i.Recipe(data=str(folder), drop=0.0, **settings))
        for step in range(4):
            known, wanted = batch(step, range(3)), fresh(step, range(3))
            assert all(torch.equal(known[key], x) for key, x in wanted.items() if torch.is_tensor(x))
        return [x if isinstance(x, list) else x[2:] for x in kept]

    assert len(found()) == 3 + 5 and found() == []
    picture(folder / "a.png", 65, 65)
    assert found() == [(64, 64)]
    (folder / "b.txt").write_text("a blue torus")
    assert found() == [["a blue torus"]]
    assert len(found(side=80)) == 3 and found() == []
    with monkeypatch.context() as other:  # a computer that computes otherwise, with the same folder
        other.setattr(t2i, "computes_bf16", lambda device, here=t2i.computes_bf16: not here(device))
        assert len(found()) == 3 and found() == []
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.view(-1)[7] += 1e-3
    assert len(found()) == 3 and found() == []
    with torch.no_grad():
        pipeline.text_encoder_2.text_projection.weight.view(-1)[7] += 1e-3
    assert len(found()) == 5 and found() == []
    pipeline.tokenizer.pad = 3
    assert len(found()) == 5 and found() == []
    pipeline.vae.to(torch.bfloat16)
    assert len(found()) == 3 and found() == []


def test_a_damaged_cache_is_named_and_made_anew(folder, tmp_path, monkeypatch, capsys):
    pipeline, made = tiny.build(), counted(monkeypatch)
    config = t2i.Recipe(data=str(folder), cache=str(tmp_path / "kept"))
    right = t2i.data(pipeline, config)(0, range(8))
    cut, bent, swapped, other, *_ = files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 8 and {path.suffix for path in files} == {".safetensors"}
    cut.write_bytes(cut.read_bytes()[:-9])
    bytes_ = bytearray(bent.read_bytes())
    bytes_[-5] ^= 1
    bent.write_bytes(bytes_)
    swapped.write_bytes(other.read_bytes())
    made.clear(), capsys.readouterr()
    again = t2i.data(pipeline, config)(0, range(8))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--cache" in line]
    assert len(made) == len(lines) == 3
    for path, words in ((cut, "truncated"), (bent, "not match its sha256"), (swapped, "not match its sha256")):
        assert any(str(path) in line and words in line and "making it anew" in line for line in lines)
    assert all(torch.equal(again[key], x) for key, x in right.items() if torch.is_tensor(x))
    made.clear()
    t2i.data(pipeline, config)
    assert made == []


def test_a_cache_that_cannot_be_is_refused(folder, tmp_path, capsys):
    flags = ["t2i", "--model", str(tiny.folder()), "--steps", "1", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--cache", str(tmp_path / "kept")]) == 2
    assert "kept: must be a folder, for what is encoded of --data; give both" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert train.main([*flags, "--data", str(folder), "--cache", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == (
        f"train.py: --cache {tmp_path / 'file'}: must be a folder, for what is encoded of --data; give both\n")
    assert train.main([*flags, "--data", str(folder), "--cache", str(tmp_path / "file" / "kept")]) == 2
    assert f"{tmp_path / 'file' / 'kept'}" in (error := capsys.readouterr().err) and "cannot write" in error
