"""Training on a folder of pictures: what is found, what is refused, and a LoRA from it that sample.py draws with."""

import json
import os
import re
import shutil
from pathlib import Path

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
from minipic.training import processes
from minipic.training.inputs import check_inputs, digest_inputs
from minipic.training.photos import Photo, bucket_sizes, match_by_stem, nearest_bucket, read_folder
from minipic.weights import read_weights
from minipic.weights.files import write_json


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
    with pytest.raises(InputError, match="^bad_images: .* 7 problems, listed above; mend them, or choose skip"):
        read_folder(folder, 64, 16, report=said.append)
    for words in (
            "cut.png: expected a PNG", "photo.HEIC: .HEIC cannot be read; convert it",
            "silent.png: has no caption; write silent.txt", "empty.png: its caption is empty",
            "latin.caption, line 1: is not UTF-8", "metadata.jsonl, line 3: names gone.png, which is no picture of this folder",
            "metadata.jsonl, line 4: expected a JSON object"):
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


@pytest.mark.parametrize("line, fault", [
    (b'{"file_name": "a.png", "text": "caf\xe9"}', "is not UTF-8"),
    (b'{"file_name": 3, "text": "x"}', "file_name is 3; expected a text"),
    (b'{"file_name": null, "text": "x"}', "file_name is null; expected a text"),
    (b'{"file_name": "a.png", "text": ["a", "b"]}', 'text is ["a", "b"]; expected a text'),
    (b'{"file_name": "a.png", "text": null}', "text is null; expected a text"),
    (b'{"img": "a.png", "label": 3}', "has the keys img, label; rename one to file_name (image, file"),
    (b'{"file_name": "a.png", "label": "x"}', "has the keys file_name, label; rename one to text (caption, prompt"),
    (b'{"image": "gone.png", "prompt": "x"}', "names gone.png, which is no picture of this folder"),
    (b'{"file_name": "deep/c.png", "text": "y"}', "deep/c.png has another caption already"),
    (b"[1]", "expected a JSON object with file_name and text"), (b"[" * 100_000, "expected a JSON object"),
    (rb'{"file_name": "a.png", "text": "half an emoji: \ud83d"}', r'text is "half an emoji: \ud83d"; expected'),
    (rb'{"file_name": "\ud83d.png", "text": "x"}', r'file_name is "\ud83d.png"; expected a text')])
def test_a_bad_line_of_metadata_is_listed(line, fault, folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "deep/c.png", "text": "x"}\n' + line)
    said = []
    with pytest.raises(InputError, match="problems, listed above"):
        read_folder(folder, 64, 16, report=said.append)
    assert f"metadata.jsonl, line 2: {fault}" in said[0]


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
    assert r"caf\udce9.png: has no caption" in said[0]  # a terminal takes nothing else


def test_a_name_too_long_for_a_caption_file_is_listed(folder):
    picture(folder / f"{'n' * 250}.png", 64, 64)  # with .caption it would have 258 characters; 255 are possible
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert f"{'n' * 250}.png: has no caption; write {'n' * 250}.txt" in said[0]
    assert len(read_folder(folder, 64, 16, caption="none", report=str)) == 4


@pytest.mark.parametrize("name", [
    ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/a.png", ".@__thumb/a.png",
    "._a.png", "__MACOSX/._a.png", "__MACOSX/a.png", ".Trash-1000/files/old.jpg", "$RECYCLE.BIN/S-1/old.png",
    "#recycle/a.png", "lost+found/a.png", "System Volume Information/a.png", "deep/.hidden.png", ".git/metadata.jsonl"])
def test_what_systems_and_programs_leave_is_not_trained_on(name, folder):
    picture(folder / "x.png", 64, 64)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "x.png").rename(folder / name)
    said = []
    photos = read_folder(folder, 64, 16, caption="none", report=said.append)
    assert [photo.path.name for photo in photos] == ["a.png", "b.JPG", "c.png"]
    assert len(said) == 4  # the summary and three buckets


def test_linked_folders_are_followed_once(folder, tmp_path):
    picture(tmp_path / "elsewhere/d.png", 64, 64, "d")
    picture(tmp_path / "elsewhere/e/e.png", 64, 64, "e")
    (folder / "alias").symlink_to(folder / "deep")  # a folder goes by its own name
    (folder / "deep/up").symlink_to(folder)  # a circle
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "other link").symlink_to(tmp_path / "elsewhere/e")
    (folder / "f.png").symlink_to(tmp_path / "elsewhere/d.png")
    photos = read_folder(folder, 64, 16, caption="none", report=str)
    names = [photo.path.relative_to(folder).as_posix() for photo in photos]
    assert names == ["a.png", "b.JPG", "deep/c.png", "f.png", "link/d.png", "link/e/e.png"]


@pytest.mark.parametrize("name, format", [
    ("x.jfif", "JPEG"), ("x.jpe", "JPEG"), ("x.JPEG", "JPEG"), ("x.mpo", "MPO"), ("x.tga", "TGA"), ("x.apng", "PNG"),
    ("x.gif", "GIF"), ("x.tif", "TIFF"), ("x.TIFF", "TIFF"), ("x.avif", "AVIF"), ("x.jp2", "JPEG2000"),
    ("x.ppm", "PPM"), ("x.webp", "WEBP"), ("x.bmp", "BMP")])
def test_a_picture_of_any_usual_ending_is_read(name, format, folder):
    Image.new("RGB", (64, 64), (200, 40, 90)).save(folder / name, format)
    (folder / "x.txt").write_text("a plain one")
    x, = [photo for photo in read_folder(folder, 64, 16, report=str) if photo.path.name == name]
    levels = (Photo.draw([x])[0] + 1) * 127.5
    assert (levels - torch.tensor([200.0, 40, 90])[:, None, None]).abs().max() < 8


@pytest.mark.parametrize("name, words", [
    ("x.heic", "x.heic: .heic cannot be read; convert it to PNG or JPEG"),
    ("x.jxl", "x.jxl: .jxl cannot be read"),
    ("x.png", "x.png: expected a PNG"), ("x.tga", "x.tga: expected a PNG")])
def test_a_picture_that_cannot_be_read_is_a_problem(name, words, folder):
    (folder / name).write_bytes(b"what is this? a text of more than eighteen bytes")
    said = []
    with pytest.raises(InputError, match="bad_images: .* 2 problems"):  # all that is wrong with it
        read_folder(folder, 64, 16, report=said.append)
    assert words in said[0] and f"{name}: has no caption; write x.txt" in said[0]


def test_a_picture_of_numbers_of_any_range_is_a_problem(folder):
    Image.new("F", (64, 64), 0.5).save(folder / "a.tif")
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert "a.tif: expected a PNG" in said[0] and "32-bit floats" in said[0]


def test_other_files_are_named(folder):
    names = ["f.jpeg_large", "no_ending", "clip.mp4", "orphan.txt", "metadata.parquet", "\x1b[31mred"]
    for name in names:
        (folder / name).write_bytes(b"x")
    said = []
    read_folder(folder, 64, 16, report=said.append)
    lines = [line.strip() for line in said if "is not used" in line]
    assert [line.split(": ")[0] for line in lines] == [name.replace("\x1b", "\\x1b") for name in sorted(names)]


@pytest.mark.parametrize("kind", ["caption", "picture", "metadata"])
def test_a_pipe_is_refused_and_not_waited_for(kind, folder):
    name = {"caption": "a.txt", "picture": "p.png", "metadata": "metadata.csv"}[kind]
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    said = []
    with pytest.raises(InputError, match="problems, listed above"):
        read_folder(folder, 64, 16, report=said.append)
    assert f"{name} is a named pipe" in said[0]


@pytest.mark.parametrize("data, text", [
    ("ein Würfel".encode(), "ein Würfel"), ("ein Würfel".encode("utf-8-sig"), "ein Würfel"),
    ("ein Würfel".encode("utf-16"), "ein Würfel"), (b"\xfe\xff" + "ein Würfel".encode("utf-16-be"), "ein Würfel"),
    ("ein\nWürfel".encode("latin-1"), "a.txt, line 2: is not UTF-8; save it as UTF-8"),
    ("a cube".encode("utf-16-le"), "a.txt: is no text, or not in UTF-8"), (b"\xff\xfea", "a.txt, line 1: is not UTF-8"),
    (b"x" * 100_001, "a.txt: has more than 100,000 bytes; shorten it"), (b" \n", "a.png: its caption is empty")])
def test_the_encoding_of_a_caption_is_known_or_named(data, text, folder):
    (folder / "a.txt").write_bytes(data)
    said = []
    try:
        assert read_folder(folder, 64, 16, report=said.append)[0].text == text
    except InputError:
        assert text in said[0] and said[0].count("\n") == 1


@pytest.mark.parametrize("name, content", [
    ("metadata.csv", 'file_name,text\ndeep/c.png,"a tall, red one"\nb.JPG,"two\nlines"\n'),
    ("metadata.csv", '\ufefffile_name,n,caption\r\n./deep/c.png,3,"a tall, red one"\r\nb.JPG,4,two lines\r\n'),
    ("metadata.jsonl", '{"image": "deep\\\\c.png", "prompt": "a tall, red one"}\n{"file_name": "b.JPG", "caption": "two lines"}'),
    ("metadata.jsonl", '{"file_name": "FOLDER/deep/c.png", "text": "a tall, red one"}\n'
                       '{"path": "deep/../b.JPG", "text": "two lines"}'),
    ("meta_cap.json", '{"deep/c.png": {"caption": "a tall, red one"}, "b.JPG": {"tags": "two lines"}}')])
def test_every_kind_of_metadata_is_read(name, content, folder):
    (folder / "metadata.jsonl").unlink()
    (folder / name).write_text(content.replace("FOLDER", str(folder)), encoding="utf-8")
    said = []
    texts = [photo.text for photo in read_folder(folder, 64, 16, report=said.append)]
    assert texts == ["a red cube", "two lines", "a tall, red one"]
    assert len(said) == 4  # all files are used


@pytest.mark.parametrize("name, content, fault", [
    ("metadata.csv", "file_name;text\na.png;x\n", "metadata.csv, line 2: has the keys file_name;text; rename one to"),
    ("metadata.csv", "file_name,text\na.png\n", "metadata.csv, line 2: text is null; expected a text"),
    ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "metadata.csv: cannot be read as CSV (field larger"),
    ("meta_cap.json", "[1]", "meta_cap.json: cannot be read as JSON"),
    ("meta_cap.json", '{"a.png": "a cube"}', "meta_cap.json: cannot be read as JSON"),
    ("meta_cap.json", "{", "meta_cap.json: cannot be read as JSON"),
    ("metadata.csv", b"\xff\xfe\x00", "metadata.csv, line 1: is not UTF-8")])
def test_metadata_that_cannot_be_read_is_named(name, content, fault, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert fault in said[0]


@pytest.mark.parametrize("name", ["c.txt", "c.TXT", "c.caption", "c.CAPTION", "c.png.txt", "c.png.TXT"])
def test_a_caption_file_may_have_any_usual_name(name, folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "deep" / name).write_text("beside it")
    said = []
    photos = read_folder(folder, 64, 16, caption="for all", report=said.append)
    assert photos[2].text == "beside it" and not [line for line in said if "is not used" in line]


@pytest.mark.parametrize("name, content", [
    ("METADATA.JSONL", '{"file_name": "deep/c.png", "text": "described"}'),
    ("metadata.csv", 'file_name, text\ndeep/c.png, "described"\n'),
    ("meta_cap.json", '{"deep/c": {"caption": "described"}}'),  # as kohya's scripts write it
    ("metadata.jsonl", '{"file_name": "REAL/deep/c.png", "text": "described"}'),
    ("metadata.jsonl", '{"file_name": "LINK/deep/c.png", "text": "described"}')])
@pytest.mark.parametrize("root", ["REAL", "LINK"])
def test_a_picture_is_found_by_any_of_its_names(name, content, root, folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "link").symlink_to(folder)
    places = {"REAL": str(folder), "LINK": str(tmp_path / "link")}
    for word, place in places.items():
        content = content.replace(word, place)
    (folder / name).write_text(content)
    photos = read_folder(places[root], 64, 16, caption="for all", report=str)
    assert [photo.text for photo in photos] == ["a red cube", "a wide one", "described"]


def test_accents_are_the_same_however_they_are_written(folder):
    picture(folder / "cafe\u0301.png", 64, 64)  # two characters, as macOS writes them
    (folder / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,coffee\n", encoding="utf-8")
    assert "coffee" in [photo.text for photo in read_folder(folder, 64, 16, report=str)]


@pytest.mark.parametrize("name", ["../outside.png", "deep", ".", "", "a.txt", ".hidden.png", "A.PNG", "x" * 300])
def test_metadata_of_what_is_no_picture_of_the_folder_is_a_problem(name, folder):
    picture(folder.parent / "outside.png", 64, 64)
    picture(folder / ".hidden.png", 64, 64)
    (folder / "deep/metadata.jsonl").write_text(json.dumps({"file_name": f"../{name}" if name else "", "text": "x"}))
    said = []
    with pytest.raises(InputError, match="1 problems"):
        read_folder(folder, 64, 16, report=said.append)
    assert "deep/metadata.jsonl, line 1: names " in said[0] and "which is no picture of this folder" in said[0]


def test_folders_in_kohyas_folders_and_those_of_no_repeats(tmp_path):
    for name in ("4_dog/near/far/a.png", "3_cat/5_grey cat/a.png", "0_bad/a.png", "0_bad/2_good/a.png", "7_/a.png",
                 "2024_holiday/a.png", "x_3/a.png"):
        picture(tmp_path / name, 64, 64)
    said = []
    photos = read_folder(tmp_path, 64, 16, caption="given", report=said.append)
    assert {str(photo.path.parent.relative_to(tmp_path)): photo.repeats for photo in photos} == {
        "4_dog/near/far": 4, "3_cat/5_grey cat": 5, "0_bad/2_good": 2, "7_": 7, "2024_holiday": 1, "x_3": 1}
    lines = "\n".join(said)
    assert "0_bad: is left out, since its name asks for 0 repeats" in lines
    assert "4_dog/near/far: each picture counts 4 times; its caption is 'dog' where it has no other" in lines
    assert "2024_holiday: each picture counts 1 times\n" in lines and "x_3:" not in lines
    # The root itself may have any name.
    assert [photo.repeats for photo in read_folder(tmp_path / "7_", 64, 16, caption="x", report=str)] == [1]


def test_kohyas_folders_repeat_their_pictures_and_name_them(tmp_path):
    for name, repeats in (("10_sks dog", 10), ("2_cat", 2), ("03_cow", 3), ("plain", 1), ("2024_holiday", 1)):
        picture(tmp_path / name / "a.png", 64, 64, "said" if name in ("2_cat", "plain", "2024_holiday") else None)
    said = []
    photos = read_folder(tmp_path, 64, 16, report=said.append)
    assert {photo.path.parent.name: (photo.repeats, photo.text) for photo in photos} == {
        "10_sks dog": (10, "sks dog"), "2_cat": (2, "said"), "03_cow": (3, "cow"), "plain": (1, "said"),
        "2024_holiday": (1, "said")}
    assert "  10_sks dog: each picture counts 10 times; its caption is 'sks dog' where it has no other" in said
    given = read_folder(tmp_path, 64, 16, caption="given", report=str)
    assert {photo.text for photo in given} == {"given", "said"}

    data = latents.LatentData(tiny.model(), photos, t2i.Settings(data="photos", seed=3))
    rows = [row for step in range(60) for row in data.batch(step, range(20 * step, 20 * step + 20))["rows"]]
    for row, photo in enumerate(photos):
        assert abs(rows.count(row) / len(rows) - photo.repeats / 17) < 0.04
    assert data.batch(7, [3])["rows"] == data.batch(7, [3])["rows"]


def test_doubtful_pictures_are_reported(tmp_path):
    for name, size in (("photo", (1200, 900)), ("panorama", (3000, 300)), ("icon", (16, 16))):
        picture(tmp_path / f"{name}.png", *size, "x")
    (tmp_path / "copy.png").write_bytes((tmp_path / "photo.png").read_bytes())
    (tmp_path / "copy.txt").write_text("x")
    said = []
    photos = {photo.path.stem: photo for photo in read_folder(tmp_path, 256, 64, report=said.append)}
    height, width = photos["panorama"].size
    cut = round(100 * (1 - (width / height) / (3000 / 300)))
    assert said[-3:] == [
        f"  panorama.png: {cut}% of it is cut away, to fit its bucket",
        "  icon.png: is enlarged 16.0 times, so it is not sharp", "  photo.png: has the same bytes as copy.png"]
    assert cut == pytest.approx(80, abs=4)


def test_a_long_list_is_cut_short(tmp_path):
    for i in range(23):
        picture(tmp_path / f"{i:02d}.png", 16, 16)
    said = []
    with pytest.raises(InputError, match="23 problems"):
        read_folder(tmp_path, 64, 16, report=said.append)
    lines = said[0].splitlines()
    assert len(lines) == 22 and "19.png: has no caption" in lines[20] and lines[21] == "  and 3 more"


def test_the_picture_of_the_same_stem_is_matched(folder, tmp_path):
    photos = read_folder(folder, 64, 16, report=str)
    for name in ("c.png", "a.webp", "b.png"):
        picture(tmp_path / "source" / name, 64, 64)
    (tmp_path / "source/a.txt").write_text("no picture")
    (tmp_path / "source/._a.png").write_bytes(b"macOS")
    (tmp_path / "source/.thumbs").mkdir()
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
        monkeypatch.setattr(processes, "is_main_process", lambda: is_first)
        assert len(latents.read_photos(pipeline, config, config.data)) == 3
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


def test_links_that_form_a_circle_are_no_folder_and_no_picture(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("circle").symlink_to("circle")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "circle.txt").write_text("x")
    for flags, words in (
            ("--data circle", "--data: circle: no such folder"),
            (f"--data {folder} --out circle", "--out circle: cannot write there"),
            (f"--data {folder} --out run", f"--bad-images: {folder}: 1 problems, listed above")):
        assert train.main(["t2i", "--model", str(tiny.folder()), *flags.split()]) == 2
        output = capsys.readouterr()
        assert output.err.startswith(f"train.py: {words}")
    assert "circle.png: no such picture" in output.out or "symbolic links" in output.out


@pytest.mark.parametrize("flags", ["--caption x", "--bad-images skip"])
def test_what_is_said_of_pictures_needs_a_folder_of_them(flags, capsys):
    assert train.main(["t2i", *flags.split()]) == 2
    flag = flags.split()[0]
    assert f"train.py: {flag}: needs --data; without it this does nothing" in capsys.readouterr().err


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
    context, pooled = latents.encode_text(pipeline, batch["captions"])
    torch.testing.assert_close(batch["context"], context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["pooled"], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, index", [
    ("sd15", {}), ("sdxl", {}), ("sdxl", {"force_zeros_for_empty_prompt": True}),
    ("sdxl", {"force_zeros_for_empty_prompt": False})])
def test_a_caption_left_out_is_what_drawing_takes_without_a_negative_prompt(kind, index):
    pipeline = tiny.build(kind)
    pipeline.index = pipeline.index | index
    context, pooled = latents.encode_text(pipeline, ["a red cube", None, ""])
    cond, none = pipeline.encode("a red cube", None)
    _, empty = pipeline.encode("a red cube", "")
    for row, expected in enumerate((cond, none, empty)):
        torch.testing.assert_close(context[row], expected.context[0], rtol=1e-5, atol=1e-5)
        if kind == "sdxl":
            torch.testing.assert_close(pooled[row], expected.pooled[0], rtol=1e-5, atol=1e-5)
    are_zeros = kind == "sdxl" and index != {"force_zeros_for_empty_prompt": False}
    assert context[2].any() and bool(context[1].any()) != are_zeros


# Other data in a run that goes on ---------------------------------------------------------------------------------

def edit_caption(folder, model):
    (folder / "a.txt").write_text("a red cone")


def add_picture(folder, model):
    picture(folder / "00.png", 64, 64, "x")


def rename_picture(folder, model):
    (folder / "b.JPG").rename(folder / "c.JPG")


def repaint_picture(folder, model):
    Image.new("RGB", (64, 64), "green").save(folder / "a.png")


def change_metadata(folder, model):
    (folder / "metadata.jsonl").write_text('{"file_name": "deep/c.png", "text": "a long one"}\n\n')


def change_weights(folder, model):
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change, words", [
    (edit_caption, "data/a.txt has changed"), (add_picture, "data/00.png is new, data/00.txt is new"),
    (rename_picture, "data/b.JPG is gone, data/c.JPG is new"), (repaint_picture, "data/a.png has changed"),
    (change_metadata, "data/metadata.jsonl has changed"),
    (change_weights, "model/vae/diffusion_pytorch_model.safetensors has changed")])
def test_changed_inputs_are_named(change, words, folder, tmp_path):
    model, checkpoint = shutil.copytree(tiny.folder(), tmp_path / "model"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = t2i.Settings(data=str(folder), model=str(model), out="run", save="run/model")
    check_inputs(checkpoint, digest_inputs(config), False, print)  # from before there was such a record
    write_json(digest_inputs(config), checkpoint / "inputs.json")
    check_inputs(checkpoint, digest_inputs(config), False, print)
    change(folder, model)
    said = []
    with pytest.raises(InputError, match=f"^allow_data_change: .* was trained on other files: {re.escape(words)}; "):
        check_inputs(checkpoint, digest_inputs(config), False, said.append)
    check_inputs(checkpoint, digest_inputs(config), True, said.append)
    assert said == [f"{checkpoint} was trained on other files: {words}"]


def test_what_a_run_writes_is_none_of_its_inputs(tmp_path):
    model = shutil.copytree(tiny.folder(), tmp_path / "model")
    config = t2i.Settings(model=str(model), out=str(model / "run"), save=str(model / "unet"))
    names = digest_inputs(config)
    (model / "run").mkdir()
    (model / "run/log.json").write_text("{}")
    (model / "unet/config.json").write_text("{}")
    assert digest_inputs(config) == names and "model/vae/config.json" in names


@pytest.mark.slow
def test_a_run_goes_on_with_copied_files_and_not_with_changed_ones(folder, tmp_path, capsys):
    def run(steps, *flags, data=folder):
        return train.main([
            "t2i", "--data", str(data), "--model", str(tiny.folder()), "--lora-rank", "2", "--steps", str(steps),
            "--batch", "2", "--sample-every", "0", "--out", str(tmp_path / "run"), *flags])

    assert run(1) == 0
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)  # with other times
    assert run(2, "--resume", "latest", data=copied) == 0
    edit_caption(copied, None)
    capsys.readouterr()
    assert run(3, "--resume", "latest", data=copied) == 2
    assert re.search("--allow-data-change: .*step-000002 was trained on other files: data/a.txt has changed;",
                     capsys.readouterr().err)
    assert run(3, "--resume", "latest", "--allow-data-change", data=copied) == 0
    assert "step-000002 was trained on other files: data/a.txt has changed" in capsys.readouterr().out
    assert run(4, "--resume", "latest", data=copied) == 0  # now they are the run's own


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
    assert "silent.png: has no caption" in output.out
    assert output.err.startswith("train.py: --bad-images: ") and "1 problems" in output.err
    assert train.main([*flags, "--bad-images", "skip"]) == 0
    assert train.main([*flags, "--from-nothing"]) == 2
    assert "--lora-rank: a new UNet is trained whole; leave it out" in capsys.readouterr().err
