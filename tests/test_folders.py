"""From the names in a folder to its layout: what trains, what tests, what is not used and why."""

import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from data import load
from plumbing import folders
from plumbing.command_line import UserError
from plumbing.fingerprints import among, fingerprint, of_files
from plumbing.labels import with_labels
from plumbing.layout import chance, digest, layout, listing, part_of, suffixes


def names(tree: dict) -> list[str]:
    """{"train/cat": 3, "": 2} -> names of as many images in these folders."""
    return [os.path.join(folder, f"{i:03d}.jpg") for folder, count in tree.items() for i in range(count)]


def shown(tree: dict, extra=()):
    return layout(names(tree) + list(extra))


def counts(found):
    """Labelled and unlabelled training images, test images, classes."""
    labelled = sum(label is not None for _, label in found.train)
    return labelled, len(found.train) - labelled, len(found.test), found.classes


BOTH = ("cat", "dog")
TREES = {  # a folder's images, and counts() of its layout
    "train-test": ({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 1}, (8, 0, 3, BOTH)),
    "train-val": ({"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 1}, (8, 0, 3, BOTH)),
    "capitals": ({"Train/cat": 4, "Train/dog": 4, "VALID/cat": 2}, (8, 0, 2, BOTH)),
    "training-validation": ({"training/cat": 4, "training/dog": 4, "validation/dog": 2}, (8, 0, 2, BOTH)),
    "sets": ({"Training_Set/cat": 4, "Training_Set/dog": 4, "test-images/dog": 2}, (8, 0, 2, BOTH)),
    "years": ({"train2017/cat": 4, "train2017/dog": 4, "val2017/dog": 2}, (8, 0, 2, BOTH)),
    "test-is-better-than-val": ({"train/cat": 4, "train/dog": 4, "val/cat": 9, "test/cat": 2}, (8, 0, 2, BOTH)),
    "flat-parts": ({"training": 50, "validation": 9}, (0, 50, 0, ())),
    "flat-train-and-test": ({"train": 50, "test": 9}, (0, 50, 0, ())),
    "unlabelled": ({"unlabeled": 30, "train/cat": 4, "train/dog": 4, "test/cat": 2}, (8, 30, 2, BOTH)),
    "unlabelled-in-folders": ({"Unlabelled/a/b": 30, "train/cat": 4, "train/dog": 4}, (8, 30, 0, BOTH)),
    "only-unlabelled": ({"unlabeled/2023": 12, "unlabeled/2024": 12}, (0, 24, 0, ())),
    "only-unlabelled-by-month": ({f"in/unlabeled/{y}/{m}": 3 for y in (2023, 2024) for m in (5, 6)}, (0, 12, 0, ())),
    "loose-in-train": ({"train": 7, "train/cat": 4, "train/dog": 4, "test/cat": 2}, (8, 7, 2, BOTH)),
    "wrapped": ({"a/b/train/cat": 4, "a/b/train/dog": 4, "a/b/test/cat": 2}, (8, 0, 2, BOTH)),
    "wrapped-parts": ({"train/train/cat": 4, "train/train/dog": 4, "test/test/dog": 1}, (8, 0, 1, BOTH)),
    "below-a-class": ({"train/cat/tabby": 4, "train/cat": 1, "train/dog/a/b": 4, "test/cat/x": 2}, (9, 0, 2, BOTH)),
    "flat": ({"": 12}, (0, 12, 0, ())),
    "one-folder": ({"photos": 12}, (0, 12, 0, ())),
    "deep": ({"2023/may": 3, "": 4}, (0, 7, 0, ())),
    "one-class": ({"train/cat": 12, "test/cat": 3}, (0, 12, 0, ())),
    "extra-beside-train": ({"train/cat": 4, "train/dog": 4, "figures": 3}, (8, 0, 0, BOTH)),
}


@pytest.mark.parametrize("kind", TREES)
def test_a_layout_is_recognised(kind):
    tree, expected = TREES[kind]
    assert counts(shown(tree)) == expected


CLASSES = {  # class folders, of which a fifth is kept: the classes
    "one-is-called-train": ({"train": 60} | {f"c{i}": 60 for i in range(9)}, 10),
    "one-is-called-test": ({"test": 60, "exam": 60, "quiz": 60}, 3),
    "one-ends-in-gif": ({"jpeg": 60, "animated.gif": 60}, 2),
    "one-ends-in-png": ({"a.png": 60, "b": 60}, 2),
    "loose-images-beside": ({"": 40, "cat": 60, "dog": 60}, 2),
    "deeper": ({"cat/indoors/day": 60, "dog/park": 60}, 2),
    "wrapped": ({"my_images/cat": 60, "my_images/dog": 60}, 2),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_class_folders_are_recognised(kind):
    tree, classes = CLASSES[kind]
    found = shown(tree)
    total = sum(count for folder, count in tree.items() if folder)
    assert len(found.classes) == classes and len(found.train) + len(found.test) == total
    assert 0.1 * total < len(found.test) < 0.3 * total and not found.lacks
    depth = 1 if kind == "wrapped" else 0
    assert all(label == name.split("/")[depth] for name, label in found.train + found.test)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": 5, "extra": 5}, "train/ can be the training set or a class next to extra/"),
        ({"train/a": 5, "train/b": 5, "bus/c": 5}, "train/ can be the training set or a class next to bus/"),
        ({"train": 5, "test": 5, "bus": 5, "car": 5}, "train/ can be the training set or a class next to bus/, car/"),
        ({"train/a": 5, "Train/b": 5}, "Train/, train/ can each be the train set"),
        ({"train/a": 5, "val/a": 5, "valid/a": 5}, "val/, valid/ can each be the validation set"),
        ({"2023/cat": 5, "2023/dog": 5, "2024/cat": 5, "2024/dog": 5}, "folders like 2023/ or like 2023/cat/"),
        ({"cat/train": 5, "cat/test": 5, "dog/train": 5, "dog/test": 5}, "cat/ has a training and a test set"),
        ({"cat": 5, "dog": 5, "test/cat": 5, "test/dog": 5}, "test/ can be the test set, or a class"),
        ({"": 100, "cat": 5, "dog": 5}, "100 images lie beside folders with 10, which can be classes or not"),
    ],
)
def test_two_readings_that_are_equally_good_are_refused(tree, message):
    with pytest.raises(UserError, match=message):
        shown(tree)


@pytest.mark.parametrize(
    ("tree", "extra", "words"),
    [
        ({"": 40, "cat": 60, "dog": 60}, [f"cat/{i}.heic" for i in range(60)],
         "not used: 60 .heic, 40 images beside the class folders"),
        ({"training": 50, "validation": 9}, [], "50 images without labels; not used: 9 images in validation/"),
        ({"train/cat": 4, "train/dog": 4, "val/cat": 9, "test/cat": 2}, ["notes"],
         "not used: 1 without a suffix, 9 images in val/ (test/ is the test set)"),
        ({"train/cat": 4, "train/dog": 4, "figures": 3}, [], "not used: 3 images in figures/"),
        ({"train/cat": 4, "train/dog": 4, "": 1}, [], "not used: 1 image beside the folders"),
        ({"2023/may": 3, "": 4}, [], "7 images without labels, 3 of them in folders"),
        ({"unlabeled": 3, "a": 20, "b": 20}, [], "3 images without labels; 2 classes: a, b"),
        ({"": 1}, [f"x.{suffix}" for suffix in "abcdef"], "and 2 other files"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_used_and_what_is_not(tree, extra, words):
    said = shown(tree, extra).said
    assert words.replace("and 2", "2") in said and "\n" not in said


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"": 9}, "no class folders"),
        ({"photos": 9}, "one folder"),
        ({"train/cat": 9, "test/cat": 2}, "all images are of one class, cat"),
        ({"train/cat": 9, "train/dog": 2}, "there is train/, but no test/"),
        ({"train/cat": 9, "train/dog": 2, "test": 3}, "test/ has no class folders"),
        ({"train": 9, "test/cat": 3, "test/dog": 3}, "train/ has no class folders"),
    ],
)
def test_each_cause_of_no_evaluation_has_its_words(tree, why):
    assert why in shown(tree).lacks


def test_the_layout_does_not_depend_on_the_order_of_the_listing():
    tree, _ = CLASSES["loose-images-beside"]
    mixed = names(tree)
    random.Random(0).shuffle(mixed)
    assert layout(mixed) == layout(names(tree))


# ---------------------------------------------------------------------------------- the kept fifth


def test_new_files_move_nobody_into_or_out_of_the_kept_fifth():
    tree = {"cat": 60, "dog": 60}
    before = shown(tree)
    for extra in (["cat/0.jpg"], ["dog/zz.png", "dog/1000.jpg"], [f"emu/{i}.jpg" for i in range(30)]):
        after = shown(tree, extra)
        assert set(before.train) <= set(after.train) and set(before.test) <= set(after.test)


def test_files_that_go_move_nobody():
    before, after = shown({"cat": 60, "dog": 60}), shown({"cat": 60, "dog": 40})
    assert set(after.train) <= set(before.train) and set(after.test) <= set(before.test)


def test_the_kept_fifth_is_a_fifth():
    share = sum(chance(f"cat/{i}.jpg") < 0.2 for i in range(20_000)) / 20_000
    assert abs(share - 0.2) < 0.01


OUTER = {  # folders without another one around them: their splits must stay what they are
    "classes": {"cat": 60, "dog/park": 60, "unlabeled": 9},
    "no labels": {"": 150, "2023/may": 150},
    "loose": {"": 300},
}


@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("around", ["f", "a/b", "test"])
def test_a_folder_around_everything_moves_nobody(kind, around):
    inner = shown(OUTER[kind])
    outer = shown({os.path.normpath(f"{around}/{folder}"): count for folder, count in OUTER[kind].items()})
    for before, after in ((inner.train, outer.train), (inner.test, outer.test)):
        assert tuple((f"{around}/{name}", label) for name, label in before) == after


@pytest.mark.parametrize("kind", OUTER)
def test_without_a_folder_around_them_the_whole_names_choose(kind):
    found = shown(OUTER[kind])
    share = 0.2 if kind == "classes" else 0.1
    able = [name for name in names(OUTER[kind]) if not name.startswith("unlabeled")]
    assert {name for name, _ in found.test} == {name for name in able if chance(name) < share} != set()


# -------------------------------------------------------------------------------------- on a disk


def save(path: Path, colour=(9, 9, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path, **options)


def test_suffixes_are_those_that_pillow_reads():
    assert {".jpg", ".jfif", ".jpe", ".pgm", ".png", ".webp", ".ppm", ".tga", ".mpo"} <= suffixes()
    assert not {".pdf", ".eps", ".txt", ".svg", ".heic", ".mpeg", ".mp4", ""} & suffixes()


@pytest.mark.parametrize(
    ("suffix", "needed"), [("jfif", "jpg"), ("jpe", "jpg"), ("pgm", "jpg"), ("avif", "avif"), ("jp2", "jpg_2000"),
                           ("JPE", "jpg"), ("tga", "jpg"), ("qoi", "jpg")],
)  # fmt: skip
def test_files_of_every_suffix_are_read(tmp_path, suffix, needed):
    if not features.check(needed):
        pytest.skip(f"this Pillow has no {needed}")
    Image.new("L" if suffix == "pgm" else "RGB", (16, 16), 200 if suffix == "pgm" else (200, 200, 200)).save(
        tmp_path / f"a.{suffix}"
    )
    pixels = load("folder", tmp_path).train.pixels
    assert len(pixels) == 1 and (pixels.int() - 200).abs().max() <= 6


def test_unlabelled_images_pretrain_beside_labelled_ones(tmp_path):
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        for i in range(4):
            save(tmp_path / "train" / name / f"{i}.png", colour)
        save(tmp_path / "test" / name / "0.png", colour)
    for i in range(5):
        save(tmp_path / "unlabeled" / f"{i}.png")
    save(tmp_path / "train" / "loose.png")
    dataset = load("folder", tmp_path)
    assert (len(dataset.train), len(dataset.labelled), len(dataset.test)) == (14, 8, 2)
    assert dataset.train.labels is None and dataset.classes == ("blue", "red")
    assert torch.equal(dataset.labelled.pixels[:, 0, 0, 0] == 200, dataset.labelled.labels == 1)
    assert dataset.labelled.pixels.data_ptr() == dataset.train.pixels.data_ptr(), "the labelled ones are no copy"
    held = load("folder", tmp_path, subset=9, holdout=3)
    assert len(held.train) == 9 and len(held.test) == 3
    assert not {*held.test.paths} & {*held.train.paths} and (held.test.labels >= 0).all()
    assert torch.equal(held.labelled.pixels[:, 0, 0, 0] == 200, held.labelled.labels == 1)
    with pytest.raises(UserError, match="--holdout 9: the dataset has 8 training images with labels"):
        load("folder", tmp_path, holdout=9)


def test_the_layout_is_said_when_a_folder_is_loaded(tmp_path, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"")
    load("folder", tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}: 1 image without labels; not used: 1 .heic\n"


def test_what_was_seen_instead_of_images_is_said(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.heic").write_bytes(b"")
    with pytest.raises(UserError, match="--data-dir .*: no images found; seen: 3 .heic; wanted are .jpg"):
        load("folder", tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    save(tmp_path / "elsewhere" / "cat" / "0.png")
    save(tmp_path / "images" / "dog" / "0.png")
    (tmp_path / "images" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "images" / "dog" / "again").symlink_to(tmp_path / "images")
    found, closed = listing(tmp_path / "images")
    assert sorted(found) == ["cat/0.png", "dog/0.png"] and closed == []


def scanned(monkeypatch, order):
    """os.scandir lists in this order of names, as other file systems do."""

    class Scanned(list):
        __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Scanned(order(scan(path), key=lambda entry: entry.name)))


def backwards(entries, key):
    return sorted(entries, key=key, reverse=True)


def test_links_give_the_same_layout_in_every_order_of_the_listing(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        for i in range(3):
            save(tmp_path / "all" / name / f"{i}.png")
        save(tmp_path / "test" / name / "9.png")
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).symlink_to(Path("..", "all", name))
    layouts = []
    for order in (sorted, backwards):
        with monkeypatch.context() as patch:
            scanned(patch, order)
            layouts.append(folders.layout_of(tmp_path))
    assert layouts[0] == layouts[1] and counts(layouts[0]) == (6, 0, 2, BOTH)
    assert layouts[0].said.endswith("not used: 6 images in all/")


def test_folders_that_link_to_each_other_have_an_end(tmp_path):
    for name in "abcdef":
        save(tmp_path / name / "0.png")
        for other in "abcdef":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    found, left_out = listing(tmp_path)
    assert len(found) == len(set(found)) == 6 * (1 + 5 + 5 * 4 + 5 * 4 * 3)
    assert left_out == [f"{6 * 5 * 4 * 3 * 2} folders behind more than 3 links"]
    assert "not used: 720 folders behind" in folders.layout_of(tmp_path).said


def make_run(home: Path):
    save(home / "progress.png")
    save(home / "more" / "neighbours.png")
    for name in ("config.json", "last.pt"):
        (home / name).write_bytes(b"")


@pytest.mark.parametrize("tree", [BOTH, ("train/cat", "train/dog", "test/cat", "test/dog"), ("",), ("photos",)])
def test_a_run_among_the_images_changes_nothing(tmp_path, tree):
    for folder in tree:
        for i in range(5):
            save(tmp_path / folder / f"{i}.png")
    before = folders.layout_of(tmp_path)
    make_run(tmp_path / "runs" / "folder")
    after = folders.layout_of(tmp_path)
    assert (after.train, after.test, after.classes) == (before.train, before.test, before.classes)
    assert after.said.removeprefix(before.said) == "; not used: runs/folder/ (a run)"
    for i in range(4):
        make_run(tmp_path / "runs" / f"seed{i}")
    assert folders.layout_of(tmp_path).said.endswith("runs/folder/, runs/seed0/, runs/seed1/, … (5 runs)")


def test_a_run_in_the_images_own_folder_is_no_image(tmp_path):
    make_run(tmp_path)
    save(tmp_path / "0.png")
    assert sorted(listing(tmp_path)[0]) == ["0.png", "more/neighbours.png"]


def test_a_run_that_has_no_checkpoint_yet_is_one(tmp_path):
    make_run(tmp_path / "runs" / "folder")
    (tmp_path / "runs" / "folder" / "last.pt").rename(tmp_path / "runs" / "folder" / "metrics.jsonl")
    save(tmp_path / "0.png")
    assert listing(tmp_path) == (["0.png"], ["runs/folder/ (a run)"])


@pytest.mark.parametrize("lacking", ["config.json", "last.pt"])
def test_a_folder_with_one_file_of_a_run_is_none(tmp_path, lacking):
    make_run(tmp_path / "cat")
    (tmp_path / "cat" / lacking).unlink()
    assert "cat/progress.png" in listing(tmp_path)[0]


@pytest.fixture
def wrapped(tmp_path):
    """Class folders with another folder around them; every file has a size of its own."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(40):
            save(tmp_path / "wrap" / "f" / name / f"{i}.png")
            with open(tmp_path / "wrap" / "f" / name / f"{i}.png", "ab") as file:
                file.write(bytes(100 * c + i))
    return tmp_path / "wrap"


@pytest.mark.parametrize("options", [{}, {"holdout": 20}, {"subset": 30, "holdout": 20}])
def test_the_test_images_are_the_same_a_level_higher(wrapped, options):
    outer, inner = (load("folder", root, **options) for root in (wrapped, wrapped / "f"))
    assert outer.test.paths == inner.test.paths and outer.train.paths == inner.train.paths


def test_what_trained_is_recognised_a_level_higher_or_lower(wrapped, monkeypatch):
    monkeypatch.chdir(wrapped)
    roots = (wrapped, wrapped / "f", Path("."), Path("f"))
    for trained, now in [(load("folder", a), load("folder", b)) for a in roots for b in roots]:
        stored = fingerprint(trained.train)
        assert among(stored, now.train).all() and not among(stored, now.test).any()


def test_what_trained_is_recognised_when_images_come_beside_their_one_folder(wrapped):
    stored = fingerprint(load("folder", wrapped).train)
    save(wrapped / "0.png")
    assert len(now := load("folder", wrapped).train) == 81 and among(stored, now).sum() == len(stored["files"])


def test_what_checkpoints_keep_of_files_is_what_they_kept_before(wrapped):
    images = load("folder", wrapped).train
    hashes = [digest(f"{path.relative_to(wrapped).as_posix()}\0{path.stat().st_size}") for path in images.paths]
    assert of_files(images).tolist() == [int.from_bytes(each[:8], "big", signed=True) for each in hashes]


def test_images_of_one_name_and_size_in_train_and_test_are_two(tmp_path):
    for kind in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / kind / name / "0.png")
            save(tmp_path / kind / name / "1.png")
    dataset, below = load("folder", tmp_path), load("folder", tmp_path / "train")
    assert not among(fingerprint(dataset.train), dataset.test).any()
    assert not among(fingerprint(below.train), dataset.test).any()
    assert among(fingerprint(below.train), dataset.train).sum() == len(below.train)


# ------------------------------------------------------------------- labels and names in two forms


def forms(name: str) -> list[str]:
    return [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]


@pytest.mark.parametrize("parts", [("train/", "test/"), ("", "")])
def test_a_class_whose_accent_is_written_in_two_ways_is_one(parts):
    folders = [part + form for part, form in zip(parts, forms("café"))]
    found = shown(dict.fromkeys([*folders, f"{parts[0]}dog"], 40))
    assert found.classes == (forms("café")[0], "dog")
    assert any(forms("café")[1] in name for name, _ in found.train + found.test), "files keep their own names"


@pytest.mark.parametrize(("on_disk", "in_file"), [(0, 1), (1, 0)])
def test_labels_match_names_whose_accents_are_written_in_another_way(tmp_path, on_disk, in_file):
    root = tmp_path / forms("été")[on_disk]
    for i in range(40):
        save(root / f"{forms('é')[on_disk]}{i}.png", (6 * i, 0, 0))
    rows = [f"{forms('é')[in_file]}{i}.png,{forms('café')[i % 2]}\n" for i in range(0, 40, 2)]
    rows += [f"{tmp_path}/{forms('été')[in_file]}/{forms('é')[in_file]}{i}.png,dog\n" for i in range(1, 40, 2)]
    (tmp_path / "l.csv").write_text("".join(rows), encoding="utf-8")
    dataset = with_labels(load("folder", root), tmp_path / "l.csv")
    assert dataset.classes == (forms("café")[0], "dog") and len(dataset.labelled) + len(dataset.test) == 40
    for images in (dataset.labelled, dataset.test):
        assert (images.pixels[:, 0, 0, 0] // 6 % 2 == images.labels).all()


def test_a_path_with_two_classes_is_refused_in_any_form(tmp_path):
    save(tmp_path / "é.png")
    (tmp_path / "l.csv").write_text("".join(f"{name}.png,{i}\n" for i, name in enumerate(forms("é"))), encoding="utf-8")
    with pytest.raises(UserError, match="line 2: é.png has two classes, 0 and 1"):
        with_labels(load("folder", tmp_path), tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text(f"é.png,0\n{tmp_path}/é.png,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--labels .*l.csv: /.*/é.png has two classes, 0 and 1"):
        with_labels(load("folder", tmp_path), tmp_path / "l.csv")


def test_a_path_on_another_drive_is_unknown(tmp_path, monkeypatch, capsys):
    for i in range(20):
        save(tmp_path / f"{i}.png")
    (tmp_path / "l.csv").write_text("E:/0.png,cat\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(20)))
    dataset, relpath = load("folder", tmp_path), os.path.relpath

    def windows(path, start):
        if "E:" in str(path):
            raise ValueError("path is on mount 'E:', start on mount 'C:'")
        return relpath(path, start)

    monkeypatch.setattr(os.path, "relpath", windows)
    labelled = with_labels(dataset, tmp_path / "l.csv")
    assert "1 of its 21 paths are not among the pictures: E:/0.png" in capsys.readouterr().out
    assert len(labelled.labelled) + len(labelled.test) == 20 and labelled.classes == ("0", "1")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "gone"), OSError(5, "Input/output error")]
)
@pytest.mark.parametrize("secret", ["secret", "dog/old/secret"])
def test_a_folder_that_may_not_be_listed_is_left_out_and_named(tmp_path, capsys, monkeypatch, error, secret):
    for name in ("cat", "dog", secret):
        save(tmp_path / name / "0.png")
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "secret":
            raise error
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    dataset = folders.folder(tmp_path)
    assert dataset.classes == ("cat", "dog") and f"not used: {secret}/ (may not be listed)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data-dir .*secret: may not be listed"):
        folders.folder(tmp_path / secret)


def test_a_pipe_called_like_an_image_is_no_image(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert len(load("folder", tmp_path).train) == 1


@pytest.mark.parametrize(
    "name", ["train", "Training", "test_set", "VAL", "valid", "validation", "unlabelled", "train 2"]
)
def test_folders_named_after_parts_are_known(name):
    assert part_of(name)


@pytest.mark.parametrize("name", ["trains", "trainers", "valve", "testicle", "value", "retrain", "training_shoes"])
def test_classes_whose_names_begin_like_parts_are_classes(name):
    assert not part_of(name)
