import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a test that forks can hang on its threads

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import runs, shapes
from plumbing.command_line import flag
from plumbing.runs import draw_progress
from train import Config

TINY = dict(
    dataset="folder",
    arch="resnet10",
    width=8,
    size=16,
    dim=16,
    hidden=16,
    batch_size=16,
    bank_momentum=0.9,
    epochs=2,
    device="cpu",
    precision="fp32",
    knn_every=1,
)

# What a checkpoint holds beside its settings and its encoder.
UNTRAINED = {"optimizer": {}, "step": 0, "sums": torch.zeros(3), "seconds": 0.0, "history": []}


FILES = ("bank", "loss", "order", "newton")  # a student's, for tests/test_exercises.py


def pytest_addoption(parser):
    for name in FILES:
        parser.addoption(
            f"--{name}", metavar="FILE", help=f"your own my_{name}.py, for tests/test_exercises.py to check"
        )
    parser.addoption("--exercise", type=int, metavar="N", help="only the checks of exercise N of EXERCISES.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "exercise(n): checks exercise n of EXERCISES.md")
    for name in FILES:
        path = config.getoption(name)
        if path and not Path(path).is_file():
            raise pytest.UsageError(f"--{name} {path}: no such file")


def pytest_collection_modifyitems(config, items):
    number = config.getoption("exercise")
    if number is not None:
        chosen = [item for item in items if any(number in mark.args for mark in item.iter_markers("exercise"))]
        if not chosen:
            raise pytest.UsageError(f"--exercise {number}: no check belongs to it")
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)  # a sweep sets another number, and rounding depends on it


@pytest.fixture
def hang_up_ends():
    """SIGHUP as it is outside of nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def progress_is_drawn_once_per_kind():
    """A run's progress.png takes longer than the run: another one of the same kind is copied.

    A kind is what the rows hold, whether there is a bank, and whether there are several rows.
    """

    drawn = {}

    def draw(history, choices, path):
        kind = (frozenset().union(*history), choices is None, len(history) > 1)
        if kind not in drawn:
            draw_progress(history, choices, path)
            drawn[kind] = path.read_bytes()
        with runs.replacing(path, "the picture") as place:
            place.write_bytes(drawn[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "draw_progress", draw)
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 96 + 40 drawn images of 16 x 16 pixels in train/<class>/ and test/<class>/."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count, seed in (("train", 96, 0), ("test", 40, 1)):
        images, labels = shapes.draw(count, seed, size=16)
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = root / split / shapes.CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture
def tiny(pictures, tmp_path):
    """A function that gives the settings of a run of a few seconds."""
    return lambda **options: Config(**(TINY | {"data_dir": str(pictures), "out": str(tmp_path / "run")} | options))


@pytest.fixture
def flags(pictures, tmp_path):
    """A function that gives the command line of the same run."""

    def line(**options):
        given = TINY | {"data_dir": pictures, "out": tmp_path / "run"} | options
        return [word for name, value in given.items() for word in (flag(name), str(value))]

    return line
