"""Within an epoch the host never waits for a GPU; a loss that is not finite is noticed after it.

No GPU is needed. Tensors on the device "meta" have no values, so whatever asks for one (item,
nonzero, unique, equal, a mask as an index, a copy to the host) raises. Copies from the host, which
wait too, are refused by `NoCopies`.
"""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train as program
from bank import MemoryBank
from lab.train import build
from lab.train import train as train_lab
from plumbing import devices
from plumbing.command_line import UserError
from plumbing.files import Images
from plumbing.runs import Interrupted, read_checkpoint
from train import train

META = torch.device("meta")


def device_types(tree) -> set[str]:
    return {x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class NoCopies(TorchDispatchMode):
    """Refuses an operation that joins host and device, unless it is a copy that does not block."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        assert len(device_types((args, kwargs, out))) < 2 or kwargs.get("non_blocking"), operation
        return out


class NoConstants(TorchFunctionMode):
    """Refuses tensors on the device that are made from Python's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        constant = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        assert not constant or device_types(out) == {"cpu"}, function
        return out


@pytest.fixture
def blind(monkeypatch):
    """A function after which no value is looked at, on the CPU as on a GPU."""

    def close():
        original = devices.looking_is_free
        for module in list(sys.modules.values()):
            if vars(module).get("looking_is_free") is original:
                monkeypatch.setattr(module, "looking_is_free", lambda tensor: False)

    return close


@pytest.fixture
def meta(monkeypatch, blind):
    """Autocast does not know such a device: the steps run in float32."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    blind()


STEPS = {
    "sampled": {"negatives": 20},
    "whole bank": {"negatives": 0},
    "as released": {"negatives": 20, "bank_update": "npid", "cutmix": 0.5, "lam": 20.0, "layers": 3},
    "crops": {"negatives": 20, "views": "sslight"},
    "streamed": {"negatives": 0, "similarity_gb": 1e-9, "lam": 2.0},
    "bf16 bank, blur": {"negatives": 20, "bank_dtype": "bf16", "blur": 0.5},
    "BYOL": {"method": "byol"},  # SimCLR's loss, of lightly, takes the partners out with a mask and waits
}


def epoch_of(config, device):
    """A function that makes the steps of an epoch."""
    if config.method != "ours":
        pytest.importorskip("lightly")
    order, run = torch.arange(48, device=device), build(config, 48, device)
    run.encoder.train()
    images = Images(torch.zeros(48, 3, 16, 16, dtype=torch.uint8, device=device), side=16)
    return lambda: [run.step(pixels, index, 0.1) for pixels, index in images.batches(order, 16, device)]


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_no_step_waits_for_the_device(lab_config, meta, options):
    epoch = epoch_of(lab_config(**options), META)
    epoch()  # constants are created in the first epoch
    with NoCopies(), NoConstants():
        losses = epoch()
    assert len(losses) == 3 and device_types(losses) == {"meta"}


def test_the_order_of_an_epoch_is_copied_to_the_device_as_a_whole():
    images, copies = Images(torch.zeros(96, 3, 16, 16, dtype=torch.uint8, device=META), side=16), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            copies.extend([operation] * (len(device_types((args, out))) > 1))
            return out

    with Count():
        assert len(list(images.batches(torch.arange(96), 16, META))) == 6
    assert len(copies) <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_no_step_waits_for_a_real_gpu(lab_config, options):
    epoch = epoch_of(lab_config(**options, precision="bf16"), torch.device("cuda"))
    epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------- what is not looked at


@pytest.mark.parametrize(
    "options",
    [{"negatives": 20}, {"negatives": 0}, {"bank_update": "npid", "cutmix": 0.5, "lam": 2.0}, {"similarity_gb": 1e-9}],
    ids=str,
)
def test_a_run_without_validation_is_the_run_with_it_to_the_last_bit(lab_config, tmp_path, blind, options):
    config = lab_config(**options)
    train_lab(config)
    blind()
    train_lab(replace(config, out=str(tmp_path / "other")))
    assert_same(*(read_checkpoint(place) for place in (config.out, str(tmp_path / "other"))))


def assert_same(one, other, where="checkpoint"):
    """Equal to the last bit: every tensor and number of two checkpoints, except clock and place."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "out"}:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert one == other, where


@pytest.fixture
def failing(monkeypatch):
    """The ninth of twelve losses is not finite, the weights after it are."""
    nce, calls = program.nce, []

    def ninth_is_infinite(*given, **named):
        calls.append(1)
        return nce(*given, **named) + (float("inf") if len(calls) == 9 else 0)

    monkeypatch.setattr(program.Pretraining, "nce", staticmethod(ninth_is_infinite))


def test_a_loss_that_is_not_finite_is_found_at_the_end_of_its_epoch(tiny, blind, failing):
    blind()
    with pytest.raises(UserError, match="the loss is no longer finite at step 12, .* is the last good checkpoint"):
        train(tiny())
    assert_good_after_the_first_epoch(tiny().out)


def test_a_loss_that_is_not_finite_is_not_saved_by_an_interruption(tiny, blind, failing, monkeypatch):
    blind()
    learning_rate = program.learning_rate

    def interrupted(config, step, per_epoch):
        if step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(config, step, per_epoch)

    monkeypatch.setattr(program, "learning_rate", interrupted)
    with pytest.raises((UserError, Interrupted), match="the loss is no longer finite at step 10"):
        train(tiny())
    assert_good_after_the_first_epoch(tiny().out)


def assert_good_after_the_first_epoch(out):
    checkpoint = read_checkpoint(out)
    tensors = (*checkpoint["encoder"].values(), checkpoint["bank"]["weight"], checkpoint["sums"])
    assert checkpoint["step"] == 6 and all(x.isfinite().all() for x in tensors)
    assert len((Path(out) / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_a_bank_without_validation_makes_no_row_that_is_not_finite(rule, blind):
    blind()
    bank = MemoryBank(6, 4, momentum=0.5, rule=rule)
    z, index = -bank.weight[:1].clone(), torch.tensor([0])
    similarity = torch.tensor([[-1e4, 0, 0, 0, 0, 0]])  # P of the own row is zero: the row cancels against its z
    bank.update(z, index, similarity)
    assert bank.weight.isfinite().all() and bank.weight[0].norm() < 1e-6
    for _ in range(3):
        bank.update(torch.nn.functional.normalize(torch.randn(1, 4), dim=1), index)
    torch.testing.assert_close(bank.weight.norm(dim=1), torch.ones(6))
