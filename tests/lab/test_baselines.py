"""The two-branch methods: each learns, and goes through the same loop and evaluation as ours."""

import signal

import pytest
import torch

from lab import train as program
from lab.evaluate import evaluate
from lab.train import train
from plumbing.command_line import UserError
from plumbing.runs import Interrupted, read_checkpoint
from train import load_dataset

baselines = pytest.importorskip("lab.baselines", exc_type=UserError)


def test_the_methods_are_those_that_train_knows():
    assert set(program.METHODS) == {"ours", *baselines.METHODS}


def quick(name: str) -> dict:
    """SGD for the methods whose heads are 2 048 wide: Muon takes seconds per step for them."""
    return dict(optimizer="sgd") if name in ("simsiam", "barlow") else {}


@pytest.mark.parametrize("name", baselines.METHODS)
def test_a_two_branch_method_learns_to_agree_and_its_teacher_follows(name):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.ReLU())
    model = baselines.METHODS[name](network, 32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01)
    images = torch.randn(64, 3, 4, 4)
    moving = [p for key, p in model.named_parameters() if not key.endswith("weight_g")]  # DINO's is held at 1
    before, losses = [p.clone() for p in moving], []
    for _ in range(20 if quick(name) else 40):
        views = [images + 0.1 * torch.randn_like(images) for _ in range(2)]
        loss = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    if not name.startswith("moco"):  # MoCo's queue fills in the meantime, which makes its task harder
        assert sum(losses[-5:]) < sum(losses[:5])
    else:
        assert all(0 < loss < 12 for loss in losses)
    assert all(not torch.equal(p, old) for p, old in zip(moving, before)), "some weights stand still"


@pytest.mark.parametrize("name", baselines.METHODS)
def test_a_method_runs_through_the_loop_and_the_evaluation(name, lab_config):
    result = train(lab_config(method=name, epochs=1, **quick(name)))
    assert result["epoch"] == 1 and 0 <= result["knn"] <= 1 and "nce" not in result
    checkpoint = read_checkpoint(result["out"])
    assert not any(key.startswith("projector") for key in checkpoint["encoder"]), "heads are the method's own"
    figures = evaluate(checkpoint, load_dataset(lab_config()), device="cpu", quiet=True)
    assert figures["trained"] != figures["untrained"]


@pytest.mark.parametrize("name", ["moco", "mocov2"])
@pytest.mark.parametrize("count, length", [(96, 48), (50_000, 4096)])
def test_mocos_queue_holds_at_most_half_of_the_images(name, count, length, lab_config):
    run = baselines.TwoBranches(lab_config(method=name), count, torch.device("cpu"))
    run.step(torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16), 0.01)
    assert run.model.criterion.criterion.memory_bank.bank.shape == (length, 128)


@pytest.mark.parametrize("name", baselines.METHODS)
def test_a_method_takes_a_step_in_bf16(name, lab_config):
    run = baselines.TwoBranches(lab_config(method=name, precision="bf16", **quick(name)), 96, torch.device("cpu"))
    (loss,) = run.step(torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16), 0.01)
    assert torch.isfinite(loss)


@pytest.mark.parametrize(  # a teacher, a queue, a centre, prototypes
    "name, views", [("byol", "single"), ("moco", "single"), ("dino", "sslight"), ("swav", "sslight")]
)
def test_a_method_that_was_stopped_goes_on_to_the_same_end(name, views, lab_config, tmp_path, monkeypatch):
    whole = train(lab_config(method=name, views=views, out=str(tmp_path / "whole")))
    step = baselines.TwoBranches.step

    def stopping(self, *args):
        if self.count == 7:
            signal.raise_signal(signal.SIGTERM)
        self.count += 1
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(baselines.TwoBranches, "count", 0, raising=False)
        patch.setattr(baselines.TwoBranches, "step", stopping)
        with pytest.raises(Interrupted):
            train(lab_config(method=name, views=views))
    resumed = train(lab_config(method=name, views=views), read_checkpoint(lab_config().out))
    assert resumed["loss"] == whole["loss"]
    one, other = (read_checkpoint(run["out"])["model"] for run in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_own_run_does_not_go_on_as_another_method(lab_config, capsys):
    train(lab_config(epochs=1))
    assert program.main(["--resume", lab_config().out, "--method", "byol"]) == 2
    assert "the run has --method ours, it cannot go on with byol" in capsys.readouterr().err


def test_a_size_that_a_backbone_cannot_have_is_one_line(lab_config):
    with pytest.raises(UserError, match="--arch vit_tiny --size 17: vit_tiny cuts images in patches of 2"):
        train(lab_config(method="simclr", arch="vit_tiny", width=0, size=17))
