"""The loop: it learns, repeats itself, survives being killed, and refuses in one line."""

import json
import os
import resource
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Forked

import eval_linear
import train as program
from bank import MemoryBank
from data import seed_of, shuffled
from loss import nce, sqrt_kl
from plumbing import command_line, runs
from plumbing.command_line import UserError, python
from plumbing.outputs import save_tensors
from plumbing.runs import Interrupted, Journal, configure, draw_progress, read_checkpoint
from train import RECIPES, Config, Pretraining, learning_rate, load_dataset, train


def assert_same(one, other, where="checkpoint"):
    """Equal to the last bit: every tensor and number of two checkpoints, but for the clock."""
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


def assert_one_line(capsys, message):
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line and "images/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and message in lines[0], printed.err


# ----------------------------------------------------------------------------------------- learning


def test_a_run_learns_and_leaves_its_folder(tiny):
    result = train(tiny(epochs=8, lr=0.05))
    out = Path(result["out"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9)) and rows[-1]["step"] == 8 * 6
    assert rows[-1]["nce"] < rows[0]["nce"] - 0.5, "the images become easier to tell apart"
    assert 0 <= result["knn"] <= 1 and result["loss"] == rows[-1]["loss"]
    assert json.loads((out / "config.json").read_text())["arch"] == "resnet10"
    assert (out / "progress.png").stat().st_size > 5000
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "last.pt", "metrics.jsonl", "progress.png"]


def test_one_step_is_loss_backward_sgd_then_bank(tiny):
    """The step against the same step written out: which z, P and rows are used, in which order."""
    config = tiny(lam=2.0, optimizer="sgd", temperature=0.1, lr=0.1, weight_decay=0.0, sgd_momentum=0.0)
    run, twin = (Pretraining(config, 96, torch.device("cpu")) for _ in range(2))
    pixels = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    index = torch.arange(16) * 3
    torch.manual_seed(5)
    loss, l_nce, l_kl = run.step(pixels, index, 0.1)

    torch.manual_seed(5)
    old = twin.bank.weight.clone()
    z = twin.encoder(twin.augment(pixels))
    s = z @ old.T
    torch.testing.assert_close(l_nce, nce(s, index, 0.1))
    torch.testing.assert_close(l_kl, sqrt_kl(s, 1.0))
    torch.testing.assert_close(loss, l_nce + 2.0 * l_kl)
    (nce(s, index, 0.1) + 2.0 * sqrt_kl(s, 1.0)).backward()
    for moved, before in zip(run.encoder.parameters(), twin.encoder.parameters()):
        torch.testing.assert_close(moved, before - 0.1 * before.grad, rtol=1e-4, atol=1e-5)
    pull = torch.nn.functional.one_hot(index, 96) - (s / 0.1).softmax(1)
    expected = torch.nn.functional.normalize(0.9 * old + 0.1 * pull.T @ z, dim=1).detach()
    torch.testing.assert_close(run.bank.weight, expected, rtol=1e-4, atol=1e-5)


def test_the_bank_starts_from_the_untrained_encoder_or_at_random(tiny):
    images = program.load_dataset(tiny()).train
    random, forward = (Pretraining(tiny(bank_init=kind), 96, torch.device("cpu")) for kind in ("random", "forward"))
    untouched = forward.bank.weight.clone()
    for run in (random, forward):
        run.enter(images, torch.arange(96))
    assert torch.equal(random.bank.weight, untouched)
    spread = lambda w: torch.linalg.svdvals(w)[0] / w.norm()  # noqa: E731  1 if all rows point one way
    assert spread(forward.bank.weight) > 1.5 * spread(random.bank.weight), "untrained features share a direction"


@pytest.mark.parametrize(
    "options",
    [
        {"bank_update": "npid", "bank_init": "random"},
        {"negatives": 30, "lam": 5.0, "cutmix": 0.5},
        {"cutmix": 1.0, "blur": 0.5, "lam": 1.0},
        {"cache_gb": 1e-9, "workers": 1, "size": 12, "eval_size": 16},
        {"precision": "bf16"},
        {"layers": 1, "warmup": 0.0, "gray": 1.0},
        {"window": 32, "visits": 2, "optimizer": "muon", "lr": 0.02},
        {"window": 40, "visits": 3, "bank_init": "random", "bank_update": "npid", "negatives": 12},
    ],
    ids=lambda o: "+".join(o),
)
def test_every_option_runs_to_the_end(tiny, options):
    result = train(tiny(epochs=1, **options))
    assert result["epoch"] == 1 and 0 <= result["knn"] <= 1


def test_the_softmax_runs_over_the_batch_and_k_others_or_over_all(tiny):
    runs = {k: Pretraining(tiny(negatives=k), 96, torch.device("cpu")) for k in (0, 30, 79, 80, 1000)}
    assert {k: run.choices for k, run in runs.items()} == {0: 96, 30: 46, 79: 95, 80: 96, 1000: 96}


def test_compile_compiles_the_encoder_and_changes_no_result(tiny, tmp_path, monkeypatch):
    plain, asked = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: asked.append(module) or plain(module, backend="eager"))
    results = [train(tiny(out=str(tmp_path / str(on)), epochs=1, compile=on)) for on in (False, True)]
    assert len(asked) == 1 and results[0]["nce"] == pytest.approx(results[1]["nce"], rel=1e-4)


@pytest.mark.parametrize("subset", [17, 31, 33, 95])
def test_no_batch_of_a_single_image_is_left_over(tiny, subset):
    """BatchNorm cannot learn from one image, which 17 images in batches of 16 would leave over."""
    assert train(tiny(epochs=1, subset=subset))["step"] == subset // 16


def test_learning_rate_warms_up_and_falls_to_zero_on_a_cosine():
    config = Config(lr=0.4, epochs=10, warmup=2)
    rates = [learning_rate(config, step, 10) for step in range(100)]
    assert 0 < rates[0] < 0.03 and rates[20] == 0.4 == max(rates)
    assert all(a < b for a, b in zip(rates[:20], rates[1:21])) and all(a > b for a, b in zip(rates[20:], rates[21:]))
    assert rates[60] == pytest.approx(0.2) and 0 < rates[99] < 0.001
    assert learning_rate(replace(config, warmup=0), 0, 10) == 0.4


def test_a_run_that_saves_seldom_loses_no_more_than_it_says(tiny, tmp_path):
    """Killed after epoch 5, saved every third: it goes on from epoch 3, to the same result."""

    def killed(run, dataset, epoch):
        if epoch == 5:
            raise MemoryError
        return {}

    options = dict(epochs=7, knn_every=0)
    whole = train(tiny(out=str(tmp_path / "whole"), **options))
    seldom = tiny(out=str(tmp_path / "seldom"), save_every=3, **options)
    with pytest.raises(MemoryError):
        train(seldom, watch=killed)
    assert len((tmp_path / "seldom" / "metrics.jsonl").read_text().splitlines()) == 4
    checkpoint = read_checkpoint(seldom.out)
    assert checkpoint["step"] == 3 * whole["step"] // 7
    assert train(seldom, checkpoint)["loss"] == whole["loss"]
    assert len((tmp_path / "seldom" / "metrics.jsonl").read_text().splitlines()) == 7
    assert read_checkpoint(seldom.out)["step"] == whole["step"], "the last epoch is saved whatever its number"


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    images = torch.arange(50)
    orders = [shuffled(images, 3, epoch) for epoch in (0, 1, 0)]
    assert sorted(orders[0].tolist()) == list(range(50))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], shuffled(images, 4, 0))


def test_views_depend_on_the_seed_and_on_the_step():
    seeds = {seed_of(seed, kind, n) % 2**32 for seed in range(20) for kind in ("step", "epoch") for n in range(50)}
    assert len(seeds) == 20 * 2 * 50 and seed_of(1, "step", 2) == seed_of(1, "step", 2)


def test_the_released_recipe_is_the_released_script():
    config, _ = configure(Config, RECIPES, ["--recipe", "released", "--epochs", "100", "--out", "nowhere"], "")
    assert (config.temperature, config.bank_momentum, config.lam, config.kl_temperature) == (0.2, 0.5, 20, 1)
    assert (config.dim, config.negatives, config.layers, config.hidden) == (2048, 10_000, 3, 2048)
    assert (config.lr, config.batch_size, config.weight_decay, config.warmup) == (1.0, 512, 1e-4, 0)
    assert (config.bank_update, config.cutmix, config.crop_min) == ("npid", 0.5, 0.2)
    assert config.epochs == 100, "a flag beside the recipe wins"
    assert all(set(recipe) <= set(asdict(Config())) for recipe in RECIPES.values())


# -------------------------------------------------------------------------------- hooks of the loop


def test_the_schedule_is_called_before_every_step_with_the_share_of_the_run_behind(tiny):
    """The hook of views that grow: what it changes holds from the same step on."""
    shares, sides = [], []

    class Watched(Pretraining):
        def step(self, pixels, index, lr):
            sides.append(self.look(pixels, index).views.shape[-1])
            return super().step(pixels, index, lr)

    def grow(run, share):
        shares.append(share)
        run.augment.size = 8 if share < 0.5 else 16

    train(tiny(), schedule=grow, build=Watched)
    assert shares == [k / 12 for k in range(12)] and sides == [8] * 6 + [16] * 6


def test_a_bank_of_your_own_takes_the_place_of_the_one_that_the_settings_name(tiny):
    bank = MemoryBank(96, 16, 0.5, "npid")
    run = Pretraining(tiny(), 96, torch.device("cpu"), bank=bank)
    train(tiny(epochs=1), build=lambda *_: run)
    assert run.bank is bank and torch.equal(read_checkpoint(tiny().out)["bank"]["weight"], bank.weight)


def test_what_watch_returns_joins_the_figures_of_its_epoch(tiny):
    result = train(tiny(knn_every=0), watch=lambda run, dataset, epoch: {"images": len(dataset.train) * epoch})
    assert result["images"] == 2 * 96
    assert [row["images"] for row in read_checkpoint(tiny().out)["history"]] == [96, 192]


def test_a_quiet_journal_writes_and_prints_nothing(tiny, tmp_path, capsys):
    """The other processes of a run on several devices keep one."""

    class Quiet(Journal):
        quiet = True

    dataset = load_dataset(tiny())  # which says what it read
    loud = train(tiny(epochs=1))
    capsys.readouterr()
    silent = train(tiny(epochs=1, out=str(tmp_path / "quiet")), dataset=dataset, journal=Quiet)
    assert silent["loss"] == loud["loss"] and capsys.readouterr() == ("", "")
    assert not (tmp_path / "quiet").exists()


@pytest.mark.parametrize("free", [True, False])
def test_where_looking_at_values_costs_time_a_run_stays_the_same(tiny, tmp_path, monkeypatch, free):
    """No step on a GPU looks at a value; the epoch's end notices a loss that is not finite."""
    expected = train(tiny(epochs=1, negatives=20, lam=1.0))
    monkeypatch.setattr(command_line, "check_bounds", lambda config: None)
    monkeypatch.setattr("bank.looking_is_free", lambda tensor: free)
    monkeypatch.setattr(program, "looking_is_free", lambda tensor: free)
    again = train(tiny(epochs=1, negatives=20, lam=1.0, out=str(tmp_path / "again")))
    assert again["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    with pytest.raises(UserError, match=f"no longer finite at step {1 if free else 6}, .*nothing was saved yet"):
        train(tiny(lr=1e38, warmup=0, out=str(tmp_path / "steep")))


# -------------------------------------------------------------------------- the same result, always


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny, tmp_path):
    options = dict(negatives=20, cutmix=0.5, lam=2.0)
    places = [str(tmp_path / name) for name in "abc"]
    for place, seed in zip(places, (1, 1, 2)):
        train(tiny(out=place, seed=seed, **options))
    a, b, c = (read_checkpoint(place) for place in places)
    a["config"]["out"] = b["config"]["out"]
    assert_same(a, b)
    assert not torch.equal(a["bank"]["weight"], c["bank"]["weight"])


def test_killed_twice_and_resumed_equals_uninterrupted_to_the_last_bit(flags, tmp_path):
    """A real run, killed, resumed, stopped by SIGTERM in the middle of an epoch, and resumed."""
    options = dict(epochs=4, batch_size=8, negatives=20, cutmix=0.5, lam=2.0, seed=4, knn_every=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with Forked(program.main, flags(out=whole, **options)) as process:  # one too: equal bits need equal threads
        assert process.ended()[0] == 0

    with Forked(program.main, flags(out=broken, **options)) as process:
        process.wait_for((broken / "last.pt").exists)
        process.kill()
        assert process.ended()[0] == -signal.SIGKILL
    at_kill = read_checkpoint(broken)["step"]
    assert 12 <= at_kill < 4 * 12

    with Forked(program.main, ["--resume", broken]) as process:
        process.wait_for(lambda: read_checkpoint(broken)["step"] > at_kill)
        process.terminate()
        status, _, said = process.ended()
    if status != 0:  # it may just have finished
        assert status == 128 + signal.SIGTERM
        assert said.splitlines()[-1].endswith(f"go on with: {python()} train.py --resume {broken}")
        assert "Traceback" not in said
        with Forked(program.main, ["--resume", broken]) as process:
            assert process.ended()[0] == 0

    one, other = read_checkpoint(whole), read_checkpoint(broken)
    one["config"]["out"] = other["config"]["out"]
    assert_same(one, other)
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 4


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    plain = program.learning_rate

    def with_signal(config, now, per_epoch):
        if now == step:
            os.kill(os.getpid(), number)
        return plain(config, now, per_epoch)

    monkeypatch.setattr(program, "learning_rate", with_signal)


def test_ctrl_c_in_the_middle_of_an_epoch_saves_and_says_how_to_go_on(tiny, tmp_path, monkeypatch, flags, capsys):
    train(tiny(out=str(tmp_path / "whole")))
    interrupt_at(monkeypatch, 8)  # 6 steps an epoch
    with pytest.raises(Interrupted, match=r"stopped after step 9 of 12, saved; .*--resume"):
        train(tiny())
    monkeypatch.undo()
    checkpoint = read_checkpoint(tiny().out)
    assert checkpoint["step"] == 9 and len(checkpoint["history"]) == 1
    assert program.main(["--resume", tiny().out]) == 0
    one, other = read_checkpoint(str(tmp_path / "whole")), read_checkpoint(tiny().out)
    one["config"]["out"] = other["config"]["out"]
    assert_same(one, other)


# -------------------------------------------------------------------------------- runs of lab.train


@pytest.mark.parametrize("setting", [{"views": "sslight"}, {"method": "simclr"}, {"power": 0.3}, {"shard_bank": True}])
def test_a_run_of_lab_train_is_refused_with_the_program_that_knows_it(tiny, capsys, setting):
    """Settings that the core does not know."""
    train(tiny(epochs=1))
    checkpoint, path = read_checkpoint(tiny().out), Path(tiny().out) / "last.pt"
    save_tensors(checkpoint | {"config": checkpoint["config"] | setting}, path, "it")
    before = path.read_bytes()
    capsys.readouterr()
    assert program.main(["--resume", tiny().out]) == 2
    assert_one_line(capsys, f"does not know ({next(iter(setting))})")
    assert path.read_bytes() == before


def test_a_backbone_that_the_core_does_not_have_is_evaluated_by_lab(tiny, capsys):
    train(tiny(epochs=1))
    checkpoint, path = read_checkpoint(tiny().out), Path(tiny().out) / "last.pt"
    for setting in ({"arch": "vit_tiny"}, {"drop_last_stage": True}):
        save_tensors(checkpoint | {"config": checkpoint["config"] | setting}, path, "it")
        capsys.readouterr()
        assert eval_linear.main([tiny().out]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"evaluate it with: python -m lab.evaluate {tiny().out}" in said


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "not/there"}, "--data-dir not/there: no such folder"),
        ({"batch_size": 97}, "--batch-size 97 is larger than the dataset, which has 96 training images"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"width": 1}, "--width must be 0, the usual one, or at least 8 at --size 16, not 1"),
        ({"width": 7, "size": 32}, "--width must be 0, the usual one, or at least 8 at --size 32, not 7"),
        ({"width": 8, "size": 48}, "--width must be 0, the usual one, or at least 16 at --size 48, not 8"),
        ({"negatives": 81}, "--negatives 81 is more than the 80 rows"),
        ({"negatives": 33, "window": 48}, "--negatives 33 is more than the 32 rows"),
        ({"visits": 40, "epochs": 40, "window": 48}, "--visits 40: one image would enter the window at a time"),
        ({"bank_momentum": 1.01}, "--bank-momentum must be at most 1, not 1.01"),
        ({"bank_momentum": -0.5}, "--bank-momentum must not be negative"),
        ({"temperature": 0}, "--temperature must be greater than 0"),
        ({"temperature": "nan"}, "--temperature must be a finite number"),
        ({"kl_temperature": -1}, "--kl-temperature must be greater than 0"),
        ({"lam": -1}, "--lam must not be negative"),
        ({"lr": 0}, "--lr must be greater than 0"),
        ({"epochs": 0}, "--epochs must be greater than 0"),
        ({"dataset": "imagenet"}, "choose from shapes, shapes-textured, cifar10, cifar100, stl10, folder"),
        ({"arch": "resnet9"}, "choose from resnet10, resnet18, resnet34, resnet50"),
        ({"bank_update": "momentum"}, "--bank-update: unknown 'momentum', choose from corrected, npid"),
        ({"bank_init": "zero"}, "--bank-init: unknown 'zero', choose from forward, random"),
        ({"device": "tpu"}, "--device: device 'tpu' is not available"),
        ({"subset": 1000}, "--subset 1000"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"sgd_momentum": 2}, "--sgd-momentum must be at most 1"),
        ({"method": "simclr"}, "unrecognized arguments: --method simclr"),
        ({"resume": "not/there"}, "not/there: no checkpoint there"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, tmp_path, capsys, options, message):
    assert program.main(flags(**options)) == 2
    assert_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_named(flags, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert program.main(flags(data_dir=tmp_path / "empty")) == 2
    assert_one_line(capsys, f"--data-dir {tmp_path / 'empty'}: no images found")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--tau", "1"], "unrecognized arguments: --tau 1"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--recipe", "best"], "--recipe: invalid choice: 'best' (choose from"),
        (["--resume", "x", "--overwrite"], "leave out --recipe and --overwrite"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line_too(line, message, capsys):
    assert program.main(line) == 2
    assert_one_line(capsys, message)


def test_a_run_is_not_overwritten_by_accident(flags, tiny, capsys):
    train(tiny(epochs=1))
    before = (Path(tiny().out) / "last.pt").read_bytes()
    assert program.main(flags()) == 2
    assert_one_line(capsys, "holds a run: --resume")
    assert (Path(tiny().out) / "last.pt").read_bytes() == before
    assert program.main([*flags(epochs=1, seed=1), "--overwrite"]) == 0
    assert read_checkpoint(tiny().out)["config"]["seed"] == 1


def test_a_place_that_cannot_be_written_is_named(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert program.main(flags(out=tmp_path / "file" / "run")) == 2
    assert_one_line(capsys, f"--out {tmp_path / 'file' / 'run'}: cannot write there")


def test_a_place_that_cannot_be_written_is_named_before_the_pictures_are_read(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "load_dataset", lambda *given: pytest.fail("read"))
    (tmp_path / "file").write_text("in the way")
    assert program.main(flags(out=tmp_path / "file" / "run")) == 2
    assert_one_line(capsys, "cannot write there")


def test_a_command_to_copy_quotes_names_with_spaces(flags, tmp_path, capsys):
    out = tmp_path / "my run"
    assert program.main(flags(out=out, epochs=1)) == 0
    assert f"eval_linear.py '{out}'" in capsys.readouterr().out
    assert program.main(flags(out=out)) == 2
    assert_one_line(capsys, f"--resume '{out}' goes on")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--arch": "resnet18"}, "the run has --arch resnet10, it cannot go on with resnet18"),
        ({"--lr": "0.5"}, "the run has --lr 0.07, it cannot go on with 0.5"),
        ({"--data-dir": "other"}, "96 of its 96 images are gone, renamed or changed, and 80 are new"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_kind_cannot_be_resumed(tiny, pictures, tmp_path, capsys, options, message):
    train(tiny(epochs=1))
    before = (Path(tiny().out) / "last.pt").read_bytes()
    if "--data-dir" in options:
        other = tmp_path / "other" / "train" / "bar"
        other.mkdir(parents=True)
        for i, path in enumerate(sorted(pictures.glob("train/*/*.png"))[:80]):
            (other / f"{i}.png").write_bytes(path.read_bytes())
        options = {"--data-dir": str(tmp_path / "other")}
    line = [word for pair in options.items() for word in pair]
    assert program.main(["--resume", tiny().out, *line]) == 2
    assert_one_line(capsys, message)
    assert (Path(tiny().out) / "last.pt").read_bytes() == before


def renamed(root):
    file = sorted(root.glob("train/*/*.png"))[3]
    file.rename(file.with_name("renamed.png"))


def added_and_removed(root):
    file = sorted(root.glob("train/*/*.png"))[-1]
    file.rename(file.with_name("aaa.png"))


def edited(root):
    Image.new("RGB", (16, 16)).save(sorted(root.glob("train/*/*.png"))[3])


@pytest.mark.parametrize("change", [renamed, added_and_removed, edited])
def test_a_run_is_not_resumed_with_as_many_other_images(tiny, pictures, tmp_path, capsys, change):
    shutil.copytree(pictures, tmp_path / "moved")
    train(tiny(epochs=1))
    line = ["--resume", tiny().out, "--data-dir", str(tmp_path / "moved")]
    assert program.main(line) == 0, "the same images elsewhere"
    change(tmp_path / "moved")
    assert program.main(line) == 2
    assert_one_line(capsys, "1 of its 96 images are gone, renamed or changed, and 1 are new")
    assert program.main(["--resume", tiny().out, "--data-dir", str(pictures)]) == 0


@pytest.mark.parametrize("suffix", ["bmp", "ppm"])
def test_other_images_of_the_same_names_and_sizes_are_noticed(tiny, tmp_path, capsys, suffix):
    for place, colour in (("one", (9, 9, 9)), ("other", (200, 0, 0))):
        (tmp_path / place).mkdir()
        for i in range(40):
            Image.new("RGB", (16, 16), colour).save(tmp_path / place / f"{i:02d}.{suffix}")
    train(tiny(epochs=1, data_dir=str(tmp_path / "one")))
    assert program.main(["--resume", tiny().out, "--data-dir", str(tmp_path / "other")]) == 2
    assert_one_line(capsys, "the same names and sizes, but show something else")


def test_a_window_over_other_images_is_not_resumed_either(tiny, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "more")
    Image.new("RGB", (16, 16)).save(tmp_path / "more" / "train" / "bar" / "new.png")
    train(tiny(epochs=1, window=32, visits=1))
    assert program.main(["--resume", tiny().out, "--data-dir", str(tmp_path / "more")]) == 2
    assert_one_line(capsys, "0 of its 96 images are gone, renamed or changed, and 1 are new")


def test_a_longer_run_is_refused_with_the_way_to_train_on(tiny, capsys):
    train(tiny(epochs=1))
    assert program.main(["--resume", tiny().out, "--epochs", "200"]) == 2
    assert_one_line(capsys, "cannot go on with 200; to train on, start a new run: python -m lab.train --init-from")


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01, 0])
def test_a_truncated_checkpoint_is_named(tiny, capsys, kept):
    train(tiny(epochs=1))
    path = Path(tiny().out) / "last.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert program.main(["--resume", str(path)]) == 2
    assert_one_line(capsys, f"{path}: damaged or not a checkpoint")


def test_a_run_goes_on_in_the_folder_it_lies_in_and_in_no_other_runs(tiny, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 8)
    with pytest.raises(Interrupted):
        train(tiny())
    monkeypatch.undo()
    moved = tmp_path / "moved"
    Path(tiny().out).rename(moved)
    train(tiny(epochs=1))
    other = (Path(tiny().out) / "last.pt").read_bytes()
    capsys.readouterr()
    assert program.main(["--resume", str(moved), "--out", tiny().out]) == 2
    assert_one_line(capsys, f"{tiny().out} holds a run")
    assert program.main(["--resume", str(moved / "last.pt")]) == 0
    assert read_checkpoint(moved)["step"] == 12 and (Path(tiny().out) / "last.pt").read_bytes() == other


def test_a_full_disk_while_metrics_or_pictures_are_written_is_one_line(flags, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "draw_progress", draw_progress)  # no copy
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert program.main(flags()) == 2
    assert_one_line(capsys, "progress.png cannot be written ([Errno 28] No space left on device): is the disk full?")


@pytest.mark.parametrize("content", [b"hello", b"PK", b"", b"\x80\x02", b"{}", bytes(range(256))])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, capsys, content):
    (tmp_path / "other.pt").write_bytes(content)
    assert program.main(["--resume", str(tmp_path / "other.pt")]) == 2
    assert_one_line(capsys, "other.pt: damaged or not a checkpoint")


def test_what_is_no_checkpoint_at_all_is_named(tmp_path, capsys):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    assert program.main(["--resume", str(tmp_path / "other.pt")]) == 2
    assert_one_line(capsys, "damaged or not a checkpoint (config is missing or of the wrong type)")


def test_a_checkpoint_loads_without_running_code(tiny):
    train(tiny(epochs=1))
    content = torch.load(Path(tiny().out) / "last.pt", weights_only=True)
    assert content["bank"]["weight"].shape == (96, 16)


# ------------------------------------------------------------------------------------------- faults


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, flags, capsys, monkeypatch):
    calls = []

    def failing(*arguments, **named):
        calls.append(1)
        return nce(*arguments, **named) * (float("nan") if len(calls) == 9 else 1)

    monkeypatch.setattr(program.Pretraining, "nce", staticmethod(failing))
    assert program.main(flags()) == 2
    assert_one_line(capsys, "the loss is no longer finite at step 8, learning rate 0.0")
    checkpoint = read_checkpoint(tiny().out)
    assert checkpoint["step"] == 6 and torch.isfinite(checkpoint["bank"]["weight"]).all()


def test_a_learning_rate_that_is_too_large_is_told_from_the_loss(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "check_bounds", lambda config: None)
    assert program.main(flags(lr=1e38, warmup=0)) == 2
    assert_one_line(capsys, "learning rate 9.83e+37: try a smaller --lr; nothing was saved yet")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tiny, monkeypatch):
    """The kernel refuses the write after 20 kB, as it does when the disk is full."""
    interrupt_at(monkeypatch, 8)
    with pytest.raises(Interrupted):
        train(tiny())
    before = (Path(tiny().out) / "last.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    with Forked(program.main, ["--resume", tiny().out], limit) as process:
        status, _, said = process.ended()
    assert status == 2 and "Traceback" not in said
    assert "the checkpoint" in said.splitlines()[-1] and "is the disk full?; what was there before is untouched" in said
    assert (Path(tiny().out) / "last.pt").read_bytes() == before
    assert not list(Path(tiny().out).glob("*.part"))


def test_a_failed_write_leaves_neither_a_part_nor_a_loss(tmp_path):
    save_tensors({"a": 1}, tmp_path / "x.pt", "it")
    before = (tmp_path / "x.pt").read_bytes()

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        save_tensors({"a": Unwritable()}, tmp_path / "x.pt", "it")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"] and (tmp_path / "x.pt").read_bytes() == before


def test_a_damaged_image_is_skipped_and_training_goes_on(tiny, flags, pictures, tmp_path, capsys):
    good = sorted(pictures.glob("train/*/*.png"))[:40]
    (tmp_path / "mixed").mkdir()
    for i, path in enumerate(good):
        content = path.read_bytes()
        (tmp_path / "mixed" / f"{i}.png").write_bytes(content[: len(content) // 2] if i == 7 else content)
    assert program.main(flags(data_dir=tmp_path / "mixed", epochs=1)) == 0
    printed = capsys.readouterr().out
    assert "skipped 1 of 40 images" in printed and str(tmp_path / "mixed" / "7.png") in printed
    assert len(read_checkpoint(tiny().out)["bank"]["weight"]) == 39
