"""Within an epoch the host never waits for a GPU, and what it then cannot look at is found at the epoch's end.

There need not be a GPU. Tensors on the device "meta" have no values, so whatever asks for one (item, nonzero, unique, equal,
a mask as an index, a copy to the host) raises; copies from the host, which wait too, are refused by `NoCopies`.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import assert_same, interrupt_at
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pretraining
from bank import MemoryBank
from images import Images, UserError
from pretraining import Pretraining
from runs import read_checkpoint
from train import Interrupted, learner, train

META = torch.device("meta")


def devices(tree) -> set[str]:
    return {x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class NoCopies(TorchDispatchMode):
    """Refuses an operation that joins host and device, but for a copy that does not block."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        assert len(devices((args, kwargs, out))) < 2 or kwargs.get("non_blocking"), operation
        return out


class NoConstants(TorchFunctionMode):
    """Refuses tensors made from Python's numbers on the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        assert not made or devices(out) == {"cpu"}, function
        return out


@pytest.fixture
def meta(monkeypatch):
    """Autocast knows no such device: the steps run in float32."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


STEPS = {
    "sampled": {"negatives": 20},
    "whole bank": {"negatives": 0},
    "as released": {"negatives": 20, "bank_update": "npid", "cutmix": 0.5, "lam": 20.0, "layers": 3},
    "streamed": {"negatives": 0, "similarity_gb": 0.0, "lam": 2.0},
    "bf16 bank, blur": {"negatives": 20, "bank_dtype": "bf16", "blur": 0.5},
    "BYOL": {"method": "byol"},  # SimCLR's loss, of lightly, takes the partners out with a mask and waits
}


def steps(config, device, order):
    run = learner(config)(config, 96, device)
    run.encoder.train()
    if device.type == "meta":
        run.checks = False
        if config.method == "ours":
            run.bank.checks = False
    pixels = torch.zeros(96, 3, 16, 16, dtype=torch.uint8, device=device)
    return lambda: [
        run.step(pixels, index, 0.1) for pixels, index in Images(pixels, side=16).batches(order, 16, device)
    ]


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_no_step_waits_for_the_device(tiny, meta, options):
    epoch = steps(tiny(**options), META, torch.arange(96, device=META))
    epoch()  # makes what is made once
    with NoCopies(), NoConstants():
        losses = epoch()
    assert len(losses) == 6 and devices(losses) == {"meta"}


def test_the_order_of_an_epoch_is_copied_to_the_device_as_a_whole():
    images, copies = Images(torch.zeros(96, 3, 16, 16, dtype=torch.uint8, device=META), side=16), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            copies.extend([operation] * (len(devices((args, out))) > 1))
            return out

    with Count():
        assert len(list(images.batches(torch.arange(96), 16, META))) == 6
    assert len(copies) <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_no_step_waits_for_a_real_gpu(tiny, options):
    device = torch.device("cuda")
    epoch = steps(tiny(**options, precision="bf16"), device, torch.arange(96, device=device))
    epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------- what is not looked at


@pytest.fixture
def unchecked(monkeypatch):
    """Steps on the CPU as on a GPU: without a look at their values."""
    made = Pretraining.__init__

    def init(self, *args):
        made(self, *args)
        self.checks = self.bank.checks = False

    return lambda: monkeypatch.setattr(Pretraining, "__init__", init)


@pytest.mark.parametrize(
    "options",
    [{"negatives": 20}, {"negatives": 0}, {"bank_update": "npid", "cutmix": 0.5, "lam": 2.0}, {"similarity_gb": 0.0}],
    ids=str,
)
def test_a_run_without_checks_is_the_run_with_them_to_the_last_bit(tiny, tmp_path, unchecked, options):
    config = tiny(**options)
    train(config)
    unchecked()
    train(replace(config, out=str(tmp_path / "other")))
    one, other = read_checkpoint(config.out), read_checkpoint(str(tmp_path / "other"))
    one["config"]["out"] = other["config"]["out"]
    assert_same(one, other)


@pytest.fixture
def failing(monkeypatch):
    """The ninth of twelve losses is not finite, the weights after it are."""
    plain, calls = pretraining.nce, []

    def nce(similarity, target, temperature):
        calls.append(1)
        return plain(similarity, target, temperature) + (float("inf") if len(calls) == 9 else 0)

    monkeypatch.setattr(pretraining, "nce", nce)


def test_a_loss_that_is_not_finite_is_found_at_the_end_of_its_epoch(tiny, unchecked, failing):
    unchecked()
    with pytest.raises(UserError, match="the loss is no longer finite at step 12, .* is the last good checkpoint"):
        train(tiny())
    assert_good_after_the_first_epoch(tiny().out)


def test_a_loss_that_is_not_finite_is_not_saved_by_an_interruption(tiny, unchecked, failing, monkeypatch):
    unchecked()
    interrupt_at(monkeypatch, 9)
    with pytest.raises((UserError, Interrupted), match="the loss is no longer finite at step 10"):
        train(tiny())
    assert_good_after_the_first_epoch(tiny().out)


def assert_good_after_the_first_epoch(out):
    checkpoint = read_checkpoint(out)
    tensors = (*checkpoint["encoder"].values(), checkpoint["bank"]["weight"], checkpoint["sums"])
    assert checkpoint["step"] == 6 and all(x.isfinite().all() for x in tensors)
    assert len((Path(out) / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_a_bank_without_checks_makes_no_row_that_is_not_finite(rule):
    bank = MemoryBank(6, 4, momentum=0.5, rule=rule)
    bank.checks = False
    z, index = -bank.weight[:1].clone(), torch.tensor([0])
    pull = torch.eye(1, 6)  # the row's own image looks the other way: its new value is zero
    bank.update(z, index, similarity=torch.full((1, 6), -1e4) if rule == "corrected" else None, target=pull)
    assert bank.weight.isfinite().all()
    for _ in range(3):
        bank.update(torch.nn.functional.normalize(torch.randn(1, 4), dim=1), index)
    torch.testing.assert_close(bank.weight.norm(dim=1), torch.ones(6))
