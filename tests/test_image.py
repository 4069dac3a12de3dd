"""Pictures in and out: every kind of file opened right or refused by name, and none ever overwritten."""

import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from minipic.common import InputError
from minipic.figures import image_grid
from minipic.image import (
    mask_to_tensor, open_control, open_mask, open_picture, parameters, read_saved_settings, resize_and_crop, save_new,
    to_pictures, to_tensor, write_if_free)

SETTINGS = {"prompt": "a blåbær 🫐", "negative": "blurry", "steps": 30, "sampler": "euler", "guidance": 5.0, "seed": 7,
            "model": "weights/tiny"}


def levels(height=8, width=12, channels=3, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, channels), dtype=np.uint8)


def test_tensors_and_pictures():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).repeat(3, 1)[None, :, None]  # 5 x 1 pixels
    (picture,) = to_pictures(x)
    assert picture.size == (5, 1) and np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    original = Image.fromarray(levels())
    assert to_tensor(original).shape == (3, 8, 12) and to_tensor(original.convert("L")).shape == (1, 8, 12)
    assert to_pictures(to_tensor(original)[None])[0].tobytes() == original.tobytes()
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 51))).flatten().tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("extension", ["png", "webp", "bmp"])
def test_lossless_files_come_back(extension, tmp_path):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(levels()).save(path, lossless=True)
    assert np.array_equal(np.asarray(open_picture(path)), levels())


def test_other_modes_become_rgb(tmp_path):
    def opened(picture, name="a.png", **more):
        picture.save(tmp_path / name, **more)
        return np.asarray(open_picture(tmp_path / name)).astype(int)

    alpha = np.dstack([levels(), np.where(np.arange(12) < 6, 255, 0)[None].repeat(8, 0)]).astype(np.uint8)
    expected = np.where(alpha[..., 3:] == 255, alpha[..., :3], 255)
    assert np.array_equal(opened(Image.fromarray(alpha)), expected)
    grey = levels(channels=1)[..., 0]
    assert np.array_equal(opened(Image.fromarray(grey)), grey[..., None].repeat(3, -1))
    wide = grey.astype(np.uint16) * 257  # 16 bits a pixel
    assert np.array_equal(opened(Image.fromarray(wide)), grey[..., None].repeat(3, -1))
    palette = Image.fromarray(levels() // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert np.array_equal(opened(palette), levels() // 128 * 255)
    black = opened(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "a.jpg")
    assert black.shape == (4, 4, 3) and black.max() < 4
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert opened(frames[0], save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: shot with the camera on its side
    turned = opened(Image.fromarray(levels()), exif=exif)
    assert np.array_equal(turned, np.rot90(levels(), -1))


LEFT = np.arange(12) < 6  # of a row


def mask_files(folder):
    """(name, the levels that are expected of open_mask [8,12]) of files in every mode that can be a mask."""
    row = np.where(LEFT, 255, 0).astype(np.uint8)
    painted = np.tile(row, (8, 1))
    white, black = np.full_like(painted, 255), np.zeros_like(painted)
    grey = levels(channels=1)[..., 0]
    palette = Image.fromarray(np.where(LEFT, 1, 0).astype(np.uint8)[None].repeat(8, 0), "P")
    palette.putpalette([255, 255, 255, 255, 255, 255])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = Image.fromarray(np.dstack([white, white, white, painted]))
    cases = [
        ("rgba.png", rgba, painted, {}),
        ("rgba.webp", rgba, painted, {"lossless": True}),
        ("black.png", Image.fromarray(np.dstack([black, black, black, painted])), black, {}),
        ("half.png", Image.fromarray(np.dstack([white, white, white, painted // 2])), painted // 2, {}),
        ("la.png", Image.fromarray(np.dstack([white, painted])), painted, {}),
        ("palette.png", palette, painted, {"transparency": 0}),
        ("grey with transparency.png", Image.fromarray(painted), black, {"transparency": 255}),
        ("grey.png", Image.fromarray(grey), grey, {}),
        ("one bit.png", Image.fromarray(painted).convert("1"), painted, {}),
        ("16 bits.png", Image.fromarray(grey.astype(np.uint16) * 257), grey, {}),
        ("cmyk.jpg", Image.new("CMYK", (12, 8), (0, 0, 0, 255)), black, {}),
        ("animated.png", Image.fromarray(painted), painted,
         {"save_all": True, "append_images": [Image.fromarray(black)]}),
        ("turned.png", Image.fromarray(grey), np.rot90(grey, -1), {"exif": exif})]
    for name, picture, expected, options in cases:
        picture.save(folder / name, **options)
        yield name, expected


def test_masks_of_every_mode_are_black_where_nothing_is_painted(tmp_path):
    for name, expected in mask_files(tmp_path):
        mask = open_mask(tmp_path / name)
        assert mask.mode == "L" and np.abs(np.asarray(mask).astype(int) - expected).max() < 4, name
        assert torch.equal(mask_to_tensor(mask, mask.size)[0], torch.from_numpy(expected >= 128).float()), name


def test_a_mask_that_pillow_opened_is_read_in_the_same_way():
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (16, 16, 32, 32))
    assert mask_to_tensor(mask, (64, 64)).mean() == 1 / 16


def test_control_maps_are_black_and_pictures_white_where_they_are_transparent(tmp_path):
    line = np.zeros((8, 12, 4), np.uint8)
    line[3] = 255, 255, 255, 255
    Image.fromarray(line).save(tmp_path / "a.png")
    expected = np.zeros((8, 12, 3), np.uint8)
    expected[3] = 255
    assert np.array_equal(np.asarray(open_control(tmp_path / "a.png")), expected)
    assert np.asarray(open_picture(tmp_path / "a.png")).min() == 255
    depth = levels(channels=1)[..., 0]
    Image.fromarray(depth.astype(np.uint16) * 257).save(tmp_path / "depth.png")
    assert np.array_equal(np.asarray(open_control(tmp_path / "depth.png")), depth[..., None].repeat(3, -1))


def png_of_size(width, height):
    """The start of a PNG that claims this size."""
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize("name, change", [
    ("empty.png", lambda data: b""), ("text.png", lambda data: b"hello"), ("page.jpg", lambda data: b"<html></html>"),
    ("half.png", lambda data: data[:len(data) // 2]), ("half.jpg", lambda data: data[:len(data) // 2]),
    ("half.webp", lambda data: data[:len(data) // 2]), ("flipped.png", lambda data: data[:200] + b"\0\0" + data[202:]),
    ("bomb.png", lambda data: png_of_size(10_000, 10_000)), ("large.png", lambda data: png_of_size(14_000, 14_000)),
    ("really_an.ico", lambda data: data),
])
def test_damaged_pictures_are_refused(name, change, tmp_path):
    path = tmp_path / name
    Image.fromarray(levels(64, 64)).save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError) as error:
        open_picture(path)
    assert str(error.value).startswith(f"{path}: expected a PNG, JPEG, WebP or similar picture")


def test_missing_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="none.png: no such picture"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(InputError, match="expected a PNG"):
        open_picture(tmp_path)


def test_resize_and_crop_keeps_proportions():
    wide = Image.fromarray(np.hstack([np.full((8, 4, 3), c, np.uint8) for c in (0, 255, 255, 0)]))  # 16 x 8
    assert resize_and_crop(wide, (8, 8)).tobytes() == bytes([255]) * 8 * 8 * 3
    assert resize_and_crop(wide, (16, 8)) is wide


def test_grid_has_every_picture_and_label():
    colors = ["red", "lime", "blue", "cyan", "magenta"]
    pictures = [Image.new("RGB", (64, 64), color) for color in colors]
    sheet = image_grid(pictures, [f"seed {i}" for i in range(5)], columns=3, title="five colours")
    found = dict((color, count) for count, color in sheet.getcolors(sheet.width * sheet.height))
    assert [found[picture.getpixel((0, 0))] for picture in pictures] == [192 * 192] * 5  # each enlarged 3 times
    bare = image_grid(pictures, columns=3)
    assert bare.width == sheet.width and sheet.height > bare.height + 3 * 12
    assert len(bare.getcolors()) == 6 < len(sheet.getcolors())  # no text, only paper
    long = image_grid(pictures, ["a small red sphere left of a large blue cube"] * 5, columns=3)
    assert long.width == bare.width and long.height > image_grid(pictures, ["a"] * 5, columns=3).height + 2 * 12
    assert image_grid(pictures[:4]).width < image_grid(pictures[:3]).width  # 2 x 2, but 3 in a row
    assert image_grid(pictures, ["x" * 500] * 5).width < 1000


def test_settings_come_back_from_the_file(tmp_path):
    path = save_new(Image.fromarray(levels()), tmp_path / "new" / "a.png", SETTINGS)
    assert read_saved_settings(path) == SETTINGS
    assert Image.open(path).info["parameters"] == (
        "a blåbær 🫐\nNegative prompt: blurry\n"
        "Steps: 30, Sampler: euler, CFG scale: 5.0, Seed: 7, Size: 12x8, Model: weights/tiny")
    assert "Negative" not in parameters(SETTINGS | {"negative": None}, (8, 8))
    assert np.array_equal(np.asarray(open_picture(path)), levels())


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "JPG", "webp"])
def test_settings_come_back_from_exif_data(ending, tmp_path):
    pixels = Image.fromarray(levels()).resize((48, 32))
    path = save_new(pixels, tmp_path / f"a.{ending}", SETTINGS)
    assert path.name == f"a.{ending}" and read_saved_settings(path) == SETTINGS
    with Image.open(path) as file:
        assert file.format == ("WEBP" if ending == "webp" else "JPEG")
        comment = file.getexif().get_ifd(0x8769)[0x9286]  # where AUTOMATIC1111's web UI writes it
    assert comment == b"UNICODE\0" + parameters(SETTINGS, (48, 32)).encode("utf-16-be")
    assert np.abs(np.asarray(open_picture(path)).astype(int) - np.asarray(pixels)).mean() < 8
    assert save_new(pixels, path, SETTINGS).name == f"a-0002.{ending}"


def test_a_camera_is_not_taken_for_us(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = '{"prompt": "a"}'
    Image.fromarray(levels()).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(InputError, match="a.jpg: no minipic settings"):
        read_saved_settings(tmp_path / "a.jpg")


def test_what_a_format_cannot_hold_is_said(tmp_path):
    with pytest.warns(UserWarning, match="too long for a JPEG"):
        path = save_new(Image.fromarray(levels()), tmp_path / "a.jpg", SETTINGS | {"prompt": "word " * 20_000})
    assert open_picture(path).size == (12, 8)
    with pytest.raises(InputError, match="a.webp: cannot be written"):  # WebP ends at 16383 pixels
        save_new(Image.new("RGB", (16384, 1)), tmp_path / "a.webp")
    assert not list(tmp_path.glob("a.webp*"))


@pytest.mark.parametrize("text", [None, "{", json.dumps([1])])
def test_files_without_settings_are_refused(text, tmp_path):
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("minipic", text)
    Image.fromarray(levels()).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="a.png: no minipic settings"):
        read_saved_settings(tmp_path / "a.png")


def test_no_picture_is_overwritten(tmp_path):
    names = [save_new(Image.fromarray(levels(seed=i)), tmp_path / "a.png").name for i in range(3)]
    assert names == ["a.png", "a-0002.png", "a-0003.png"]
    for i, name in enumerate(names):
        assert np.array_equal(np.asarray(open_picture(tmp_path / name)), levels(seed=i))
    assert not write_if_free(Image.fromarray(levels(seed=9)), tmp_path / "a.png", None)  # finished since we looked
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png")), levels(seed=0))
    (tmp_path / "b.png.part").touch()  # a killed process left it
    assert save_new(Image.fromarray(levels()), tmp_path / "b.png").name == "b-0002.png"


def test_writers_at_the_same_time_do_not_overwrite_each_other(tmp_path):
    def write(color):
        save_new(Image.new("RGB", (4, 4), (color, 0, 0)), tmp_path / "a.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(60)))
    colors = [open_picture(path).getpixel((0, 0))[0] for path in tmp_path.glob("*.png")]
    assert sorted(colors) == list(range(60)) and not list(tmp_path.glob("*.part"))


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a.png: cannot be written"):
        save_new(Image.fromarray(levels()), tmp_path / "file" / "a.png")

    class Full(Image.Image):
        def save(self, file, *args, **kwargs):
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"):
        save_new(Full(), tmp_path / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
