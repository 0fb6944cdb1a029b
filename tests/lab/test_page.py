"""figures/page.py: one page, whole and self-contained, with the numbers of the run's files."""

import base64
import importlib
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from invented import lab

import eval_linear
from figures import page
from lab.train import train as lab_train
from models import encoder_of
from plumbing.files import Dataset, Images
from plumbing.runs import read_checkpoint
from train import Config, Pretraining, load_dataset, train

SECTIONS = ["curves", "accuracy", "neighbours", "map", "spectrum", "step"]


class Read(HTMLParser):
    """What a page is made of; its sections' text and pictures under their ids."""

    VOID = {"meta", "img"}

    def __init__(self, file: Path):
        super().__init__()
        self.tags, self.open, self.text, self.images, self.section = [], [], {"": ""}, {"": []}, ""
        self.feed(file.read_text(encoding="ascii"))
        assert not self.open, "a tag is left open"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attrs["id"]
            self.text[self.section], self.images[self.section] = "", []
        if tag == "img":
            self.images[self.section].append(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in order"
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if "style" not in self.open:
            self.text[self.section] += " ".join(data.split()) + " "


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The folder of a trained and measured run with its page."""
    out = tmp_path_factory.mktemp("runs") / "a <run>"
    train(Config(**TINY, data_dir=str(pictures), out=str(out)))
    assert eval_linear.main([str(out), "--device", "cpu", "--json", str(out / "eval.json")]) == 0
    assert page.main([str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def shown(run):
    return Read(run / "page.html")


def test_the_page_is_whole_and_needs_nothing_but_itself(run, shown):
    text = (run / "page.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    assert not re.search(r"https?:|//\w|<script|<link|url\(|@import", re.sub(r'base64,[^"]*', "", text))
    assert [name for name in shown.text if name] == SECTIONS
    assert "$" not in "".join(shown.text.values()), "a placeholder is left"
    assert dict(shown.tags)["html"] == {"lang": "en"} and "a <run>" in shown.text[""]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in shown.tags
    assert [tag for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * len(SECTIONS)
    ids = {attrs["id"] for _, attrs in shown.tags if "id" in attrs}
    links = [attrs["href"] for tag, attrs in shown.tags if tag == "a"]
    assert links[1:] == ["#" + name for name in SECTIONS] and set(SECTIONS) <= ids
    assert (run / links[0]).resolve() == page.PLAY and page.PLAY.is_file()
    assert not list(run.glob("*.part"))


def test_every_picture_lies_inside_and_says_in_words_what_it_shows(shown):
    assert {name: len(images) for name, images in shown.images.items()} == {
        "": 0, "curves": 2, "accuracy": 0, "neighbours": 2, "map": 2, "spectrum": 1, "step": 2,
    }  # fmt: skip
    images = sum(shown.images.values(), [])
    assert len({image["alt"] for image in images}) == len(images)
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert len(image["alt"]) > 40 and re.search(r"\d", image["alt"]) and int(image["width"]) > 300


def test_the_numbers_are_those_of_the_run_s_files(run, shown, pictures):
    first, last = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert f"NCE loss: {first['nce']:.3f} in epoch 1 to {last['nce']:.3f} in epoch 2." in shown.text["curves"]
    assert "Guessing among 96 rows costs 4.564." in shown.text["curves"]
    assert f"kNN accuracy: {first['knn']:.1%} in epoch 1 to {last['knn']:.1%} in epoch 2." in shown.text["curves"]
    measured = json.loads((run / "eval.json").read_text())
    for name, words in (("trained", "trained"), ("untrained", "untrained"), ("raw", "raw pixels")):
        row = f" {words} {100 * measured[name]['knn']:.1f} {100 * measured[name]['linear']:.1f} "
        assert row in shown.text["accuracy"]
    assert measured["date"] in shown.text["accuracy"]
    assert f"96 images of {pictures}, the paper's method" in shown.text[""] and "2 of 2 epochs" in shown.text[""]


def test_every_function_that_the_page_names_exists():
    names = re.findall(r"<code>([\w/]+)\.py:([\w.]+)</code>", page.TEMPLATE.read_text())
    assert len(names) >= 15
    for file, attributes in names:
        place = importlib.import_module(file.replace("/", "."))
        for attribute in attributes.split("."):
            place = getattr(place, attribute)


def test_the_bank_before_the_first_step_is_the_one_that_training_began_with(tiny, monkeypatch, capsys):
    train(tiny(epochs=1, bank_momentum=1.0))  # at m = 1 the bank stays as it began
    seen = []
    drawn = page.spectrum
    monkeypatch.setattr(page, "spectrum", lambda *args: seen.append(args) or drawn(*args))
    assert page.main([tiny().out]) == 0
    start, end, init = seen[0]
    # a row is normalised again whenever it is touched
    assert torch.allclose(start, end, atol=1e-6) and init == "forward" and not start.eq(start[0]).all()
    ranks = re.findall(
        r"([\d.]+) effective axes, variance ([\d.]+)", Read(Path(tiny().out) / "page.html").text["spectrum"]
    )
    assert len(ranks) == 2 and ranks[0] == ranks[1]


def test_one_step_is_that_of_the_two_rules(tiny, monkeypatch):
    config = tiny(bank_momentum=0.6, temperature=0.2)
    dataset = load_dataset(config)
    run = Pretraining(config, len(dataset.train), torch.device("cpu"))
    z, before = torch.nn.functional.normalize(torch.randn(16, 16), dim=1), run.bank.weight.clone()
    monkeypatch.setattr(run.encoder, "forward", lambda views: z)
    rows = [line for line in re.findall("<tr>(.*?)</tr>", page.one_step(run, dataset)["table"])][1:]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in rows]
    assert torch.equal(run.bank.weight, before), "the run's own bank stays as it was"

    index = page.random_images(dataset.train, 16)
    w, z = torch.nn.functional.normalize(before.double(), dim=1), z.double()  # float32 unit rows are not quite
    own = torch.zeros(96, dtype=torch.bool).index_fill_(0, index, True)
    expected = {}
    for rule, p in (("Corrected", (z @ w.T / 0.2).softmax(1)), ("NPID's", torch.zeros(16, 96))):
        pull = torch.eye(96)[index].double() - p
        moved = torch.nn.functional.normalize(0.6 * w + 0.4 * pull.T @ z, dim=1)
        angle = (w * moved).sum(1).clamp(-1, 1).arccos().rad2deg()
        expected[rule] = {"own rows": angle[own].median().item(), "other rows": angle[~own].median().item()}
    order = [(rule, rows, count) for rule in expected for rows, count in (("other rows", "80"), ("own rows", "16"))]
    for (rule, rows, count), (name, many, moved, towards) in zip(order, cells, strict=True):
        assert (name, many) == (f"{rule}, {rows}", count)
        assert float(moved.rstrip("°")) == pytest.approx(expected[rule][rows], rel=5e-3, abs=1e-5)
        if rows == "own rows":
            assert towards == "100% of 16"
    assert cells[2][2:] == ["0°", "none moved"] and int(cells[0][3].split("%")[0]) < 20 and "of 80" in cells[0][3]


def test_a_run_without_labels_has_a_page_without_what_needs_them(pictures, tiny, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, file in enumerate(sorted(pictures.glob("train/*/*.png"))[:40]):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
    train(tiny(data_dir=str(folder)))
    moved, place = folder.rename(tmp_path / "moved"), tmp_path / "p.html"
    assert page.main([tiny().out, "--out", str(place)]) == 2 and not place.exists()
    assert page.main([tiny().out, "--out", str(place), "--data-dir", str(moved)]) == 0
    shown = Read(place)
    assert [name for name in shown.text if name] == SECTIONS
    assert page.NO_LABELS in shown.text["accuracy"] and not shown.images["accuracy"]
    drawn = ("curves", "neighbours", "map", "spectrum", "step")
    assert [len(shown.images[name]) for name in drawn] == [1, 2, 2, 1, 2]
    assert "own class" not in shown.text["neighbours"] and "of its class" not in shown.text["map"]
    assert "did not look at its features" in shown.text["curves"]


def drawn_images(count, classes):
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, labels=torch.arange(count) % len(classes), side=16)
    return Dataset(train=images, labelled=images, test=images, classes=classes)


def test_the_map_names_classes_beyond_the_tenth_and_those_that_begin_with_a_bar(monkeypatch):
    seen = []
    monkeypatch.setattr(page, "picture", lambda figure, *_, **__: seen.append(figure) or "")
    encoder = encoder_of(asdict(Config(**TINY, layers=1)))
    dataset = drawn_images(48, ("_a", *"bcdefghijkl"))
    page.feature_map([encoder], dataset, 16, torch.device("cpu"))
    (figure,) = seen
    names = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert names == ["_a", *"bcdefghij", "other classes"]
    assert sum(len(dots.get_offsets()) for dots in figure.axes[0].collections) == 48


def test_a_map_of_two_images_and_neighbours_of_eight_say_nothing_false():
    encoder, dataset = encoder_of(asdict(Config(**TINY, layers=1))), drawn_images(2, ("a", "b"))
    assert "too few images" in page.feature_map([encoder], dataset, 16, torch.device("cpu"))
    dataset = drawn_images(8, ("a",))
    dataset = replace(dataset, train=replace(dataset.train, labels=None), test=None)
    dataset, queries, (found,), _ = page.neighbours.search([encoder], dataset, 16, torch.device("cpu"))
    assert len(queries) == len(dataset.train) == 4 and found.shape == (4, 4)


def test_the_map_separates_groups_that_two_principal_axes_do_not():
    labels = torch.arange(10).repeat_interleave(30)
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(10, 16)[labels]
    features = F.normalize(centres + 0.15 * torch.randn(300, 16, generator=generator), dim=1)
    close = (features @ features.T).fill_diagonal_(-2).topk(10).indices
    start = features @ torch.linalg.eigh(features.T @ features)[1][:, [-1, -2]]

    def own(spots):  # the share of a dot's ten nearest that are of its group
        near = torch.cdist(spots, spots).fill_diagonal_(9e9).topk(10, largest=False).indices
        return (labels[near] == labels[:, None]).float().mean()

    assert own(page.layout(close, start)) > 0.8 > own(start)


def test_a_method_without_a_bank_has_a_page_without_it(tiny):
    lab_train(lab(tiny(epochs=1), method="simclr"))
    assert page.main([tiny().out]) == 0
    shown = Read(Path(tiny().out) / "page.html")
    for name in ("spectrum", "step"):
        assert page.NO_BANK in shown.text[name] and not shown.images[name]
    assert "loss:" in shown.text["curves"] and "Guessing" not in shown.text["curves"]
    assert "no eval.json yet" in shown.text["accuracy"] and len(shown.images["neighbours"]) == 2


def test_mistakes_are_one_line_and_leave_the_page_as_it_was(run, tmp_path, pictures, capsys):
    def refused(words, *argv):
        before = (run / "page.html").read_bytes()
        assert page.main([*map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("page.py: ") and error.count("\n") == 1 and words in error, error
        assert (run / "page.html").read_bytes() == before and not list(run.glob("*.part"))

    refused("nowhere: no checkpoint there", "nowhere")
    refused("unrecognized arguments: --nonsense", run, "--nonsense")
    refused("a folder; name a file in it", run, "--out", tmp_path)
    refused("none does not exist; make it first", run, "--out", tmp_path / "none" / "p.html")
    refused("none: no such folder", run, "--data-dir", tmp_path / "none")
    fewer = tmp_path / "fewer" / "train" / "disc"
    fewer.mkdir(parents=True)
    for file in pictures.glob("train/disc/*.png"):
        (fewer / file.name).write_bytes(file.read_bytes())
    config = json.loads((run / "config.json").read_text())
    assert config["batch_size"] == 16
    refused("of its 96 images are gone, renamed or changed", run, "--data-dir", fewer.parent.parent)

    measured = (run / "eval.json").read_text()
    try:
        for damage in ("{", "[]", '{"k": 200}'):
            (run / "eval.json").write_text(damage)
            refused("eval.json: damaged", run)
        other = json.loads(measured)
        for change in ({"config": other["config"] | {"seed": 7}}, {"step": other["step"] - 1}):
            (run / "eval.json").write_text(json.dumps(other | change))
            assert page.main([str(run), "--out", str(tmp_path / "p.html")]) == 0
            assert "The eval.json here is of another run" in Read(tmp_path / "p.html").text["accuracy"]
    finally:
        (run / "eval.json").write_text(measured)

    own = read_checkpoint(str(run))
    own["config"] |= {"bank": "gone.py", "loss": "gone.py"}
    torch.save(own, tmp_path / "own.pt")
    assert page.main([str(tmp_path / "own.pt"), "--out", str(tmp_path / "p.html")]) == 0, "runs no file of another's"
    old = read_checkpoint(str(run))
    old["config"]["gone"] = 1
    torch.save(old, tmp_path / "old.pt")
    refused("written by another version of this code", tmp_path / "old.pt", "--out", tmp_path / "q.html")
    assert not (tmp_path / "q.html").exists()
