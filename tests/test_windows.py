"""The order in which images pass: windows, visits, and how old a row is when its image returns."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from bank import MemoryBank
from data import shuffled, windows
from plumbing.runs import Interrupted, SignalCatcher, read_checkpoint
from train import train


def passes(count: int, size: int, visits: int, number: int, start: int = 0, seed: int = 0):
    return list(itertools.islice(windows(count, size, visits, seed, start), number))


@pytest.mark.parametrize(
    ("count", "size", "visits"), [(100, 20, 4), (97, 20, 4), (50, 30, 7), (1000, 17, 5), (40, 20, 50)]
)
def test_no_image_is_in_a_window_twice_and_exactly_the_entering_ones_are_new(count, size, visits):
    before = set()
    for number, images, entering in passes(count, size, visits, 200):
        assert len(images) == size and len(set(images.tolist())) == size
        assert set(entering.tolist()) == set(images.tolist()) - before, number
        before = set(images.tolist())


def test_every_image_is_visited_as_often_as_asked_before_any_returns():
    seen = torch.zeros(120)
    for _, images, _ in passes(120, 24, 4, 120 // 6):
        seen[images] += 1
    first = torch.cat([images for _, images, _ in passes(120, 24, 4, 1)])
    others = torch.ones(120, dtype=torch.bool)
    others[first] = False
    late = torch.cat([e for _, _, e in passes(120, 24, 4, 20)[-4:]])
    others[late] = False  # these have visits left
    assert (seen[others] == 4).all() and others.sum() > 60


def test_a_window_of_all_images_is_the_paper_all_enter_once_and_stay():
    for size in (0, 30, 31, 1000):
        for number, images, entering in passes(30, size, 8, 3):
            assert torch.equal(images, torch.arange(30))
            assert len(entering) == (30 if number == 0 else 0)


def test_passes_can_be_taken_up_at_any_number():
    whole = passes(97, 20, 4, 60)
    for start in (1, 7, 19, 20, 33, 59):
        for a, b in zip(passes(97, 20, 4, 60 - start, start), whole[start:]):
            assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_another_cycle_brings_another_order():
    first, second = passes(100, 10, 1, 10), passes(100, 10, 1, 20)[10:]
    assert [set(a[1].tolist()) for a in first] != [set(b[1].tolist()) for b in second]


def ages_of(size: int, visits: int, number: int) -> torch.Tensor:
    """The steps between two visits of an image, of 400 images in batches of 10."""
    last, ages, step = {}, [], 0
    for pass_number, images, entering in passes(400, size, visits, number):
        for image in entering.tolist():
            last.pop(image, None)  # its row is new: the forward pass has just made it
        for index in shuffled(images, 0, "epoch", pass_number).split(10):
            for image in index.tolist():
                if image in last:
                    ages.append(step - last[image])
                last[image] = step
            step += 1
    return torch.tensor(ages).double()


def test_a_row_in_a_window_is_w_over_b_steps_old_and_n_over_b_steps_in_a_random_order():
    """docs/derivations.md, section 9: the mean number of steps between two visits of an image."""
    assert ages_of(0, 1, 30).mean() == pytest.approx(400 / 10, rel=0.05)
    assert ages_of(80, 8, 200).mean() == pytest.approx(80 / 10, rel=0.05)


def test_the_spread_of_a_rows_age_is_its_mean_over_the_square_root_of_six():
    """The same section: a triangle from 0 to twice the mean, in whole steps."""
    for steps, ages in ((40, ages_of(0, 1, 30)), (8, ages_of(80, 8, 200))):
        assert ages.var() == pytest.approx((steps**2 - 1) / 6, rel=0.05)
        assert 1 <= ages.min() <= 2 and 2 * steps - 3 <= ages.max() <= 2 * steps - 1


def test_the_ages_that_exercise_13_names_are_those_that_its_code_measures():
    text = (Path(__file__).parent.parent / "EXERCISES.md").read_text().split("## 13. ")[1].split("## 14. ")[0]
    printed = []
    exec(re.search("```python\n(.*?)```", text, re.S).group(1), {"print": printed.append})
    for line in printed:
        assert line.split(" steps")[0] in " ".join(text.split()), line
        assert line.split("steps, ")[1] in text, line


def test_entering_images_take_the_rows_of_those_that_left():
    bank = MemoryBank(6, 4, window=True)
    for number, images, entering in passes(20, 6, 3, 40):
        before = dict(zip(bank.images.tolist(), bank.weight.clone())) if number else {}
        bank.enter(entering)
        bank.write(entering, torch.nn.functional.normalize(torch.randn(len(entering), 4), dim=1))
        assert set(bank.images.tolist()) == set(images.tolist())
        for image in set(images.tolist()) - set(entering.tolist()):
            assert torch.equal(bank.weight[bank.locate(torch.tensor([image]))][0], before[image])


def test_an_image_outside_the_window_is_refused():
    bank = MemoryBank(6, 4, window=True)
    bank.enter(torch.arange(10, 16))
    with pytest.raises(ValueError, match="window"):
        bank.update(torch.nn.functional.normalize(torch.randn(2, 4), dim=1), torch.tensor([12, 3]))


@pytest.mark.parametrize("options", [dict(window=32, visits=4), dict(window=32, visits=4, optimizer="muon", lr=0.02)])
def test_a_run_with_a_window_trains_and_its_bank_has_the_windows_rows(tiny, options):
    result = train(tiny(epochs=4, **options))
    assert result["epoch"] == 4 and result["loss"] < 20


class StopAfter(SignalCatcher):
    """A signal that comes after so many looks: the loop looks before a pass and after each step."""

    def __init__(self, looks: int):
        self.looks = looks

    @property
    def signal(self) -> int:
        self.looks -= 1
        return 15 * (self.looks < 0)


@pytest.mark.parametrize("looks", [1, 4, 6, 9])
def test_a_run_killed_inside_a_window_goes_on_to_the_same_last_bit(tiny, tmp_path, looks):
    options = dict(window=48, visits=3, epochs=3, optimizer="muon", lr=0.02, knn_every=0)
    train(tiny(**options, out=str(tmp_path / "whole")))
    config = tiny(**options)
    with pytest.raises(Interrupted):
        train(config, stop=StopAfter(looks))
    train(config, read_checkpoint(config.out))
    whole, resumed = (read_checkpoint(str(place)) for place in (tmp_path / "whole", config.out))
    assert whole["step"] == resumed["step"] and torch.equal(whole["bank"]["images"], resumed["bank"]["images"])
    for part in ("encoder", "bank"):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), name
