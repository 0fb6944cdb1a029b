"""lab/studies: every point can be run, pictures are drawn, titles say what the figures say."""

import pickle
from dataclasses import replace

import pytest
import torch
from invented import invented, lab, points_can_be_run

from figures import field, fig3_convergence, fig5_lambda, plots
from figures import sweep as sweeper
from lab.studies import (
    ageing,
    bank_spectrum,
    cells,
    cheaper_bank,
    cures,
    data_efficiency,
    default,
    default_ingredients,
    few_images,
    few_labels,
    field_checks,
    field_ideas,
    field_lr,
    field_search,
    finalists,
    growing_views,
    harder_views,
    hour,
    ingredients,
    model_efficiency,
    negatives,
    one_window,
    paper_scale,
    photo_settings,
    photos,
    quality,
    recipe,
    search,
    spectrum,
    sqrtkl_where,
    transfer,
)
from lab.train import LabConfig, train
from plumbing import folders
from plumbing.optimizer import optimizer_of, set_rate
from plumbing.runs import read_checkpoint
from train import learning_rate, load_dataset

STUDIES = (
    ingredients, sqrtkl_where, bank_spectrum, recipe, negatives, cheaper_bank, field_lr, field_ideas, growing_views,
    data_efficiency, model_efficiency, transfer, paper_scale, search, cures, spectrum,
    ageing, default, default_ingredients, few_images, field_search, finalists, harder_views, hour, one_window,
    photo_settings, photos, quality, cells, few_labels, field_checks,
)  # fmt: skip
TWICE = {fig5_lambda.name("T = 1", 0), fig3_convergence.WITHOUT}  # the same run in the bank's picture at paper scale


@pytest.mark.parametrize("script", STUDIES, ids=lambda script: script.__name__)
@pytest.mark.parametrize("scale", sweeper.SCALES)
def test_every_point_of_every_study_can_be_run_at_every_scale(script, scale):
    points_can_be_run(script, scale, TWICE)


@pytest.fixture
def titles(monkeypatch):
    """The titles of the pictures that are drawn, as they are drawn."""
    seen, finish = [], plots.finish

    def note(figure, title, *args):
        seen.append(title)
        finish(figure, title, *args)

    monkeypatch.setattr(plots, "finish", note)
    return seen


@pytest.mark.parametrize(
    "script, better, finding",
    [
        (
            ingredients, ["+ forward initialisation"],
            "forward initialisation +10.0, SqrtKL +0.0, CutMix +0.0, the corrected rule -10.0",
        ),
        (sqrtkl_where, [], "larger than chance: nowhere"),
        (
            bank_spectrum, [],
            "84 under the corrected rule, 84 under NPID's\nwith SqrtKL (λ = 20, T = 1) it ends at 70, without at 70",
        ),
        (search, ["16 visits"], "at most +10.0 ± 0.8\nwith 16 visits"),
        (
            cures, ["windows", "corrected rule + windows"],
            "alone: corrected rule +0.0, SqrtKL +0.0, windows +10.0; all three +0.0",
        ),
        (one_window, [one_window.WINDOW], "+10.0 linear probe, +10.0 kNN (k = 200)"),
        (ageing, ["windows"], "from 0.28 (none: NPID's rule, random order)\nto 0.28"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_every_study_is_drawn_and_its_title_says_what_the_figures_say(script, better, finding, titles, tmp_path):
    script.draw(invented(script, better=better), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert finding in titles[0]
    script.draw(invented(script, seeds=(0,)), tmp_path / "one seed.png")
    assert (tmp_path / "one seed.png").stat().st_size > 10_000


def test_a_difference_beyond_chance_is_named(titles, tmp_path):
    runs = invented(sqrtkl_where, better=["1000 images, with SqrtKL"])
    for run in runs:  # equal gains in every seed would have no spread to compare with
        run["final"]["knn"] += 0.001 * (run["seed"] == 1) * (run["name"] == "1000 images, with SqrtKL")
    sqrtkl_where.draw(runs, tmp_path / "x.png")
    assert "for 1000 images (+10.0 knn)" in titles[0] and "Figure" not in titles[0]


def test_what_little_data_will_do_is_measured_and_drawn(tiny, tmp_path, forked_sweep):
    points = {"ours, 96 images": lab(tiny(epochs=1)), "SimCLR, 96 images": lab(tiny(epochs=1), method="simclr")}
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, measure=data_efficiency.measure)
    ours, other = (run["final"] for run in runs)
    keys = {"knn", "linear", "linear_1", "linear_10", "linear_1_std", "linear_10_std"}
    assert set(other) == keys and set(ours) == keys | {f"scratch_linear{share}" for share in ("", "_1", "_10")}
    assert all(0 <= value <= 1 for value in (*ours.values(), *other.values()))
    again = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), needs=("linear_1",))
    assert again[0]["final"] == ours, "a run that has what is needed is not repeated"
    data_efficiency.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    lines = data_efficiency.table(runs).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["ours", "SimCLR", "from scratch"]
    assert [line.split(" | ")[5] == "-" for line in lines[2:]] == [False, False, True], "it has no frozen features"


def test_few_labels_are_measured_by_two_classifiers_over_many_draws(tiny):
    checkpoint = read_checkpoint(train(lab(tiny(epochs=1)))["out"])
    dataset = load_dataset(lab(tiny()))
    final = few_labels.measure(checkpoint, dataset)
    assert set(final) == {"knn", "linear", "few_probe", "few_mean"} and all(0 < value < 1 for value in final.values())
    assert final["few_probe"] < final["linear"], "one label per class is too few"
    runs = invented(few_labels)
    for run in runs:
        run["final"] |= {"few_probe": 0.25, "few_mean": 0.3}
    assert "| ours, twice the epochs | 25.0 ± 0.0 | 30.0 ± 0.0 | 46.0 ± 1.0 | 41.0 ± 1.0 | 3 |" in few_labels.table(
        runs
    )


def test_the_nearest_class_mean_is_that_of_the_largest_cosine():
    train_ = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    labels, test = torch.tensor([3, 3, 7, 9]), torch.tensor([[1.0, 0.2], [0.1, 1.0], [-0.6, 0.8], [0.0, -1.0]])
    assert few_labels.nearest_mean(train_, labels, test, torch.tensor([3, 7, 7, 9])) == 0.75
    assert few_labels.nearest_mean(train_, labels, test[:3], torch.tensor([3, 7, 7])) == 1.0


def test_the_title_of_little_data_names_the_largest_and_the_smallest_gain():
    def runs(count, **final):
        return [{"name": f"ours, {count} images", "final": final | {f"scratch_{key}": 0.3 for key in final}}]

    rows = data_efficiency.rows_of(
        runs(1000, linear=0.4, linear_10=0.35, linear_1=0.32) + runs(5000, linear=0.29, linear_10=0.3, linear_1=0.3)
    )
    text = data_efficiency.title(rows)
    assert "+10.0 (1000 images, all labels) to -1.0 (5000 images, all labels)" in text


def test_small_backbones_are_drawn_with_what_they_cost(titles, tmp_path):
    runs = invented(model_efficiency, better=["resnet10 of width 16, ours"])
    model_efficiency.draw(runs, tmp_path / "x.png")
    assert "ahead on 1 of 8" in titles[0] and "resnet10 +10.0, resnet18 +0.0" in titles[0]
    lines = model_efficiency.table(runs).splitlines()
    forward_and_backward = 3 * 2 * 19.7e6  # of a view; 10 epochs of 19 steps of 256
    assert model_efficiency.total(runs[9]["config"]) == pytest.approx(forward_and_backward * 10 * 4864 / 1e12, rel=0.01)
    ours, simclr, moco = (line.split(" | ")[6] for line in lines[5:8])
    assert ours == simclr and float(moco) > 1.3 * float(ours), "MoCo's other network costs a forward pass"
    assert len(lines) == 2 + 24 and any(
        line.startswith(f"| resnet18 of width 16 | 0.70 | 20 | {field.NAMES[field.BEST[-1]]} | 46.0 ± 1.0 |")
        for line in lines
    )


def test_transfer_probes_every_run_on_every_target(tiny, tmp_path, monkeypatch):
    config, drawn = lab(tiny(epochs=1)), folders.drawn
    monkeypatch.setattr(folders, "drawn", lambda count, *rest: drawn(count // 50, *rest))
    checkpoint = read_checkpoint(train(config)["out"])
    own, targets = config.dataset, (config.dataset, "shapes")
    measure = pickle.loads(pickle.dumps(transfer.Measure(targets, config.data_dir)))  # as a sweep's processes get it
    final = measure(checkpoint, load_dataset(config))
    wanted = {
        f"{who} {key} {t}"
        for who in ("trained", "untrained", "raw", "majority")
        for key in ("knn", "linear")
        for t in targets
    }
    assert set(final) == wanted | {"knn", "linear"}
    elsewhere = train(replace(config, dataset="shapes", out=str(tmp_path / "drawn")))["out"]
    reverse = measure(read_checkpoint(elsewhere), load_dataset(replace(config, dataset="shapes")))
    assert set(reverse) == set(final), "a run on shapes does not keep where the photographs lie"
    runs = [{"name": f"ours on {own}", "method": "ours", "seed": 0, "final": final}]
    lines = transfer.table(runs).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| pretrained on",
        "|" + "---|" * (len(targets) + 2),
        f"| ours on {own}",
        "| untrained",
        "| raw",
    ]


def test_the_ideas_name_the_one_that_helps_most(titles, tmp_path):
    runs = invented(field_ideas, better=["τ = 0.1"])
    field_ideas.draw(runs, tmp_path / "x.png")
    assert "at most +10.0 ± 0.8\nwith τ = 0.1" in titles[0]
    assert len(field_ideas.table(runs).splitlines()) == 2 + 15
    assert {run["config"]["holdout"] for run in runs} == {4000}, "settings are not chosen by the test images"


def test_the_chosen_learning_rates_are_the_best_of_the_search():
    file = sweeper.RESULTS / "field_lr-cpu.json"
    runs = sweeper.read(file)
    for method in field.NAMES:
        own = [run for run in runs if run["name"].startswith(field.NAMES[method] + ", lr")]
        sums = {run["config"]["lr"]: run["final"]["linear"] + run["final"]["knn"] for run in own}
        if method != "moco":  # takes what MoCo v2 takes
            best = max(sums, key=sums.get)
            assert best == field.LR[method] and min(sums) < best < max(sums), method
    assert field.LR["moco"] == field.LR["mocov2"]
    assert field_lr.table(runs).count("**") == 2 * 9


def test_the_effective_rank_counts_directions():
    one = spectrum.shape_of(torch.outer(torch.randn(6), torch.randn(9)))
    assert one["rank"] == pytest.approx(1, abs=0.01) and one["full"] == 6
    even = spectrum.shape_of(torch.eye(6, 9).reshape(6, 1, 3, 3))
    assert even["rank"] == pytest.approx(6, abs=0.01) and set(even["values"]) == {1.0}


@pytest.mark.parametrize("options", [dict(optimizer="sgd", weight_decay=0.01, lr=0.5), dict(weight_decay=0.3)])
def test_what_weight_decay_leaves_of_the_first_weights_is_not_part_of_the_way(options):
    """The optimiser of the run, fed with gradients of 0, keeps that share and nothing else."""
    config = LabConfig(**options, epochs=3, warmup=1.0)
    weight = torch.nn.Parameter(torch.ones(2, 3).double())
    optimizer = optimizer_of(config, [weight])
    for step in range(12):
        set_rate(optimizer, learning_rate(config, step, 4))
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    left = spectrum.undecayed(config, 4)
    assert 0 < left < 0.97
    torch.testing.assert_close(weight.data, torch.full_like(weight, left))


def test_what_sgd_and_muon_move_is_measured_drawn_and_tabled(tiny, titles, tmp_path):
    muon = tiny(epochs=1, optimizer="muon", out=str(tmp_path / "muon"))
    rows = {"SGD": tiny(epochs=1, optimizer="sgd"), "Muon": muon}
    runs = []
    for name, config in rows.items():
        checkpoint = read_checkpoint(train(lab(config))["out"])
        final = spectrum.measure(checkpoint, load_dataset(config))
        runs.append({"name": name, "seed": 0, "final": final, "config": vars(config), "hardware": "x"})
    sgd, muon = (sum(row["step"]["rank"] for row in run["final"]["matrices"].values()) for run in runs)
    assert muon > 1.2 * sgd, "an orthogonalised step has more directions"
    spectrum.draw(runs, tmp_path / "x.png")
    assert "SGD" in titles[0] and "Muon" in titles[0]
    assert len(spectrum.table(runs).splitlines()) == 2 + len(runs[0]["final"]["matrices"])


def test_photographs_are_measured_frozen_fine_tuned_and_from_scratch(tiny, titles, tmp_path, forked_sweep):
    config = lab(tiny(epochs=1))
    points = {"ours": config, "SimCLR": lab(config, method="simclr", branch_setting=0.2)}
    measure = photos.Measure((1, 1, 1))
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, measure=measure)
    ours, other = (run["final"] for run in runs)
    learned = {name + ending for name in ("linear", "finetune") for ending in photos.SHARES}
    assert learned <= other.keys() and learned | {"scratch", "scratch_10", "scratch_1"} <= ours.keys()
    assert all(0 <= ours[key] <= 1 for key in ours if key != "seconds") and ours["seconds"] > 0
    photos.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    gain = 100 * (ours["finetune"] - ours["scratch"])
    assert f"less from scratch: {gain:+.1f} (all labels)" in titles[0]
    lines = photos.table(runs).splitlines()
    names = ["ours, frozen", "ours, fine-tuned", "SimCLR, frozen", "SimCLR, fine-tuned", *photos.CONTROLS.values()]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]
    assert f"| {100 * ours['knn']:.1f} | 1 |" in lines[2] and "| - | 1 |" in lines[3]


def test_from_scratch_has_the_steps_of_pretraining_and_fine_tuning(tiny, monkeypatch):
    config = tiny(epochs=2)
    dataset, seen = load_dataset(config), []

    def note(encoder, subset, side, device, epochs, finetune, seed, view, rate):
        seen.append((len(subset.labelled), epochs, view))
        return 0.5

    monkeypatch.setattr(photos, "train_head", note)
    photos.Measure((3, 4, 5)).learned("scratch", torch.nn.Module(), vars(lab(config)), dataset, 0.1, steps=12)
    assert [epochs for _, epochs, _ in seen] == [3 + 12, 4 + 12, 5 + 12], "epochs of one step each"
    assert seen[0][0] == len(dataset.labelled) > seen[1][0] >= seen[2][0]
    assert {view for *_, view in seen} == {config.size}


def test_the_figures_without_labels_are_set_against_both_accuracies(tiny, titles, tmp_path):
    config = lab(tiny(epochs=1))
    final = quality.measure(read_checkpoint(train(config)["out"]), load_dataset(config))
    assert {"linear", "knn", "recovered", "recovered_same", "rank"} == set(final)
    runs = invented(quality, seeds=(0,))
    for i, run in enumerate(runs):  # recovered orders the runs as the probe does, the rank the other way round
        run["final"] |= {"linear": 0.3 + 0.01 * i, "recovered": 0.1 + 0.02 * i, "recovered_same": 0.5, "rank": 50.0 - i}
        run["final"]["recovered_same"] += 0.01 * (i % 2)
    quality.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "recovered, own views +1.00" in titles[0] and "effective rank -1.00" in titles[0]
    lines = quality.table(runs).splitlines()
    assert len(lines) == 2 + len(runs) + 3 + 2 * 3 and lines[-2].startswith("| photos | linear probe | +1.00 |")


def test_runs_with_equal_figures_have_equal_ranks():
    runs = [{"final": {"rank": a, "knn": b}} for a, b in ((0.1, 1.0), (0.3, 3.0), (0.3, 2.0), (0.7, 4.0))]
    assert quality.agreement(runs, "rank", "knn") == pytest.approx(0.9487, abs=1e-4)  # ranks 1, 2.5, 2.5, 4
    assert quality.agreement(runs[::-1], "rank", "knn") == quality.agreement(runs, "rank", "knn")


def test_settings_for_photographs_are_judged_without_the_test_images(tiny, tmp_path):
    config = lab(tiny(epochs=1))
    checkpoint, dataset = read_checkpoint(train(config)["out"]), load_dataset(config)
    dataset.test = None
    final = photo_settings.measure(checkpoint, dataset, folds=3)
    assert final.pop("folds") == 3, "which keeps other studies from taking these accuracies for those on test images"
    assert set(final) == {"linear", "knn"} and all(0 < value <= 1 for value in final.values())
    lines = photo_settings.table(invented(photo_settings, seeds=(0,))).splitlines()
    assert len(lines) == 2 + len(photo_settings.TRIALS) and lines[2].endswith("| 45.0 | 40.0 | 800 | 1 |")
