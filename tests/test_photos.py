"""Training on a folder of pictures: what is found, what is refused, and a LoRA from it that sample.py draws with."""

import json
import os

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample
import train
from minipic import latents
from minipic.common import InputError
from minipic.image import open_picture, to_tensor
from minipic.pipeline import Pipeline
from minipic.recipes import t2i
from minipic.training.photos import Photo, bucket_sizes, match_by_stem, nearest_bucket, read_folder
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
    sizes = bucket_sizes(1024, 64)
    assert (1024, 1024) in sizes and (832, 1216) in sizes and (1216, 832) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and max(height / width, width / height) <= 2
        assert 1024**2 - 64 * height < height * width <= 1024**2
    assert nearest_bucket((3000, 2000), sizes) == (1216, 832)
    assert nearest_bucket((500, 500), sizes) == (1024, 1024)


def test_pictures_captions_and_size_ids(folder):
    said = []
    photos = {photo.path.name: photo for photo in read_folder(folder, 64, 16, report=said.append)}
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
    (folder / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "photo.txt").write_text("a photo")
    (folder / "latin.caption").write_bytes("ein Würfel".encode("latin-1"))
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "gone"}\nnonsense\n')
    said = []
    with pytest.raises(InputError, match="7 problems.*--bad-images skip"):
        read_folder(folder, 64, 16, report=said.append)
    for words in (
            "cut.png: expected a PNG", "photo.HEIC: expected a PNG",
            "silent.png: has no caption; write silent.txt", "empty.png: its caption is empty",
            "latin.caption: is not UTF-8", "gone.png: named in metadata.jsonl",
            "metadata.jsonl, line 4: expected"):
        assert words in said[0]
    assert len(read_folder(folder, 64, 16, skip_bad=True, report=said.append)) == 3


def test_captions_are_read_as_windows_writes_them(folder):
    """With a byte order mark, carriage returns, kohya's ending, ./ before the name, and U+2028, which
    ends no line in JSON."""
    (folder / "a.txt").unlink()
    (folder / "a.caption").write_bytes(b"\xef\xbb\xbfa red cube\r\n")
    rows = [{"file_name": "./deep/c.png", "text": "a tall\u2028one"}, {"file_name": "b.JPG", "text": "wide"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [photo.text for photo in read_folder(folder, 64, 16, report=str)] == ["a red cube", "wide", "a tall one"]


@pytest.mark.parametrize("line", [b'{"file_name": "a.png", "text": "caf\xe9"}', b'{"file_name": 3, "text": "x"}',
                                  b'{"file_name": null, "text": "x"}', b"[" * 100_000,
                                  rb'{"file_name": "a.png", "text": "half an emoji: \ud83d"}',
                                  rb'{"file_name": "\ud83d.png", "text": "x"}'])
def test_a_bad_line_of_metadata_is_listed(line, folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "deep/c.png", "text": "x"}\n' + line)
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert "metadata.jsonl, line 2: expected a JSON object in UTF-8 with file_name and text" in said[0]


def test_every_folder_may_have_a_metadata_of_its_own(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "deep/metadata.jsonl").write_text('{"file_name": "c.png", "text": "deep down"}\n\n')
    texts = [photo.text for photo in read_folder(folder, 64, 16, caption="none", report=str)]
    assert texts == ["a red cube", "a wide one", "deep down"]
    (folder / "deep/metadata.jsonl").write_text('{"file_name": "a.png", "text": "not here"}')
    with pytest.raises(InputError, match="2 problems"):  # a.png is not there, c.png has no caption
        read_folder(folder, 64, 16, report=str)


def test_a_name_that_is_no_utf8_is_listed(folder):
    picture(folder / "cafe.png", 64, 64)
    (folder / "cafe.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert b"caf?.png: has no caption" in said[0].encode()  # a terminal takes nothing else


def test_a_name_too_long_for_a_caption_file_is_listed(folder):
    picture(folder / f"{'n' * 250}.png", 64, 64)  # with .caption it would have 258 characters; 255 are possible
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert f"{'n' * 250}.png: has no caption; write {'n' * 250}.txt" in said[0]
    assert len(read_folder(folder, 64, 16, caption="none", report=str)) == 4


def test_the_picture_of_the_same_stem_is_matched(folder, tmp_path):
    photos = read_folder(folder, 64, 16, report=str)
    for name in ("c.png", "a.webp", "b.png"):
        picture(tmp_path / "source" / name, 64, 64)
    (tmp_path / "source/a.txt").write_text("no picture")
    assert [path.name for path in match_by_stem(tmp_path / "source", photos)] == ["a.webp", "b.png", "c.png"]
    (tmp_path / "source/b.png").unlink()
    (tmp_path / "source/c.png").unlink()
    with pytest.raises(InputError, match="source/ lacks 2 of 3 pictures, the first is b"):
        match_by_stem(tmp_path / "source", photos)


def test_a_folder_without_pictures_is_refused(tmp_path):
    for name, words in (("nowhere", "no such folder"), (".", "no usable picture")):
        with pytest.raises(InputError, match=words):
            read_folder(tmp_path / name, 64, 16, report=str)


def test_of_several_processes_one_reports(folder, capsys, monkeypatch):
    config, pipeline = t2i.Settings(data=str(folder)), tiny.build()
    for is_first in (True, False):
        monkeypatch.setattr(latents, "is_main_process", lambda: is_first)
        assert len(latents.training_pictures(pipeline, config)) == 3
        assert ("3 pictures, 3 usable" in capsys.readouterr().out) == is_first


@pytest.mark.parametrize("flags, words", [
    ("--lora-rank -3", "--lora-rank: must be at least 0, not -3"),
    ("--lora-alpha nan", "--lora-alpha: invalid float value: 'nan'"),
    ("--lora-alpha 4", "--lora-alpha: needs --lora-rank; without it there is no LoRA"),
    ("--lora-format kohya", "--lora-format: needs --lora-rank; without it there is no LoRA"),
    ("--caption-dropout 2", "--caption-dropout: must be at most 1"),
    ("--min-snr -1", "--min-snr: must be at least 0"),
    ("--balanced --min-snr 5", "--balanced and --min-snr are two weightings"),
    ("--scenes 0", "--scenes: must be at least 1"),
    ("--resolution 8", "--resolution: must be at least 16, not 8"),
    ("--data nowhere", "--data: nowhere: no such folder"),
])
def test_settings_that_make_no_sense_are_refused(folder, capsys, flags, words):
    assert train.main(["t2i", "--data", str(folder), "--model", str(tiny.folder()), "--steps", "1",
                       "--out", str(folder.parent / "run"), *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {words}")


@pytest.mark.parametrize("flag", ["--out", "--save"])
def test_nothing_is_written_into_the_folder_of_pictures(folder, capsys, flag):
    assert train.main(["t2i", "--data", str(folder), "--model", str(tiny.folder()), "--steps", "1",
                       "--batch", "2", flag, str(folder / "run")]) == 2
    assert f"{flag}: {folder / 'run'} lies in --data" in capsys.readouterr().err


def test_the_worlds_pictures_have_their_own_resolution(capsys):
    assert train.main(["t2i", "--resolution", "32"]) == 2
    assert "--resolution: the world's pictures have" in capsys.readouterr().err


def test_kohyas_names_are_for_sdxl(folder, capsys):
    assert train.main(["t2i", "--data", str(folder), "--model", str(tiny.folder("sd15")), "--lora-rank", "2",
                       "--lora-format", "kohya", "--steps", "1", "--batch", "2",
                       "--out", str(folder.parent / "run")]) == 2
    error = capsys.readouterr().err
    assert "--lora-format: kohya's names are for SDXL's LoRAs only; leave it out for this model" in error


def test_a_refiner_is_refused_before_anything_is_encoded(folder, capsys, tmp_path):
    model = str(tiny.folder("refiner"))
    assert train.main(["t2i", "--data", str(folder), "--model", model, "--out", str(tmp_path / "run")]) == 2
    assert f"--model: {model} is a refiner, which no recipe trains" in capsys.readouterr().err


def test_texts_encoded_once_are_those_encoded_each_time(folder):
    pipeline, config = tiny.build(), t2i.Settings(data=str(folder), seed=1, caption_dropout=0.6)
    batch = t2i.data(pipeline, config).batch(0, range(12))
    assert {None, ""} < set(batch["captions"])
    context, pooled = latents.encode_text(pipeline, batch["captions"], False)
    torch.testing.assert_close(batch["context"], context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["pooled"], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
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
