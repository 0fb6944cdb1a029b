"""Settings that follow from the pictures of a folder: the table, the flags above it, the lines."""

import re
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

from plumbing import automatic, runs
from plumbing.automatic import settings
from plumbing.command_line import UserError
from plumbing.runs import configure, read_checkpoint
from train import RECIPES, Config, main

SMALL, MIDDLE, LARGE = (size for _, size in reversed(automatic.SIDES))


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of `count` pictures of size (width, height)."""

    def make(count: int = 12, size=(120, 100), name: str = "my_images"):
        place = tmp_path / name
        for label in ("cat", "dog"):
            (place / "train" / label).mkdir(parents=True, exist_ok=True)
        (place / "test" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(place / "test" / "cat" / "a.png")
        for i in range(count):
            Image.new("RGB", size, (i, 0, 0)).save(place / "train" / ("cat", "dog")[i % 2] / f"{i}.png")
        return place

    return make


def configured(place, *flags, **options):
    line = ["--dataset", "folder", "--data-dir", str(place), "--out", str(place.parent / "run"), *flags]
    return configure(Config, RECIPES, line, "", **({"automatic": True} | options))[0]


@pytest.mark.parametrize(
    ("count", "side", "expected"),
    [
        (3068, 160, LARGE | dict(batch_size=128, lr=0.05, epochs=120, window=1024)),
        (2500, 96, LARGE | dict(batch_size=128, lr=0.05, epochs=120, window=1024)),
        (2499, 95, MIDDLE | dict(batch_size=128, lr=0.05, epochs=120, window=1024)),
        (4000, 48, MIDDLE | dict(window=1024)),
        (3999, 47, SMALL | dict(batch_size=128, epochs=120, window=1024)),
        (50_000, 32, SMALL | dict(window=1024)),
        (1024, 32, SMALL | dict(batch_size=128, epochs=120, window=0)),
        (1025, 20, SMALL | dict(size=20, batch_size=128, window=1024)),
        (30, 1, SMALL | dict(size=1, batch_size=15, window=0)),
        (1, 400, LARGE | dict(batch_size=2, window=0)),
    ],
)
def test_settings_follow_from_count_and_side(count, side, expected):
    chosen = settings(count, side)
    assert expected.items() <= chosen.items() and (count < 4000) == ("epochs" in chosen)
    assert chosen.get("jitter", 0.4) == (0.8 if side >= 96 else 0.4), "photographs want stronger colour changes"
    Config(**chosen).check()


def test_the_pictures_of_a_folder_choose_and_a_line_says_what(folder, capsys):
    config = configured(folder(12, (120, 100)))
    assert (config.size, config.eval_size, config.width, config.epochs, config.batch_size) == (96, 128, 32, 120, 6)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("12 pictures train, shorter side 100, so: --size 96 --eval-size 128 --arch resnet10 ")
    flags = re.findall(r"(--\S+ [\w.]+)(?= --| \()", line)
    assert configured(folder(), *" ".join(flags).split(), automatic=False) == config, "the line can be typed"


def test_the_same_folder_gives_the_same_settings_and_other_pictures_give_others(folder):
    first = configured(folder(12, (120, 100)))
    assert configured(folder(12, (120, 100))) == first
    assert configured(folder(12, (40, 60), "small")).size == SMALL["size"]
    assert configured(folder(12, (60, 90), "middle")).size == MIDDLE["size"]
    assert configured(folder(12, (10, 90), "narrow")).size == 10


def test_the_side_is_the_median_of_the_shorter_sides(folder, capsys):
    place = folder(9, (200, 100))
    Image.new("RGB", (10, 3000)).save(place / "train" / "cat" / "odd.png")
    assert configured(place).size == 96 and "shorter side 100," in capsys.readouterr().out


def test_a_flag_wins_and_takes_along_what_was_chosen_with_it(folder):
    config = configured(folder(), "--size", "32", "--batch-size", "4", "--window", "8")
    assert (config.size, config.batch_size, config.window) == (32, 4, 8)
    assert (config.eval_size, config.width, config.lr) == (Config.eval_size, 32, Config.lr)
    config = configured(folder(), "--arch", "resnet18")
    assert (config.arch, config.width, config.size) == ("resnet18", Config.width, 96)
    assert configured(folder(), "--optimizer", "sgd", "--weight-decay", "1e-4").lr == Config.lr
    given = configured(folder(), "--size", str(Config.size), "--epochs", "7", "--lr", "0.3", "--visits", "2")
    assert (given.size, given.epochs, given.lr, given.visits) == (Config.size, 7, 0.3, 2)


def test_subset_and_holdout_count(folder, capsys):
    assert configured(folder(12), "--subset", "5", "--holdout", "3").batch_size == 2
    assert configured(folder(12), "--holdout", "3").batch_size == 4
    assert capsys.readouterr().out.startswith("5 pictures train")
    assert configured(folder(12), "--holdout", "300").size == 96  # data.load refuses it


def test_half_of_a_small_folder_may_be_unreadable(folder, few_steps):
    """The batch is chosen before the pictures are read."""
    place = folder(12, (20, 16))
    for file in sorted((place / "train").rglob("*.png"))[:5]:
        file.write_text("no picture")
    narrow = ["--width", "8", "--dim", "16", "--hidden", "16", "--epochs", "1", "--device", "cpu"]
    assert main(["--dataset", "folder", "--data-dir", str(place), "--out", str(place.parent / "run"), *narrow]) == 0


@pytest.mark.parametrize("recipe", ["laptop", "demo"])
def test_a_recipe_is_taken_as_it_is(folder, recipe, capsys):
    config = configured(folder(), "--recipe", recipe)
    assert config == configured(folder(), "--recipe", recipe, automatic=False)
    assert config.size == Config.size and not capsys.readouterr().out


def test_other_datasets_and_other_programs_keep_the_defaults(folder, capsys):
    from lab.train import LabConfig

    place, out = folder(), ["--out", str(folder().parent / "run")]
    assert configured(place, automatic=False).size == Config.size
    assert configure(Config, RECIPES, ["--dataset", "shapes", *out], "", automatic=True)[0].size == Config.size
    line = ["--dataset", "folder", "--data-dir", str(place), *out]
    assert configure(LabConfig, RECIPES, line, "")[0].size == Config.size
    assert not capsys.readouterr().out


def test_pictures_without_a_readable_header_choose_nothing(folder):
    place = folder(2)
    for file in (place / "train").rglob("*.png"):
        file.write_bytes(b"no picture")
    assert configured(place).size == Config.size


def test_mistakes_are_told_before_the_folder_is_read(folder, monkeypatch):
    monkeypatch.setattr(automatic, "layout_of", lambda root: pytest.fail("it was read"))
    with pytest.raises(UserError, match="--size must be greater than 0"):
        configured(folder(), "--size", "-1")


def test_the_folder_that_is_meant_without_data_dir_chooses_too(folder, monkeypatch):
    place = folder(name="data")
    monkeypatch.chdir(place.parent)
    assert configure(Config, RECIPES, ["--dataset", "folder"], "", automatic=True)[0].size == 96


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="--data-dir .*nowhere: no such folder"):
        configured(tmp_path / "nowhere")


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(runs, "PACE", 4)


def test_a_run_says_beforehand_what_it_does_and_soon_how_long_it_takes(folder, few_steps, capsys, monkeypatch):
    place = folder(12, (20, 16))
    flags = {name: TINY[name] for name in ("width", "dim", "hidden", "device", "precision")} | {"epochs": 6}
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    line += ["--dataset", "folder", "--data-dir", str(place), "--out", str(place.parent / "run"), "--batch-size", "4"]
    assert main(line) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("12 pictures train, shorter side 16, so: --size 16 --eval-size 0")
    forecast = [row for row in printed if "per step on this machine" in row]
    assert len(forecast) == 1 and re.search(r": 13 more steps take about 1 min$", forecast[0])
    assert "done in" in printed[-2], "the lines come before the end"

    for file in place.rglob("*.png"):  # larger pictures would choose anew
        Image.new("RGB", (300, 300)).save(file)
    before = read_checkpoint(str(place.parent / "run"))["config"]
    assert before["size"] == 16
    resumed, _ = configure(Config, RECIPES, ["--resume", str(place.parent / "run")], "", automatic=True)
    assert vars(resumed) == before and not capsys.readouterr().out


def test_a_short_run_has_nothing_to_forecast(tiny, few_steps, capsys):
    from train import train

    train(tiny(epochs=1, batch_size=32, knn_every=0))
    assert "per step" not in capsys.readouterr().out


def test_the_docs_show_the_tables_as_they_are():
    text = (Path(automatic.__file__).parents[1] / "docs" / "usage.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rows = {row[0]: row[1:] for row in rows}
    for name, values in (("from 96 px on", LARGE), ("48 to 95 px", MIDDLE), ("below 48 px", SMALL)):
        size, whole, network, jitter = rows[name]
        assert jitter == str(values.get("jitter", "the default"))
        assert size.startswith(str(values["size"])) and network == f"{values['arch']}, {values['width']}"
        assert whole == str(values["eval_size"] or "their own, up to 4/3 of `--size`")
    for name, count in (("fewer than 4 000", 3999), ("4 000 and more", 4000)):
        chosen = settings(count, 100)
        wanted = [str(chosen.get(key, "the default")) for key in ("batch_size", "lr", "epochs")]
        assert rows[name] == wanted
    assert settings(1025, 100)["window"] == 1024 and settings(1024, 100)["window"] == 0  # as the list below says
