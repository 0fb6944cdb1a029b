"""What eval_linear.py takes from and gives to others: labels from a file, features in a file."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import data
import eval_linear
import train
from models import encoder_of
from plumbing import folders, shapes
from plumbing.command_line import UserError
from plumbing.devices import pick_precision
from plumbing.features import eval_side, extract
from plumbing.fingerprints import among
from plumbing.labels import read_labels, with_labels
from plumbing.layout import chance
from plumbing.runs import read_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder of 210 drawn pictures without labels, and the class of each, by its name."""
    root = tmp_path_factory.mktemp("bare") / "pictures"
    (root / "more").mkdir(parents=True)
    classes = {}
    for i, (image, label) in enumerate(zip(*shapes.draw(210, 0, size=16))):
        name = f"more/{i}.png" if i % 3 == 0 else f"{i}.png"
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(root / name)
        classes[name] = shapes.CLASSES[label]
    return root, classes


@pytest.fixture(scope="module")
def run(bare, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bare"
    settings = {"data_dir": str(bare[0]), "out": str(out), "epochs": 1, "knn_every": 0}
    train.train(train.Config(**(TINY | settings)))
    return out


def table(place, rows, head="path,class\n"):
    place.write_text(head + "".join(f"{path},{name}\n" for path, name in rows))
    return place


# --------------------------------------------------------------------------------------- --features


def test_features_paths_and_labels_of_a_folder_are_written(run, pictures, tmp_path, capsys):
    file = tmp_path / "features.npz"
    assert eval_linear.main([str(run), "--features", str(file), "--data-dir", str(pictures)]) == 0
    printed, content = capsys.readouterr().out, np.load(file)
    names = [path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("*.png"))]
    assert content["paths"].tolist() == sorted(names) and len(names) == 136
    assert content["labels"].tolist() == [name.split("/")[1] for name in content["paths"]]
    dataset, checkpoint = data.load("folder", pictures, size=16), read_checkpoint(run)
    encoder = encoder_of(checkpoint["config"])
    encoder.load_state_dict(checkpoint["encoder"])
    encoder.precision = pick_precision("auto", CPU)  # bf16 on some CPUs
    for images in (dataset.train, dataset.test):
        expected = extract(encoder, images, eval_side(checkpoint["config"], images), CPU)
        rows = [content["paths"].tolist().index(name) for name in images.names()]
        np.testing.assert_allclose(content["features"][rows], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert content["features"].dtype == np.float32
    lines = printed.split("in Python:\n\n")[1].replace("features.npz", str(file))
    exec(lines, space := {})
    assert space["file"]["features"].shape == content["features"].shape
    assert not [name for name in tmp_path.iterdir() if name != file]


def test_of_a_folder_without_labels_every_picture_is_written_and_its_label_is_empty(run, bare, tmp_path):
    file = tmp_path / "f.npz"
    assert eval_linear.main([str(run), "--features", str(file)]) == 0
    content = np.load(file)
    assert {*content["paths"].tolist()} == {*bare[1]} and {*content["labels"].tolist()} == {""}
    assert len(content["features"]) == 210 and np.ptp(content["features"], axis=0).max() > 0


def test_pictures_without_labels_beside_labelled_ones_have_none(run, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "mixed")
    for i in range(5):
        Image.new("RGB", (16, 16), (0, i, 0)).save(tmp_path / "mixed" / "train" / f"{i}.png")
    assert (
        eval_linear.main([str(run), "--features", str(tmp_path / "f.npz"), "--data-dir", str(tmp_path / "mixed")]) == 0
    )
    content = np.load(tmp_path / "f.npz")
    for path, label in zip(content["paths"].tolist(), content["labels"].tolist()):
        assert label == (path.split("/")[1] if path.count("/") == 2 else "")
    assert (content["labels"] == "").sum() == 5


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded shapes are a fiftieth of themselves: 80 training and 40 test images."""
    drawn = folders.drawn
    monkeypatch.setattr(folders, "drawn", lambda count, *others: drawn(count // 50, *others))


def test_images_that_are_no_files_are_numbered(run, tmp_path, few_shapes):
    line = [str(run), "--dataset", "shapes", "--subset", "30", "--features", str(tmp_path / "f.npz")]
    assert eval_linear.main(line) == 0
    content = np.load(tmp_path / "f.npz")
    assert {"train/0", "train/29", "test/39"} <= {*content["paths"].tolist()} and len(content["paths"]) == 30 + 40
    assert {*content["labels"].tolist()} == {*shapes.CLASSES}


def test_names_that_are_not_utf_8_are_kept(run, bare, tmp_path):
    shutil.copytree(bare[0], tmp_path / "odd")
    (tmp_path / "odd" / "0.png").write_bytes((tmp_path / "odd" / "1.png").read_bytes())
    (tmp_path / "odd" / "0.png").rename(os.fsdecode(os.fsencode(tmp_path / "odd") + b"/\xff.png"))
    assert eval_linear.main([str(run), "--features", str(tmp_path / "f.npz"), "--data-dir", str(tmp_path / "odd")]) == 0
    assert os.fsdecode(b"\xff.png") in np.load(tmp_path / "f.npz")["paths"].tolist()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--json", "e.json"], "--features writes the features and stops: leave out --json"),
        (["--labels", "l.csv"], "--features writes the features and stops: leave out --labels"),
        (["--k", "3"], "--features writes the features and stops: leave out --k"),
        (["--export", "b.pt"], "writes the backbone and stops: leave out --features"),
    ],
)
def test_features_come_alone(run, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert eval_linear.main([str(run), "--features", "f.npz", *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize("place", ["nowhere/f.npz", "."])
def test_where_features_cannot_go_is_told_before_any_work(run, tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_linear, "read_checkpoint", lambda *_: pytest.fail("it began to work"))
    assert eval_linear.main([str(run), "--features", place]) == 2
    assert capsys.readouterr().err.startswith(f"eval_linear.py: argument --features: {place}: ")


# ----------------------------------------------------------------------------------------- --labels


def test_labels_from_a_file_make_a_bare_folder_one_to_evaluate_on(run, bare, tmp_path, capsys):
    root, classes = bare
    file = table(tmp_path / "labels.csv", classes.items())
    assert eval_linear.main([str(run), "--labels", str(file), "--json", str(tmp_path / "e.json")]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert {"trained", "untrained", "raw", "majority"} <= figures.keys()
    kept = [name for name in classes if chance(name) < 0.2]
    assert f"{210 - len(kept)} labelled and {len(kept)} test images" in printed
    held = {*data.load("folder", root, size=16).test.names()}
    (caution,) = figures["cautions"]
    assert caution == f"caution: {len({*kept} - held)} of the {len(kept)} test images were trained on without labels"


def test_the_labels_are_those_of_the_file(bare, tmp_path):
    root, classes = bare
    asked = dict(list(classes.items())[:80])
    dataset = with_labels(data.load("folder", root, size=16), table(tmp_path / "l.csv", asked.items()))
    assert {*dataset.labelled.names()} | {*dataset.test.names()} == {*asked} and len(dataset.train) > 150
    original = data.load("folder", root, size=16)
    for images in (dataset.labelled, dataset.test):
        for name, label, pixels in zip(images.names(), images.labels.tolist(), images.pixels):
            assert dataset.classes[label] == asked[name]
            pool = original.test if name in original.test.names() else original.train
            assert torch.equal(pixels, pool.pixels[pool.names().index(name)])
    assert not {*dataset.labelled.names()} & {*dataset.test.names()}


def test_a_file_of_labels_takes_the_place_of_the_folders_own(pictures, tmp_path):
    names = [path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("*.png"))]
    rows = [(name, "even" if i % 2 == 0 else "odd") for i, name in enumerate(names[:100])]
    dataset = with_labels(data.load("folder", pictures, size=16), table(tmp_path / "l.csv", rows))
    assert dataset.classes == ("even", "odd") and len(dataset.labelled) + len(dataset.test) == 100


def test_without_a_file_nothing_changes(pictures):
    dataset = data.load("folder", pictures, size=16)
    assert with_labels(dataset, None) is dataset


def test_paths_may_be_absolute_and_written_in_several_ways(bare, tmp_path, monkeypatch):
    root, classes = bare
    names = sorted(classes)[:40]
    ways = ("{root}/{name}", "./{name}", "more/../{name}", " {name} ")
    rows = [(ways[i % 4].format(root=root, name=name), classes[name]) for i, name in enumerate(names)]
    monkeypatch.chdir(root.parent)
    for place in (root, root.name):
        dataset = with_labels(data.load("folder", place, size=16), table(tmp_path / "l.csv", rows, head=""))
        assert {*dataset.labelled.names()} | {*dataset.test.names()} == {*names}


def test_unknown_paths_are_named_in_one_line_and_the_others_serve(bare, tmp_path, capsys):
    root, classes = bare
    rows = [*list(classes.items())[:30], *((f"gone/{i}.png", "new class") for i in range(7))]
    loaded = data.load("folder", root, size=16)
    capsys.readouterr()
    dataset = with_labels(loaded, table(tmp_path / "l.csv", rows))
    (line,) = capsys.readouterr().out.splitlines()
    assert "7 of its 37 paths are not among the pictures: gone/0.png, gone/1.png" in line and line.endswith(", …")
    assert "new class" not in dataset.classes and len(dataset.labelled) + len(dataset.test) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.png,cat\n", r"1 of its 1 paths are not among the pictures: gone.png; paths count from .*pictures"),
        ("1.png\n", "line 1: '1.png' is not path,class"),
        ("path,class\n1.png,a\n2.png,b,c\n", "line 3: '2.png,b,c' is not path,class"),
        ("1.png,\n", "line 1: '1.png,' is not path,class"),
        ("1.png,a\n./1.png,b\n", "line 2: 1.png has two classes, a and b"),
        ('1.png,"a\n', "unexpected end of data"),
    ],
)
def test_a_file_that_is_no_list_of_labels_is_refused_in_one_line(bare, tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UserError, match=rf"--labels .*l.csv.*{message}") as told:
        with_labels(data.load("folder", bare[0], size=16), tmp_path / "l.csv")
    assert "\n" not in str(told.value)


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"1.png,\xff\xfe\n")
    for name in ("l.csv", "none.csv", "."):
        with pytest.raises(UserError, match="--labels "):
            read_labels(tmp_path / name)


def test_a_file_that_cannot_be_read_is_told_before_the_pictures_are(run, tmp_path, capsys):
    assert eval_linear.main([str(run), "--labels", str(tmp_path / "none.csv")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "--labels" in printed.err


def test_quotes_commas_and_a_mark_of_order_are_read(tmp_path):
    (tmp_path / "l.csv").write_bytes('\ufeffPath,Class\n"a, b.png","c, d"\n\nx.png,y\n'.encode())
    assert read_labels(tmp_path / "l.csv") == {"a, b.png": "c, d", "x.png": "y"}


@pytest.mark.parametrize("classes", [["a"] * 60, ["a"]])
def test_labels_that_no_probe_can_use_are_refused_with_the_reason(run, bare, tmp_path, capsys, classes):
    file = table(tmp_path / "l.csv", zip(sorted(bare[1]), classes))
    assert eval_linear.main([str(run), "--labels", str(file)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(
        "no labels to evaluate with: (all training images are of one class, a|--labels)", said[0]
    )


def test_drawn_images_have_no_paths_to_label(run, tmp_path, capsys, few_shapes):
    file = table(tmp_path / "l.csv", [("1.png", "a")])
    assert eval_linear.main([str(run), "--dataset", "shapes", "--subset", "20", "--labels", str(file)]) == 2
    assert "--labels" in (said := capsys.readouterr().err) and "--dataset folder" in said


def test_labelled_pictures_on_disk_need_not_fit_in_memory(bare, tmp_path):
    root, classes = bare
    dataset = data.load("folder", root, size=16, cache_gb=1e-9, workers=0)
    assert dataset.train.pixels is None
    dataset = with_labels(dataset, table(tmp_path / "l.csv", classes.items()))
    assert not among(None, dataset.test).any() and len(dataset.labelled) + len(dataset.test) == 210
    pixels, _ = next(dataset.test.batches(torch.arange(3), 3, CPU))
    assert pixels.shape == (3, 3, 16, 16)
