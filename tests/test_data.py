"""Datasets by name, folders of real files in every condition, and the drawn shapes."""

import io
import os
import random
import re
import struct
import sys
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, features

import data
from data import load
from plumbing import cache, files, folders, shapes
from plumbing.command_line import UserError
from plumbing.files import Dataset, Range, decode

CPU = torch.device("cpu")
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 30), "red": (210, 20, 20)}  # class -> the colour of its images
NAMES = tuple(COLOURS)


def save(path, colour=(120, 60, 30), size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def truncated(path, size=(32, 32)):
    save(path, (0, 0, 0), size)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    return path


def classes(root, each, size=(32, 32)):
    for name, colour in COLOURS.items():
        for i in range(each):
            save(root / name / f"{i}.png", colour, size)
    return root


def colours_of(images):
    """The class that the pixels show, for comparison with the labels."""
    known = torch.tensor(list(COLOURS.values())).float()
    return torch.cdist(images.pixels.float().mean((2, 3)), known).argmin(1)


# ------------------------------------------------------------------------------------------ layouts


def test_train_and_test_folders_are_the_two_sets(tmp_path):
    classes(tmp_path / "train", 4)
    classes(tmp_path / "test", 2)
    dataset = load("folder", tmp_path)
    assert dataset.classes == NAMES
    assert (len(dataset.train), len(dataset.test)) == (12, 6) and dataset.labelled is dataset.train
    for images in (dataset.train, dataset.test):
        assert images.pixels.dtype == torch.uint8 and images.pixels.shape[1:] == (3, 32, 32) and images.side == 32
        assert images.labels.dtype == torch.long and torch.equal(images.labels, colours_of(images))


def test_a_class_that_only_one_set_has_keeps_the_labels_in_step(tmp_path):
    save(tmp_path / "train" / "red" / "a.png", COLOURS["red"])
    save(tmp_path / "train" / "blue" / "a.png", COLOURS["blue"])
    classes(tmp_path / "test", 1)
    dataset = load("folder", tmp_path)
    assert dataset.classes == NAMES
    assert torch.equal(dataset.train.labels, colours_of(dataset.train))
    assert torch.equal(dataset.test.labels, colours_of(dataset.test))


def test_class_folders_alone_give_about_a_fifth_of_each_class_to_the_test_set(tmp_path):
    dataset = load("folder", classes(tmp_path, 40))
    assert dataset.classes == NAMES and dataset.labelled is dataset.train
    assert len(dataset.train) + len(dataset.test) == 120
    assert all(2 <= count <= 15 for count in dataset.test.labels.bincount(minlength=3).tolist())
    for images in (dataset.train, dataset.test):
        assert torch.equal(images.labels, colours_of(images))


def test_the_fifth_kept_for_testing_is_always_the_same_and_apart_from_the_rest(tmp_path):
    classes(tmp_path, 10)
    first, second = folders.folder(tmp_path), folders.folder(tmp_path)
    assert first.test.paths == second.test.paths and first.train.paths == second.train.paths
    assert not set(first.test.paths) & set(first.train.paths)
    assert len(set(first.test.paths) | set(first.train.paths)) == 30


@pytest.mark.parametrize("place", [".", "train"])
def test_images_without_classes_are_for_pretraining_only(tmp_path, place):
    for i in range(5):
        save(tmp_path / place / f"{i}.png")
    dataset = load("folder", tmp_path)
    assert len(dataset.train) == 5 and dataset.train.labels is None
    assert dataset.labelled is None and dataset.test is None and dataset.classes == ()


def test_a_class_whose_name_is_not_utf_8_has_its_place_on_the_map(tmp_path, monkeypatch):
    from figures import page

    name = os.fsdecode(b"caf\xe9")
    for kind in ("train", "test"):
        classes(tmp_path / kind, 4)
        (tmp_path / kind / "red").rename(tmp_path / kind / name)
    dataset = load("folder", tmp_path)
    assert name in dataset.classes
    monkeypatch.setattr(page, "extract", lambda _, images, *__: torch.randn(len(images), 8))
    assert page.feature_map([None], dataset, 32, CPU)["pictures"].count("<img") == 1


def test_hidden_files_and_folders_and_other_kinds_of_files_are_no_images(tmp_path, capsys):
    classes(tmp_path / "train", 2)
    save(tmp_path / "train" / "red" / "._0.png")
    save(tmp_path / "train" / ".thumbnails" / "a.png")
    (tmp_path / "train" / "red" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "README.md").write_text("not an image")
    dataset = load("folder", tmp_path)
    assert len(dataset.train) == 6 and dataset.classes == NAMES
    assert capsys.readouterr().out.rstrip().endswith("not used: 1 .md, 1 .txt")


def test_extensions_may_be_in_capitals(tmp_path):
    save(tmp_path / "A.PNG")
    save(tmp_path / "B.JPG")
    assert len(load("folder", tmp_path).train) == 2


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="--data-dir .*nowhere: no such folder"):
        load("folder", tmp_path / "nowhere")


@pytest.mark.parametrize("inside", [[], ["red"], ["train"], ["train/red", "test/red"]])
def test_a_folder_without_images_is_an_error_that_says_where_it_looked(tmp_path, inside):
    for name in inside:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="--data-dir .*: no images found; seen: nothing; .*jpg.* train/"):
        load("folder", tmp_path)


def test_an_unknown_dataset_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="imagenet") as caught:
        load("imagenet")
    assert all(name in str(caught.value) for name in data.DATASETS)


# ------------------------------------------------------------------------------- files of all kinds


@pytest.mark.parametrize(
    "mode, suffix, expected",
    [
        ("RGB", "png", (200, 100, 50)),
        ("RGB", "bmp", (200, 100, 50)),
        ("RGB", "webp", (200, 100, 50)),
        ("RGBA", "png", (200, 100, 50)),
        ("P", "png", (200, 100, 50)),
        ("P", "gif", (200, 100, 50)),
        ("CMYK", "jpg", (200, 100, 50)),
        ("CMYK", "tif", (200, 100, 50)),
        ("L", "png", (124, 124, 124)),  # the luma of that colour
        ("L", "jpg", (124, 124, 124)),
        ("LA", "png", (124, 124, 124)),
        ("1", "png", (124, 124, 124)),  # black and white dots, of that brightness together
    ],
)
def test_images_of_any_mode_become_rgb_of_the_same_colour(tmp_path, mode, suffix, expected):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (64, 64), (200, 100, 50)).convert(mode).save(path)
    with Image.open(path) as written:
        assert written.mode == mode
    pixels = decode(path, 64)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean((1, 2)), expected, atol=4)


def save_values(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    with Image.open(path) as written:
        assert written.mode.startswith(("I", "F"))


@pytest.mark.parametrize("value", [0, 1000, 32768, 65535])
def test_16_bit_greyscale_keeps_its_brightness(tmp_path, value):
    save_values(tmp_path / "deep.png", np.full((20, 20), value, dtype=np.uint16))
    assert np.abs(decode(tmp_path / "deep.png", 20, "crop", Range(0, 65535)).astype(float) - value / 257).max() <= 1


def test_16_bit_greyscale_among_others_keeps_its_brightness_in_memory(tmp_path):
    save(tmp_path / "a.png", (128, 128, 128))
    save_values(tmp_path / "b.png", np.full((32, 32), 128 * 257, dtype=np.uint16))
    pixels = load("folder", tmp_path).train.pixels.int()
    assert (pixels[0] - pixels[1]).abs().max() <= 1


DEPTHS = {  # values of a dark and of a bright picture, the bytes that they become, and the range that is said
    "12-bit": (np.uint16, "png", (400, 4000), (25, 249), "0 to 4095"),
    "8-bit": (np.uint16, "png", (0, 200), (0, 200), "0 to 255"),
    "10-bit-tiff": (np.uint16, "tif", (256, 1023), (64, 255), "0 to 1023"),
    "signed-ct": (np.int32, "tif", (-1000, 3000), (0, 255), "-1000 to 3000"),
    "float": (np.float32, "tif", (0.25, 1.0), (0, 255), "0.25 to 1"),
    "negative-float": (np.float32, "tif", (-8.0, 8.0), (0, 255), "-8 to 8"),
}


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", DEPTHS)
def test_deep_pictures_share_one_range_which_is_said(tmp_path, capsys, kind, cache_gb):
    dtype, suffix, values, expected, said = DEPTHS[kind]
    for name, value in zip("ab", values):
        save_values(tmp_path / f"{name}.{suffix}", np.full((20, 20), value, dtype=dtype))
    images = replace(load("folder", tmp_path, cache_gb=cache_gb).train, workers=0)
    pixels = next(images.batches(torch.arange(2), 2, CPU))[0]
    assert [(int(p.min()), int(p.max())) for p in pixels] == [(byte, byte) for byte in expected]
    assert f"2 images of more than 8 bits per value: {said} become 0 to 255" in capsys.readouterr().out


def save_16_bit_png(path, values, kind):
    """A PNG of 16 bits per value, which Pillow does not write: kind 2 is RGB, 4 grey with alpha."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows))
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in (*chunks, (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2)])
def test_16_bits_per_colour_lose_their_lower_half_which_is_said(tmp_path, capsys, kind, channels):
    save_16_bit_png(tmp_path / "a.png", np.full((16, 16, channels), 65535 // 2), kind)
    load("folder", tmp_path)
    assert "16 bits per colour, of which the upper 8 are used" in capsys.readouterr().out
    save(tmp_path / "a.png")
    load("folder", tmp_path)
    assert "16 bits" not in capsys.readouterr().out


def test_the_test_set_has_the_range_of_the_training_set(tmp_path):
    for split, top in (("train", 4000), ("test", 500)):
        for name in ("a", "b"):
            save_values(tmp_path / split / name / "0.png", np.full((20, 20), top, dtype=np.uint16))
    dataset = load("folder", tmp_path)
    assert [images.pixels.unique().tolist() for images in (dataset.train, dataset.test)] == [[249], [31]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_picture_that_is_not_finite_counts_as_unreadable_and_does_not_move_the_range(tmp_path, capsys, bad):
    ramp = np.linspace(-3, 5, 32, dtype=np.float32)[None].repeat(32, 0)
    save_values(tmp_path / "good.tif", ramp)
    ramp[3, 3] = bad
    save_values(tmp_path / "bad.tif", ramp)
    pixels = load("folder", tmp_path).train.pixels
    np.testing.assert_allclose(pixels[0, 0, 0], np.linspace(0, 255, 32), atol=1)
    assert f"{tmp_path / 'bad.tif'} (a value is not finite)" in capsys.readouterr().out


@pytest.mark.parametrize("mode, colour", [("RGBA", (10, 20, 30, 0)), ("LA", (0, 0))])
def test_what_is_transparent_shows_white(tmp_path, mode, colour):
    Image.new(mode, (8, 8), colour).save(tmp_path / "clear.png")
    assert (decode(tmp_path / "clear.png", 8) == 255).all()


def test_a_transparent_palette_entry_shows_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.paste(1, (0, 0, 4, 8))
    image.save(tmp_path / "clear.png", transparency=0)
    pixels = decode(tmp_path / "clear.png", 8)
    assert (pixels[:, :, 4:] == 255).all() and (pixels[:, 0, 0] == (200, 0, 0)).all()


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("orientation, top_left", [(1, "red"), (3, "green"), (6, "blue"), (8, "green")])
def test_photographs_are_turned_upright(tmp_path, side, orientation, top_left):
    """Stored: red at the left and green at the right, with blue at the bottom left."""
    image = Image.new("RGB", (64, 64), COLOURS["red"])
    image.paste(COLOURS["green"], (32, 0, 64, 64))
    image.paste(COLOURS["blue"], (0, 32, 32, 64))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)
    corner = decode(tmp_path / "photo.jpg", side)[:, 2 : side // 4, 2 : side // 4].mean((1, 2))
    np.testing.assert_allclose(corner, COLOURS[top_left], atol=8)


def test_a_photograph_is_turned_though_pillow_could_not_write_its_exif_anew(tmp_path):
    exif = struct.pack("<HHI4s", 256, 2, 2, b"x") + struct.pack("<HHIHH", 274, 3, 1, 6, 0)  # a width in letters
    image = Image.new("RGB", (64, 64), COLOURS["red"])
    image.paste(COLOURS["blue"], (0, 32, 64, 64))
    image.save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + exif + bytes(4), quality=95)
    with Image.open(tmp_path / "photo.jpg") as photo, pytest.raises(struct.error):
        photo.getexif().tobytes()
    np.testing.assert_allclose(decode(tmp_path / "photo.jpg", 64)[:, 8:24, 8:24].mean((1, 2)), COLOURS["blue"], atol=8)


@pytest.mark.parametrize("shape", [(90, 30), (30, 90)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_what_is_not_square_is_cut_to_its_centre(tmp_path, shape, suffix):
    image = Image.new("RGB", shape, COLOURS["red"])
    left, top = (shape[0] - 30) // 2, (shape[1] - 30) // 2
    image.paste(COLOURS["green"], (left, top, left + 30, top + 30))
    path = tmp_path / f"long.{suffix}"
    image.save(path, **({"quality": 95, "subsampling": 0} if suffix == "jpg" else {}))
    inside = decode(path, 30)[:, 3:-3, 3:-3]
    np.testing.assert_allclose(inside.mean((1, 2)), COLOURS["green"], atol=6)


def test_reducing_is_antialiased(tmp_path):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    pixels = decode(tmp_path / "board.png", 32)
    assert np.abs(pixels.astype(int) - 127).max() < 12


@pytest.mark.parametrize(
    "sizes, view, side",
    [
        ([(32, 32)] * 3, 32, 32),
        ([(16, 16)] * 3, 32, 16),
        ([(64, 64)] * 3, 32, 64),
        ([(100, 100)] * 3, 32, 64),  # large: reduced to a little more than a view, but not below 64
        ([(100, 100)] * 3, 96, 100),
        ([(200, 200)] * 3, 96, 110),
        ([(48, 32)] * 3, 32, 64),  # equal but not square
        ([(32, 32), (48, 48), (32, 32)], 32, 64),  # square but not equal
    ],
)
def test_small_equal_squares_keep_their_size_and_others_get_a_common_one(tmp_path, sizes, view, side):
    for i, size in enumerate(sizes):
        save(tmp_path / f"{i}.png", size=size)
    train = load("folder", tmp_path, size=view).train
    assert train.side == side and train.pixels.shape == (3, 3, side, side)


def test_images_at_their_native_size_are_not_touched(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    for i, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert np.array_equal(load("folder", tmp_path).train.pixels.permute(0, 2, 3, 1).numpy(), values)


# ------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9], ids=["memory", "disk"])
def test_unreadable_files_are_skipped_and_named_and_labels_stay_with_their_pixels(tmp_path, capsys, cache_gb):
    classes(tmp_path / "train", 4)
    classes(tmp_path / "test", 2)
    bad = [truncated(tmp_path / "train" / "blue" / "00.jpg"), tmp_path / "train" / "green" / "2.jpg"]
    bad.append(tmp_path / "test" / "blue" / "0.jpg")
    for path in bad[1:]:
        path.write_text("this is no image")
    dataset = load("folder", tmp_path, cache_gb=cache_gb)
    printed = capsys.readouterr().out
    assert "skipped 3 of 21 images" in printed and all(str(path) in printed for path in bad)
    for images, each in ((dataset.train, 4), (dataset.test, 2)):
        if images.pixels is None:
            images.pixels = next(replace(images, workers=0).batches(torch.arange(len(images)), 100, CPU))[0]
        assert images.labels.bincount().tolist() == [each] * 3
        assert torch.equal(images.labels, colours_of(images))


def test_many_unreadable_files_are_counted_and_five_named(tmp_path, capsys):
    save(tmp_path / "good.png")
    for i in range(7):
        (tmp_path / f"bad{i}.jpg").write_bytes(b"")
    assert len(load("folder", tmp_path).train) == 1
    printed = capsys.readouterr().out
    assert "skipped 7 of 8 images" in printed and printed.count(".jpg") == 5 and "…" in printed


def header_cut_short(path):
    save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + struct.pack(">I", 2) + raw[12:])  # a PNG whose first chunk says it has two bytes


def too_many_pixels(path):
    save(path, size=(5, 4))
    raw = bytearray(path.read_bytes())
    raw[18:26] = struct.pack("<ii", 60_000, 60_000)  # a BMP that claims 3.6 thousand million pixels
    path.write_bytes(raw)


def too_large(path):
    save(path, size=(5, 4))
    raw = bytearray(path.read_bytes())
    raw[16:24] = struct.pack(">II", 14_000, 14_000)  # a PNG of 196 million pixels
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    path.write_bytes(raw)


def broken_avif(path, share):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])


def scrambled_avif(path, message):
    """An AVIF at whose decoding Pillow raises a RuntimeError: a few bytes of it are others."""
    broken_avif(path, 1.0)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(3000):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(raw)
        try:
            Image.open(path).load()
        except RuntimeError as error:
            if message in str(error):
                return
        except Exception:
            continue
    pytest.skip("this Pillow raises nothing of that kind")


def nonsense_in_exif(path):
    """A whole photograph whose camera wrote text where EXIF has a number (the image's width)."""
    entries = [(256, 2, 4, b"abc\0"), (274, 3, 1, struct.pack("<HH", 6, 0))]
    body = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    Image.new("RGB", (32, 32)).save(path, exif=b"Exif\0\0" + body)


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda path: path.write_bytes(b""), "a.jpg"),
        (lambda path: path.write_bytes(b"GIF89a"), "a.gif"),
        (lambda path: path.write_bytes(b"P6 4x 4 255 "), "a.ppm"),
        (lambda path: path.symlink_to("gone.png"), "a.png"),
        (truncated, "a.jpg"),
        (truncated, "a.png"),
        (header_cut_short, "a.png"),
        (too_many_pixels, "a.bmp"),
        (too_large, "a.png"),
        (lambda path: broken_avif(path, 0.9), "a.avif"),
        (lambda path: broken_avif(path, 0.5), "a.avif"),
        (lambda path: scrambled_avif(path, "Decoding of color planes failed"), "a.avif"),
        (lambda path: scrambled_avif(path, "image item"), "a.avif"),
        (lambda path: path.write_bytes(b"\0\0\0\x20ftypavif" + bytes(40)), "a.avif"),
        (lambda path: path.write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40)), "a.jp2"),
    ],
    ids=[
        "empty",
        "cut-gif",
        "odd-ppm",
        "dead-link",
        "cut-jpeg",
        "cut-png",
        "png-header",
        "bomb",
        "large-png",
        "avif-cut",
        "avif-half",
        "avif-planes",
        "avif-item",
        "avif-head",
        "jp2-head",
    ],
)
def test_no_damaged_file_ends_the_run(tmp_path, capsys, damage, name):
    damage(tmp_path / name)
    save(tmp_path / "good.png", (1, 2, 3))
    train = load("folder", tmp_path).train
    assert train.pixels.float().mean((2, 3)).tolist() == [[1, 2, 3]]
    assert f"skipped 1 of 2 images that cannot be read: {tmp_path / name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "why"),
    [(too_large, "exceeds limit of .* pixels"), (lambda path: path.write_bytes(b""), "cannot identify")],
)
def test_the_reason_why_a_file_cannot_be_read_is_said(tmp_path, capsys, damage, why):
    damage(tmp_path / "a.png")
    save(tmp_path / "good.png")
    load("folder", tmp_path)
    assert re.search(rf"a.png \(.*{why}.*\)", capsys.readouterr().out)
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match=rf"none of its 1 images can be read, for instance .*a.png \(.*{why}"):
        load("folder", tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe.png", "schön.png".encode()])
@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict"])
def test_a_file_with_any_name_is_named_on_any_terminal(tmp_path, name, encoding, monkeypatch):
    save(tmp_path / "good.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"no image")
    terminal = io.TextIOWrapper(io.BytesIO(), *encoding.split(":"))
    monkeypatch.setattr(sys, "stdout", terminal)
    load("folder", tmp_path)
    terminal.flush()
    assert b"skipped 1 of 2 images" in terminal.buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"no image any more")])
def test_an_image_that_goes_during_a_run_from_disk_is_named_in_one_line(mixed, workers, change):
    train = replace(load("folder", mixed, cache_gb=1e-9).train, workers=workers)
    change(train.paths[5])
    with pytest.raises(UserError) as caught:
        list(train.batches(torch.arange(12), 4, CPU))
    assert str(caught.value).startswith(f"--data-dir: {train.paths[5]} can no longer be read (")
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


# ------------------------------------------------------------------------------------------- sides


@pytest.mark.parametrize(("size", "share"), [((90, 30), "67%"), ((40, 30), "25%"), ((30, 60), "50%")])
def test_images_that_lose_their_sides_are_said(tmp_path, capsys, size, share):
    save(tmp_path / "a.png", size=size)
    load("folder", tmp_path)
    words = f"cut to their central squares, and lose about {share} of their areas (--fit pad shows all)"
    assert words in capsys.readouterr().out
    load("folder", tmp_path, fit="pad")
    assert "cut" not in capsys.readouterr().out


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9], ids=["memory", "disk"])
@pytest.mark.parametrize("shape", [(90, 30), (30, 90)])
def test_padding_shows_the_whole_image(tmp_path, shape, cache_gb):
    image = Image.new("RGB", shape, COLOURS["red"])
    image.paste(COLOURS["green"], (0, 0, 30, 30))
    image.save(tmp_path / "long.png")
    images = replace(load("folder", tmp_path, fit="pad", cache_gb=cache_gb).train, workers=0)
    pixels, _ = next(images.batches(torch.tensor([0]), 1, CPU))
    centre = pixels[0, :, 32] if shape[0] > shape[1] else pixels[0, :, :, 32]  # (3, 64) along the image
    assert centre[:, 5].tolist() == [*COLOURS["green"]] and centre[:, 60].tolist() == [*COLOURS["red"]]
    assert pixels[0, :, 0, 0].tolist() == [127, 127, 127] or pixels[0, :, 0, -1].tolist() == [127, 127, 127]


def test_what_was_cut_is_not_taken_for_what_is_padded(kept):
    assert kept()[1] == kept(fit="pad")[1] == 31
    assert kept()[1] == kept(fit="pad")[1] == 1


def test_nonsense_in_a_photographs_exif_does_not_end_the_run(tmp_path):
    nonsense_in_exif(tmp_path / "a.jpg")
    save(tmp_path / "good.png")
    assert len(load("folder", tmp_path).train) in (1, 2)  # left out or read in spite of it


@pytest.mark.parametrize("layout", [".", "train/red"])
def test_a_folder_of_nothing_but_damaged_files_is_an_error_that_names_one(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    (tmp_path / layout / "a.jpg").write_text("no")
    (tmp_path / layout / "b.jpg").write_text("no")
    with pytest.raises(UserError, match="--data-dir.*none of its 2 images can be read.*a.jpg"):
        load("folder", tmp_path)


def test_a_test_set_of_nothing_but_damaged_files_is_no_test_set(tmp_path):
    classes(tmp_path / "train", 2)
    (tmp_path / "test" / "red").mkdir(parents=True)
    (tmp_path / "test" / "red" / "a.jpg").write_text("no")
    dataset = load("folder", tmp_path)
    assert dataset.test is None and len(dataset.train) == 6


# ---------------------------------------------------------------------------- in memory and on disk


@pytest.fixture
def mixed(tmp_path):
    """Twelve images of two classes, of several sizes, modes and kinds."""
    rng = np.random.default_rng(0)
    for i in range(12):
        height, width = rng.integers(20, 90, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:02d}.{('png', 'jpg', 'gif')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if i % 4 == 3 else image).save(path)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_images_read_from_disk_are_those_held_in_memory(mixed, workers):
    memory, disk = (load("folder", mixed, cache_gb=gb).train for gb in (4.0, 1e-9))
    assert disk.pixels is None and memory.pixels is not None and len(disk) == len(memory) == 12
    assert disk.side == memory.side and torch.equal(disk.labels, memory.labels)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))[:9]
    batches = [list(replace(images, workers=workers).batches(order, 4, CPU)) for images in (memory, disk)]
    assert [len(index) for _, index in batches[0]] == [5, 4], "no batch of one is left over"
    for (pixels, index), (pixels_disk, index_disk) in zip(*batches, strict=True):
        assert torch.equal(pixels, pixels_disk) and torch.equal(index, index_disk)
        assert pixels_disk.dtype == torch.uint8 and index_disk.dtype == index.dtype == torch.long
        assert torch.equal(pixels, memory.pixels[index])
    assert torch.equal(torch.cat([index for _, index in batches[1]]), order)


@pytest.mark.parametrize("factor, in_memory", [(1.001, True), (0.999, False)])
def test_images_stay_in_memory_if_all_fit_in_the_cache(mixed, factor, in_memory):
    train = load("folder", mixed, cache_gb=factor * 12 * 3 * 64 * 64 / 1e9).train
    assert (train.pixels is not None) == in_memory


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9], ids=["memory", "disk"])
def test_take_keeps_pixels_paths_and_labels_together(mixed, cache_gb):
    images, index = load("folder", mixed, cache_gb=cache_gb).train, torch.tensor([7, 0, 3])
    few = images.take(index)
    assert len(few) == 3 and few.side == images.side and torch.equal(few.labels, images.labels[index])
    pixels, _ = next(replace(few, workers=0).batches(torch.arange(3), 3, CPU))
    whole, _ = next(replace(images, workers=0).batches(index, 3, CPU))
    assert torch.equal(pixels, whole)


def test_moving_a_dataset_keeps_train_and_labelled_one(mixed):
    dataset = load("folder", mixed).to(CPU)
    assert dataset.labelled is dataset.train and dataset.test is None  # this folder has no test set
    dataset = Dataset(dataset.train, dataset.train, dataset.train.take(torch.tensor([0])), dataset.classes).to(CPU)
    assert dataset.labelled is dataset.train and len(dataset.test) == 1


# ---------------------------------------------------------------------------------- subset, holdout


@pytest.fixture
def few_shapes(monkeypatch):
    """The drawn dataset with 100 training and 20 test images."""
    draw = shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda count, seed, **options: draw(count // 100, seed, size=8, **options))


def rows(images):
    return {image.numpy().tobytes() for image in images.pixels}


def test_the_drawn_set_has_a_train_and_a_test_half_that_differ(few_shapes):
    dataset = load("shapes")
    assert dataset.labelled is dataset.train and dataset.classes == shapes.CLASSES
    assert len(dataset.train) == 100 and len(dataset.test) == 20 and not rows(dataset.train) & rows(dataset.test)
    assert len(rows(load("shapes-textured").train) & rows(dataset.train)) == 0


@pytest.mark.parametrize("subset, holdout, left", [(30, 0, 30), (0, 25, 75), (30, 25, 30), (75, 25, 75), (100, 0, 100)])
def test_subset_and_holdout_are_apart_and_the_same_every_time(few_shapes, subset, holdout, left):
    whole = load("shapes")
    dataset, again = (load("shapes", subset=subset, holdout=holdout) for _ in range(2))
    assert len(dataset.train) == left and dataset.labelled is dataset.train
    assert len(dataset.test) == (holdout or len(whole.test))
    assert torch.equal(dataset.train.pixels, again.train.pixels) and torch.equal(dataset.test.pixels, again.test.pixels)
    label = {image.numpy().tobytes(): y for image, y in zip(whole.train.pixels, whole.train.labels.tolist())}
    assert [label[image.numpy().tobytes()] for image in dataset.train.pixels] == dataset.train.labels.tolist()
    if holdout:
        assert not rows(dataset.train) & rows(dataset.test) and rows(dataset.test) <= rows(whole.train)


def test_the_holdout_does_not_depend_on_the_subset(few_shapes):
    sets = [rows(load("shapes", subset=subset, holdout=20).test) for subset in (0, 10, 80)]
    assert sets[0] == sets[1] == sets[2]


@pytest.mark.parametrize("subset, holdout", [(101, 0), (0, 101), (60, 41), (-1, 0), (0, -1), (0, 100)])
def test_more_than_there_is_cannot_be_taken(few_shapes, subset, holdout):
    with pytest.raises(UserError, match=f"--subset {subset} and --holdout {holdout}.* 100 "):
        load("shapes", subset=subset, holdout=holdout)


def test_a_holdout_that_leaves_no_image_of_a_folder_is_an_error(tmp_path):
    classes(tmp_path / "train", 8)
    with pytest.raises(UserError, match="--holdout 24"):
        load("folder", tmp_path, holdout=24)


def test_new_files_move_few_images_between_subset_and_holdout(tmp_path):
    def parts(root):
        dataset = load("folder", root, subset=30, holdout=20)
        return [{path.relative_to(root) for path in images.paths} for images in (dataset.train, dataset.test)]

    classes(tmp_path / "train", 40)
    before = parts(tmp_path)
    for name in ("0.jpg", "between.png", "zz.png"):  # first, in the middle and last of a listing
        save(tmp_path / "train" / "green" / name, COLOURS["green"])
    after = parts(tmp_path)
    assert all(len(old - new) <= 3 for old, new in zip(before, after))
    assert parts(tmp_path.rename(tmp_path.with_name("elsewhere"))) == after, "names count from the folder"


def test_a_folder_without_labels_has_a_subset_but_no_holdout(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png")
    assert len(load("folder", tmp_path, subset=4).train) == 4
    with pytest.raises(UserError, match="--holdout needs labels"):
        load("folder", tmp_path, holdout=2)


def test_subset_of_a_folder_is_taken_before_it_is_read(tmp_path, monkeypatch):
    classes(tmp_path, 10)
    read = []
    original = files.decode
    monkeypatch.setattr(files, "decode", lambda path, *how: read.append(path) or original(path, *how))
    dataset = load("folder", tmp_path, subset=5, holdout=4)
    assert len(dataset.train) == 5 and len(dataset.test) == 4 and len(read) == 9
    assert torch.equal(dataset.train.labels, colours_of(dataset.train))
    assert torch.equal(dataset.test.labels, colours_of(dataset.test))


# -------------------------------------------------------------------------- kept for the next start


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Loads a folder of 31 images, one unreadable, and says how many were decoded."""
    monkeypatch.setattr(files, "FEW", 1)
    root, decoded, original = tmp_path / "photographs", [], files.decode
    monkeypatch.setattr(files, "decode", lambda path, *how: decoded.append(path) or original(path, *how))
    classes(root / "train", 10)
    (root / "train" / "red" / "broken.png").write_bytes(b"no image")

    def again(**options):
        decoded.clear()
        return load("folder", root, cache_dir=str(tmp_path / "kept"), **options).train, len(decoded)

    return again


def test_a_folder_is_decoded_once(kept, tmp_path, capsys):
    first, count = kept()
    assert (count, len(first)) == (31, 30) and len(list((tmp_path / "kept").iterdir())) == 1
    said = capsys.readouterr().out
    second, broken = kept()
    assert broken == 1 and torch.equal(second.pixels, first.pixels) and capsys.readouterr().out == said
    assert [str(p) for p in second.paths] == [str(p) for p in first.paths]
    index = torch.tensor([1, 5])
    (pixels, _), *_ = second.batches(index, 2, CPU)
    assert torch.equal(pixels, first.pixels[index])


def test_a_folder_that_has_changed_is_decoded_again(kept, tmp_path):
    first, count = kept()
    file = first.paths[3]
    save(file, (255, 255, 255))
    os.utime(file, ns=(0, 0))
    second, again = kept()
    assert again == count and (second.pixels[3] == 255).all()
    file.unlink()
    third, again = kept()
    assert again == count - 1 and len(third) == len(first) - 1
    assert kept()[1] == 1, "the broken one is tried again"
    assert kept(subset=5)[1] >= 5, "other images, another file"


@pytest.mark.parametrize("damage", [b"", b"PK", b"x" * 1000])
def test_a_damaged_file_of_decoded_images_is_made_anew(kept, tmp_path, damage):
    first, count = kept()
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(damage)
    second, again = kept()
    assert again == count and torch.equal(second.pixels, first.pixels) and kept()[1] == 1


def test_where_nothing_can_be_kept_training_goes_on(kept, tmp_path, capsys):
    (tmp_path / "kept").write_text("a file in the way")
    images_, count = kept()
    assert len(images_) == 30 and "not kept for the next start" in capsys.readouterr().out
    assert kept()[1] == count


def test_other_content_of_the_same_size_and_time_is_decoded_again(kept):
    first, count = kept()
    for i, replaced in ((3, False), (4, True)):  # written over; another file under the old name
        file, before = first.paths[i], os.stat(first.paths[i])
        other = save(file.with_name("other.bmp" if replaced else file.name), (9, 9, 9))
        raw = other.read_bytes()
        other.write_bytes(raw + bytes(max(0, before.st_size - len(raw))))
        if replaced:
            other.replace(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        second, again = kept()
        assert again == count and (second.pixels[i] == 9).all()


def test_a_file_that_could_not_be_read_once_is_tried_again(kept, tmp_path, monkeypatch):
    original = files.decode

    def failing(path, *how):
        if path.name == "3.png":
            raise OSError(5, "Input/output error")
        return original(path, *how)

    with monkeypatch.context() as patch:
        patch.setattr(files, "decode", failing)
        assert len(kept()[0]) == 27
    images, again = kept()
    assert len(images) == 30 and again == 4, "the three and the broken one"
    assert torch.equal(images.labels, colours_of(images))
    assert kept()[1] == 1, "what was read the second time is kept too"


def test_old_copies_of_decoded_images_are_removed_and_other_files_stay(tmp_path):
    contents = [torch.zeros(1000, dtype=torch.uint8) for _ in range(4)]
    (tmp_path / "notes.pt").write_text("mine")
    (tmp_path / f"{'a' * 24}.1.part").write_text("half")
    os.utime(tmp_path / f"{'a' * 24}.1.part", (0, 0))
    places = [tmp_path / f"{i:024x}.pt" for i in range(4)]
    for i, (place, content) in enumerate(zip(places, contents)):
        assert cache.keep(place, {"pixels": content}, most=1e9) == ""
        os.utime(place, (1000 + i, 1000 + i))
    assert cache.kept(places[1]), "used again"
    assert cache.keep(tmp_path / f"{9:024x}.pt", {"pixels": contents[0]}, most=5000) == ""
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f"{1:024x}.pt", f"{9:024x}.pt", "notes.pt"])


def test_copies_of_decoded_images_do_not_add_up(kept, tmp_path):
    for subset in range(5, 15):
        kept(subset=subset, cache_gb=31 * 3 * 32 * 32 / 1e9)
    files_, size = list((tmp_path / "kept").iterdir()), 31 * 3 * 32 * 32
    assert sum(file.stat().st_size for file in files_) <= 2 * size + 10_000


def damaged(file):
    file.write_bytes(b"x" * 1000)


def a_folder_in_its_place(file):
    file.unlink()
    (file / "inside").mkdir(parents=True)


@pytest.mark.parametrize("change", [damaged, a_folder_in_its_place])
def test_a_damaged_cache_that_may_not_be_removed_ends_nothing(kept, tmp_path, monkeypatch, capsys, change):
    first, count = kept()
    (file,) = (tmp_path / "kept").iterdir()
    change(file)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, refused)
    second, again = kept()
    assert again == count and torch.equal(second.pixels, first.pixels)
    assert "not kept for the next start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "why"),
    [("gone.png", "No such file or directory"), ("dangling.png", "Too many levels of symbolic links"),
     ("broken.png/a.png", "Not a directory")],
)  # fmt: skip
def test_a_link_that_leads_nowhere_among_many_files_is_skipped(kept, tmp_path, capsys, target, why):
    (tmp_path / "photographs" / "train" / "red" / "dangling.png").symlink_to(target)
    images, _ = kept()
    assert len(images) == 30 and f"dangling.png ({why})" in capsys.readouterr().out
    assert kept()[1] == 2, "it and the broken one"


def test_few_images_leave_no_file(tmp_path):
    classes(tmp_path / "photographs", 10)
    load("folder", tmp_path / "photographs", cache_dir=str(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


# ---------------------------------------------------------------------------------------- downloads


@pytest.fixture
def offline(monkeypatch):
    """torchvision's downloads fail as without a network; nothing is asked of the real one."""

    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)  # every request of torchvision goes through it


@pytest.mark.parametrize(
    "name, needed",
    [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("stl10", "stl10_binary")],
)
@pytest.mark.parametrize("place", ["data", "new/data"])
def test_without_a_network_the_files_to_provide_are_named_and_nothing_is_left(tmp_path, offline, name, needed, place):
    with pytest.raises(
        UserError, match=f"--dataset {name}: cannot download.*no network.*{needed}.*--data-dir"
    ) as caught:
        load(name, tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [[], ["notes.txt"]])
def test_without_a_network_a_folder_that_was_there_stays(tmp_path, offline, inside):
    for name in inside:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="cannot download"):
        load("cifar10", tmp_path)
    assert tmp_path.is_dir() and [path.name for path in tmp_path.iterdir()] == inside


@pytest.mark.parametrize("name, kind", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_is_read_as_channels_first_with_its_labels(tmp_path, monkeypatch, name, kind):
    rng = np.random.default_rng(0)
    arrays = {train: rng.integers(0, 256, (12 if train else 5, 32, 32, 3), dtype=np.uint8) for train in (True, False)}

    class Fake:
        classes = ["cat", "dog", "frog"]

        def __init__(self, root, train, download):
            assert Path(root) == tmp_path and download
            self.data, self.targets = arrays[train], [i % 3 for i in range(len(arrays[train]))]

    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    dataset = load(name, tmp_path)
    assert dataset.classes == ("cat", "dog", "frog") and dataset.labelled is dataset.train
    for images, array in ((dataset.train, arrays[True]), (dataset.test, arrays[False])):
        assert np.array_equal(images.pixels.numpy(), array.transpose(0, 3, 1, 2)) and images.side == 32
        assert images.labels.dtype == torch.long and images.labels.tolist() == [i % 3 for i in range(len(array))]


@pytest.fixture
def fake_stl10(monkeypatch):
    rng = np.random.default_rng(0)
    count = {"unlabeled": 20, "train": 8, "test": 6}
    arrays = {split: rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8) for split, n in count.items()}

    class Fake:
        classes = ["bird", "ship"]

        def __init__(self, root, split, download):
            self.data = arrays[split]
            labels = np.arange(count[split]) % 2
            self.labels = np.full(count[split], -1) if split == "unlabeled" else labels.astype(np.uint8)

    monkeypatch.setattr(torchvision.datasets, "STL10", Fake)
    return arrays


def test_stl10_pretrains_on_its_unlabelled_split_and_is_evaluated_on_the_others(tmp_path, fake_stl10):
    dataset = load("stl10", tmp_path, size=96)
    assert dataset.train.labels is None and dataset.classes == ("bird", "ship")
    for images, split in ((dataset.train, "unlabeled"), (dataset.labelled, "train"), (dataset.test, "test")):
        assert np.array_equal(images.pixels.numpy(), fake_stl10[split]) and images.side == 96
    assert dataset.labelled.labels.tolist() == [0, 1] * 4 and dataset.test.labels.dtype == torch.long


def test_a_subset_of_stl10_leaves_its_labelled_images_alone(tmp_path, fake_stl10):
    dataset = load("stl10", tmp_path, subset=7)
    assert (len(dataset.train), len(dataset.labelled), len(dataset.test)) == (7, 8, 6)
    with pytest.raises(UserError, match="--holdout needs labels"):
        load("stl10", tmp_path, holdout=3)


# ------------------------------------------------------------------------------------------- shapes


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw(2000, seed=3, size=16)


@pytest.mark.parametrize("size", [16, 32])
def test_shapes_are_bytes_of_the_size_asked_for(size):
    images, labels = shapes.draw(23, size=size)
    assert images.shape == (23, 3, size, size) and images.dtype == np.uint8
    assert labels.shape == (23,) and labels.dtype == np.int64


@pytest.mark.parametrize("textured", [False, True])
def test_shapes_depend_on_the_seed_and_on_nothing_else(textured):
    np.random.seed(1)
    first = shapes.draw(20, seed=5, size=16, textured=textured)
    np.random.seed(2)
    again, other = (shapes.draw(20, seed=seed, size=16, textured=textured) for seed in (5, 6))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    assert not (first[0] == other[0]).all((1, 2, 3)).any()


def test_classes_are_equally_frequent_and_no_image_comes_twice(drawn):
    images, labels = drawn
    assert np.bincount(labels).tolist() == [200] * len(shapes.CLASSES)
    assert len({image.tobytes() for image in images}) == len(images)
    counts = np.bincount(shapes.draw(37, size=8)[1], minlength=10)
    assert counts.max() - counts.min() == 1
    assert (np.diff(labels) == 0).mean() < 0.2, "classes come in mixed order"


def ink_of(images):
    """Where an image differs from its corner, which is background: (N, H, W)."""
    return np.abs(images - images[:, :, :1, :1].astype(int)).max(1) > 60


def test_colours_say_nothing_about_the_class(drawn):
    images, labels = drawn
    ink = ink_of(images)[:, None]
    of_ink = (images * ink).sum((2, 3)) / ink.sum((2, 3)).clip(1)
    for mean in (images.mean((2, 3)), images[:, :, 0, 0], of_ink):  # (N, 3) each
        each = np.stack([mean[labels == c].mean(0) for c in range(10)])  # (10, 3)
        assert np.abs(each - mean.mean(0)).max() < 4 * mean.std(0).max() / 200**0.5  # four standard errors


def test_the_shape_is_there_to_see(drawn):
    """The share of an image that is not background depends on the class, as colours do not."""
    images, labels = drawn
    ink = ink_of(images).mean((1, 2))  # (N,)
    each = {name: ink[labels == c].mean() for c, name in enumerate(shapes.CLASSES)}
    assert each["bar"] < each["ring"] < each["square"]


def test_textures_roughen_the_background_and_each_image_has_its_own():
    smooth, labels = shapes.draw(100, seed=4)
    textured, same = shapes.draw(100, seed=4, textured=True)
    assert np.array_equal(labels, same)
    cuts = (images.reshape(100, 3, 8, 4, 8, 4).astype(float) for images in (smooth, textured))
    calmest, rough = (np.quantile(cut.std((3, 5)).mean(1).reshape(100, 64), 0.1, axis=1) for cut in cuts)
    assert np.median(rough) > 2 * np.median(calmest)  # of an image's 64 squares, those without a copy of the shape
    pattern = textured.reshape(100, 3, -1) - textured.reshape(100, 3, -1).mean(2, keepdims=True)
    pattern = pattern.reshape(100, -1) / np.linalg.norm(pattern.reshape(100, -1), axis=1, keepdims=True)
    assert np.abs(pattern @ pattern.T - np.eye(100)).max() < 0.7
