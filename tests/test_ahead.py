"""Images on disk in windows: each is read once per stay, ahead of its pass; the run is the same."""

import itertools
import threading
from collections import Counter

import pytest
import torch

import train as program
from data import windows
from plumbing import files
from plumbing.command_line import UserError
from plumbing.files import Ahead
from plumbing.runs import read_checkpoint
from train import load_dataset, train

CPU = torch.device("cpu")
WINDOW = dict(window=48, visits=3, epochs=3, knn_every=0, batch_size=16)
DISK = {"cache_gb": 1e-9, "workers": 2}


@pytest.fixture
def read(monkeypatch):
    """How often each file was decoded since the dataset was loaded."""
    counts, original = Counter(), files.decode

    def counted(path, *how):
        if threading.current_thread() is not threading.main_thread():
            counts[path] += 1
        return original(path, *how)

    monkeypatch.setattr(files, "decode", counted)
    return counts


def same(one, two):
    one, two = (read_checkpoint(str(place)) for place in (one, two))
    for name in ("encoder", "bank"):
        assert all(torch.equal(value, two[name][key]) for key, value in one[name].items())
    assert [row["loss"] for row in one["history"]] == [row["loss"] for row in two["history"]]


def test_a_run_that_reads_ahead_is_the_run_in_memory_to_the_last_bit(tiny, tmp_path):
    train(tiny(out=str(tmp_path / "memory"), **WINDOW))
    train(tiny(out=str(tmp_path / "disk"), **WINDOW, **DISK))
    same(tmp_path / "memory", tmp_path / "disk")


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_window_a_run_from_disk_is_the_run_in_memory_to_the_last_bit(tiny, tmp_path, workers):
    """Starting to read draws no number that the views would have drawn."""
    train(tiny(out=str(tmp_path / "memory"), **(WINDOW | {"window": 0})))
    train(tiny(out=str(tmp_path / "disk"), **(WINDOW | {"window": 0} | DISK | {"workers": workers})))
    same(tmp_path / "memory", tmp_path / "disk")


def test_an_image_is_read_once_while_it_is_in_the_window(tiny, read):
    """Six passes of a window that slides by 16: all of the first, and then those that enter."""
    config = tiny(**WINDOW, **DISK)
    dataset = load_dataset(config)
    read.clear()
    train(config, dataset=dataset)
    entered = Counter()
    for _, _, entering in itertools.islice(windows(96, 48, 3, config.seed), 7):  # the last are read in vain
        entered.update(dataset.train.paths[i] for i in entering.tolist())
    assert read.keys() >= {*dataset.train.paths}, "nobody is missing"
    assert all(count <= entered[path] for path, count in read.items()), "three visits, but one read"


def test_while_a_pass_trains_the_next_one_is_read(tiny):
    images = load_dataset(tiny(**WINDOW, **DISK)).train
    passes = images.read_ahead(windows(96, 48, 3, 0))
    (_, now, _), (_, following, _) = itertools.islice(windows(96, 48, 3, 0), 2)
    next(passes)
    assert {*images.ahead.images} == {*now.tolist()} | {*following.tolist()}
    for future in images.ahead.images.values():
        future.result(timeout=60)
    held = []
    for _ in range(20):
        next(passes)
        held.append(len(images.ahead.images))
    assert max(held) <= 48 + 16, "no more than two windows that overlap"
    passes.close()
    assert images.ahead is None


@pytest.mark.parametrize("options", [{"cache_gb": 4.0}, {"window": 0}, {"window": 96}])
def test_in_memory_or_with_all_images_in_the_window_nothing_is_read_ahead(tiny, options):
    config = tiny(**(WINDOW | DISK | options))
    images = load_dataset(config).train
    expected = list(itertools.islice(windows(96, config.rows(96), 3, 0), 4))
    for (a, b, c), (d, e, f) in zip(
        itertools.islice(images.read_ahead(windows(96, config.rows(96), 3, 0)), 4), expected
    ):
        assert a == d and torch.equal(b, e) and torch.equal(c, f) and images.ahead is None


def test_images_outside_the_window_and_copies_are_read_from_disk(tiny, read):
    images = load_dataset(tiny(**WINDOW, **DISK)).train
    passes = images.read_ahead(windows(96, 48, 3, 0))
    _, window, _ = next(passes)
    [future.result() for future in images.ahead.images.values()]
    images.workers, before = 0, sum(read.values())
    outside = torch.tensor([i for i in range(96) if i not in images.ahead.images])
    for index in (outside, window, torch.arange(96)):
        pixels = torch.cat([batch for batch, _ in images.batches(index, 16, CPU)])
        alone = torch.stack([torch.from_numpy(files.decode(images.paths[i], images.side)) for i in index.tolist()])
        assert torch.equal(pixels, alone)
    few = images.take(window[:4])
    assert few.ahead is None and len(next(few.batches(torch.arange(4), 4, CPU))[0]) == 4
    assert sum(read.values()) == before


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no image any more")])
def test_an_image_that_goes_ahead_of_its_pass_ends_the_run_in_one_line(tiny, pictures, tmp_path, monkeypatch, change):
    import shutil

    shutil.copytree(pictures, tmp_path / "images")
    config = tiny(**WINDOW, **DISK, data_dir=str(tmp_path / "images"))
    dataset = load_dataset(config)
    _, late = list(itertools.islice(((w, e) for _, w, e in windows(96, 48, 3, config.seed)), 4))[3]
    original = program.Pretraining.step
    steps = itertools.count()

    def step(run, *arguments):
        if next(steps) == 1:  # in the first of three steps of a pass: pass 3 is not yet read
            change(dataset.train.paths[late[0]])
        return original(run, *arguments)

    monkeypatch.setattr(program.Pretraining, "step", step)
    with pytest.raises(UserError) as caught:
        train(config, dataset=dataset)
    assert f"{dataset.train.paths[late[0]]} can no longer be read (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert next(steps) >= 3 * 3, "the passes before were trained"


def test_what_has_left_the_window_is_forgotten_and_what_is_held_is_not_read_again():
    calls = []
    ahead = Ahead(lambda i: calls.append(i) or (torch.full((3, 2, 2), i, dtype=torch.uint8), i), workers=0)
    ahead.hold(torch.tensor([1, 2]), torch.tensor([2, 3]))
    ahead.hold(torch.tensor([2, 3]), torch.tensor([3, 4]))
    assert ahead.holds(torch.tensor([4, 2])) and not ahead.holds(torch.tensor([1]))
    ((pixels, index),) = ahead.batches([[4, 3]])
    assert pixels[:, 0, 0, 0].tolist() == index.tolist() == [4, 3]
    ahead.hold(torch.tensor([4, 1]), torch.tensor([1]))
    ((pixels, _),) = ahead.batches([[1]])
    assert sorted(calls) == [1, 1, 2, 3, 4] and pixels.shape == (1, 3, 2, 2)
    ahead.close()
