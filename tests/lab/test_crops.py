"""View sampling: which crops there are, what they weigh, and that a step is their weighted sum."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from invented import base, invented

from bank import MemoryBank
from data import Augment
from figures import sweep as sweeper
from lab import crops as views
from lab.backbones import build_backbone
from lab.crops import VIEWS
from lab.large_bank import Streamed
from lab.studies import sslight, sslight_lr, sslight_short
from lab.train import LabConfig, build, train
from loss import nce, sqrt_kl
from models import Encoder
from plumbing import shapes
from plumbing.command_line import UserError
from plumbing.image_ops import solarize
from plumbing.runs import read_checkpoint
from train import Pretraining, load_dataset

CPU = torch.device("cpu")
MANY = [name for name in VIEWS if name != "single"]
PAIRED = ("simclr", "moco", "dino", "swav")


def pixels(batch=16, side=16):
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "name, sizes, shares",
    [
        ("single", [224], [1]),
        ("twice", [224] * 2, [1 / 2] * 2),
        ("multicrop", [224] * 2 + [96] * 6, [1 / 8] * 8),
        ("sslight", [224] * 2 + [128] * 6, [0.2] * 2 + [0.1] * 6),
    ],
)
def test_the_crops_are_those_of_the_papers(name, sizes, shares):
    chosen = views.crops(LabConfig(views=name, size=224))
    assert [crop.augment.size for crop in chosen] == sizes
    assert [crop.weight for crop in chosen] == pytest.approx(shares)
    assert [crop.local for crop in chosen] == [size < 224 for size in sizes]
    scales = {
        "multicrop": [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6,
        "sslight": [(0.3, 1.0)] * 2 + [(0.05, 0.3)] * 6,
    }.get(name, [(0.2, 1.0)] * len(chosen))
    assert [crop.augment.scale for crop in chosen] == scales
    own = name in views.SAMPLINGS
    assert [crop.augment.solarize_p for crop in chosen] == ([0, 0.2] + [0] * 6 if own else [0] * len(chosen))
    assert [crop.augment.blur_p for crop in chosen] == ([1.0, 0.1] + [0.5] * 6 if own else [0] * len(chosen))


@pytest.mark.parametrize("name", views.SAMPLINGS)
def test_small_images_are_not_blurred_unless_blur_says_so_for_all(name):
    assert {crop.augment.blur_p for crop in views.crops(LabConfig(views=name, size=64))} == {0.0}
    for size in (32, 224):
        assert {crop.augment.blur_p for crop in views.crops(LabConfig(views=name, size=size, blur=0.3))} == {0.3}


@pytest.mark.parametrize("arch, unit", [("resnet18", lambda size: 2), ("vit_tiny", lambda size: max(1, size // 8))])
@pytest.mark.parametrize("name", views.SAMPLINGS)
def test_local_crops_are_near_their_share_of_the_side_and_fit_the_network(arch, unit, name):
    for size in (8, 16, 24, 32, 48, 64):
        side = views.crops(LabConfig(arch=arch, views=name, size=size))[-1].augment.size
        assert side % unit(size) == 0 and side > 0
        assert abs(side - size * views.SAMPLINGS[name][4]) <= unit(size) / 2 + 1e-9


@pytest.mark.parametrize("name, among", [("twice", 1.0), ("multicrop", 2 / 14), ("sslight", 0.4)])
def test_pairs_have_their_weights(name, among):
    weights = views.pairs(LabConfig(views=name))
    locals_ = 0 if name == "twice" else 6
    assert len(weights) == 2 + 2 * locals_ and sum(weights.values()) == pytest.approx(1)
    assert all(i != j and j < 2 for i, j in weights)
    assert sum(w for (i, _), w in weights.items() if i < 2) == pytest.approx(among)
    assert len({round(w, 9) for (i, _), w in weights.items() if i >= 2}) == bool(locals_)
    assert views.pairs(LabConfig()) == {}


def test_solarize_equals_torchvision():
    image = pixels(4)
    ours = solarize(image.float() / 255)
    for solarised, x in zip(ours, image):
        torch.testing.assert_close(solarised, tv.solarize(x, 128).float() / 255)


def test_an_augmentation_solarises_its_share_of_the_images():
    still, image = dict(size=16, scale=(1, 1), ratio=(1, 1), jitter_p=0, gray_p=0, flip_p=0), pixels(400)
    same, turned = (Augment(**still)(x) for x in (image, tv.solarize(image, 128)))
    augmented = Augment(**still, solarize_p=0.2)(image)
    is_same, is_turned = (((augmented - x).abs() < 1e-4).flatten(1).all(1) for x in (same, turned))
    assert (is_same ^ is_turned).all() and 50 < is_turned.sum() < 110


# --------------------------------------------------------------------------------- one pass a size


def test_crops_of_one_size_pass_the_network_as_one_batch():
    seen = []

    def network(x):
        seen.append(tuple(x.shape))
        return x.mean((2, 3))

    crops = [torch.randn(4, 3, side, side) for side in (8, 8, 6, 6, 6)]
    torch.testing.assert_close(views.through(network, crops), torch.cat([crop.mean((2, 3)) for crop in crops]))
    assert seen == [(8, 3, 8, 8), (12, 3, 6, 6)]


@pytest.mark.parametrize("name, passes", [("single", 1), ("twice", 1), ("multicrop", 2), ("sslight", 2)])
def test_a_step_has_a_pass_a_size_and_the_bank_starts_from_one_global_crop(lab_config, name, passes):
    run, seen = build(lab_config(views=name), 96, CPU), []
    forward = run.encoder.forward
    run.encoder.forward = lambda x: (seen.append(x.shape), forward(x))[1]
    run.step(pixels(), torch.arange(16), 0.01)
    assert len(seen) == passes and sum(shape[0] for shape in seen) == 16 * len(views.crops(run.config))
    seen.clear()
    run.enter(load_dataset(lab_config()).train, torch.arange(96))
    assert {shape[1:] for shape in seen} == {(3, 16, 16)} and sum(shape[0] for shape in seen) == 96
    assert run.augment == views.crops(run.config)[0].augment


# ---------------------------------------------------------------------------------------- the step


def test_a_single_view_is_the_step_of_the_core(lab_config):
    assert type(build(lab_config(), 96, CPU)).__mro__[1] is Pretraining
    assert type(build(lab_config(views="twice"), 96, CPU)).__mro__[1:3] == (views.Crops, Pretraining)


@pytest.mark.parametrize("rule", ["corrected", "npid"])
@pytest.mark.parametrize("name", MANY)
def test_losses_and_bank_are_the_weighted_sums_over_crops(lab_config, name, rule):
    config = lab_config(
        views=name, lam=2.0, temperature=0.1, weight_decay=0.0, optimizer="sgd", sgd_momentum=0.0, bank_update=rule
    )
    run, twin = build(config, 96, CPU), build(config, 96, CPU)
    images, index = pixels(), torch.arange(16) * 3
    torch.manual_seed(5)
    loss, l_nce, l_kl = run.step(images, index, 0.1)

    torch.manual_seed(5)
    old, crops = twin.bank.weight.clone(), views.crops(config)
    drawn = [crop.augment(images) for crop in crops]
    sides = sorted({x.shape[-1] for x in drawn}, reverse=True)
    z = torch.cat([twin.encoder(torch.cat([x for x in drawn if x.shape[-1] == side])) for side in sides])
    moves, totals = torch.zeros_like(old), [0, 0]
    for crop, z_v in zip(crops, z.split(16)):
        s = z_v @ old.T
        totals = [totals[0] + crop.weight * nce(s, index, 0.1), totals[1] + crop.weight * sqrt_kl(s)]
        pull = F.one_hot(index, 96).float()
        if rule == "corrected":
            pull = pull - (s / 0.1).softmax(1)
        moves += (crop.weight * pull.T @ z_v).detach()
    torch.testing.assert_close(torch.stack([l_nce, l_kl]), torch.stack(totals).detach())
    torch.testing.assert_close(loss, l_nce + 2 * l_kl)
    (totals[0] + 2 * totals[1]).backward()
    for ours, theirs in zip(run.encoder.parameters(), twin.encoder.parameters()):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.bank.weight, F.normalize(0.9 * old + 0.1 * moves, dim=1), rtol=1e-4, atol=1e-5)


def test_equal_views_of_the_bank_s_update_count_as_one():
    bank, twin = (MemoryBank(12, 5, 0.7) for _ in range(2))
    twin.weight.copy_(bank.weight)
    z, index = F.normalize(torch.randn(4, 5), dim=1), torch.tensor([0, 3, 7, 9])
    bank.update(z, index)
    twin.update(z.repeat(3, 1), index.repeat(3), weight=torch.tensor([0.5, 0.2, 0.3]).repeat_interleave(4))
    torch.testing.assert_close(twin.weight, bank.weight)


@pytest.mark.parametrize("options", [{}, {"lam": 5.0, "kl_temperature": 0.1}])
def test_streamed_views_are_the_plain_ones_but_for_rounding(lab_config, options):
    runs = [build(lab_config(views="sslight", similarity_gb=gb, **options), 96, CPU) for gb in (1.0, 1e-9)]
    assert [isinstance(run, Streamed) for run in runs] == [False, True]
    images, losses = pixels(), []
    for run in runs:
        torch.manual_seed(1)
        losses.append(run.step(images, torch.arange(16), 0.01))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0].bank.weight, runs[1].bank.weight, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------- whole runs and others


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize(
    "options", [{"method": name} for name in ("ours", *PAIRED)] + [{"arch": "vit_tiny", "width": 24}], ids=str
)
def test_every_view_sampling_runs_to_the_end(lab_config, name, options):
    result = train(lab_config(epochs=1, views=name, **options))
    assert result["epoch"] == 1 and 0 <= result["knn"] <= 1


def test_views_learn(lab_config):
    result = train(lab_config(epochs=6, lr=0.05, views="multicrop"))
    losses = [row["nce"] for row in read_checkpoint(result["out"])["history"]]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cutmix": 0.5}, "--cutmix mixes single views: leave it out or --views sslight"),
        ({"method": "byol"}, "--views sslight: not with --method byol, but with ours, simclr, moco, dino, swav"),
        ({"method": "mocov2"}, "--views sslight: not with --method mocov2"),
        ({"shard_bank": True, "negatives": 20}, "--shard-bank reads all rows where they lie: --negatives 0"),
    ],
    ids=str,
)
def test_what_views_do_not_go_with_is_one_line(lab_config, options, message):
    config = lab_config(views="sslight", **options)
    with pytest.raises(UserError) as caught:
        train(config)
    assert message in str(caught.value) and not config.folder().exists()
    with pytest.raises(UserError, match="--views: unknown 'many', choose from single, twice, multicrop, sslight"):
        lab_config(views="many").check()


def method(name):
    baselines = pytest.importorskip("lab.baselines", exc_type=UserError)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.ReLU())
    return baselines.METHODS[name](network, 32).eval()


def cross_entropy(share, logits):
    """Of shares (B, K) and logits (B, K), the mean over the batch."""
    return -(share * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def simclr_loss(model, view, other):
    z = F.normalize(torch.cat([model.online(view), model.online(other)]), dim=1)
    logits = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return cross_entropy(torch.eye(len(z)).roll(len(view), 0), logits)


def moco_loss(model, view, other):
    z, key = F.normalize(model.online(view), dim=1), F.normalize(model.target(other), dim=1)
    logits = torch.cat([(z * key).sum(1, keepdim=True), z @ model.criterion.criterion.memory_bank.bank.T], 1)
    return cross_entropy(F.one_hot(torch.zeros(len(z), dtype=torch.long), logits.shape[1]), logits / 0.1)


def dino_loss(model, view, other):
    teacher = torch.softmax((model.target(other) - model.criterion.criterion.center.squeeze()) / 0.04, 1)
    return cross_entropy(teacher, model.online(view) / 0.1)


def swav_loss(model, view, other):
    def scores(x):
        (prototypes,) = model.prototypes.heads
        return F.normalize(model.head(model.backbone(x)), dim=1) @ prototypes.weight.T + prototypes.bias

    share = torch.exp(scores(other).detach() / 0.05)  # (B, K)
    for _ in range(3):  # prototypes have equal shares of the batch, then each view a share of 1
        share = share / share.sum(0)
        share = share / share.sum(1, keepdim=True)
    return cross_entropy(share, scores(view) / 0.1)


WEIGHTS = {name: views.pairs(LabConfig(views=name)) for name in MANY}
WEIGHTS["uneven"] = {(i, j): 1.0 + i + 2 * j for i in range(5) for j in range(2) if i != j}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", PAIRED)
def test_a_two_branch_loss_is_the_weighted_sum_over_pairs(name, weights):
    """Against a loss written out in this file, pair by pair, with queue and centre as they were."""
    model, weights = method(name), WEIGHTS[weights]
    drawn = [torch.randn(8, 3, 4, 4) for _ in range(1 + max(i for i, _ in weights))]
    if name == "dino":
        model.criterion.criterion.center.normal_()
    if name == "moco":
        model.criterion.criterion.memory_bank(torch.zeros(1, 128))  # which makes the queue
    loss = globals()[f"{name}_loss"]
    expected = sum(weight * loss(model, drawn[i], drawn[j]) for (i, j), weight in weights.items())
    expected.backward()
    gradients = [p.grad.clone() for p in model.backbone.parameters()]
    model.zero_grad()
    total = model.of_pairs(drawn, weights)
    torch.testing.assert_close(total, expected)
    total.backward()
    for p, gradient in zip(model.backbone.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_pairs_that_count_alike_have_lightly_s_own_multi_crop_loss():
    drawn, weights = [torch.randn(8, 3, 4, 4) for _ in range(8)], WEIGHTS["multicrop"]
    model = method("dino")
    student, teacher = [model.online(x) for x in drawn], [model.target(x) for x in drawn[:2]]
    of_pairs = model.of_pairs(drawn, weights)
    moved = model.criterion.criterion.center.clone()
    model.criterion.criterion.center.zero_()
    torch.testing.assert_close(of_pairs, model.criterion(teacher, student))
    torch.testing.assert_close(moved, model.criterion.criterion.center)
    model = method("swav")
    scores = [model.online(x) for x in drawn]
    torch.testing.assert_close(model.of_pairs(drawn, weights), model.criterion(scores[:2], scores[2:])[0])


@pytest.mark.parametrize("name", PAIRED)
def test_two_views_have_the_loss_of_their_pairs(name):
    """In MoCo the keys of both views enter the queue after both losses."""
    model, drawn = method(name), [torch.randn(8, 3, 4, 4) for _ in range(2)]
    if name == "moco":
        queue = model.criterion.criterion.memory_bank
        queue(torch.zeros(1, 128))
        before = queue.bank.clone()
    of_pairs = model.of_pairs(drawn, WEIGHTS["twice"])
    if name == "dino":
        model.criterion.criterion.center.zero_()
    if name == "moco":
        queue.bank.copy_(before), queue.bank_ptr.zero_()
    torch.testing.assert_close(of_pairs, model(*drawn))


def test_every_global_crop_enters_the_queue_once_and_local_ones_never():
    model, drawn = method("moco"), [torch.randn(8, 3, 4, 4) for _ in range(5)]
    queue = model.criterion.criterion.memory_bank
    queue(torch.zeros(1, 128))
    before = queue.bank.clone()
    model.of_pairs(drawn, WEIGHTS["uneven"])
    torch.testing.assert_close(queue.bank[:16], F.normalize(model.target(torch.cat(drawn[:2])), dim=1))
    assert torch.equal(queue.bank[16:], before[16:])


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_local_crops_go_through_the_student_only(lab_config, name):
    run, seen = build(lab_config(views="multicrop", method=name), 96, CPU), []
    run.model.teacher.register_forward_pre_hook(lambda _, x: seen.append(("teacher", *x[0].shape)))
    run.model.backbone.register_forward_pre_hook(lambda _, x: seen.append(("student", *x[0].shape)))
    before = [p.clone() for p in run.encoder.backbone.parameters()]
    (loss,) = run.step(pixels(), torch.arange(16), 0.1)
    assert torch.isfinite(loss)
    assert seen == [("student", 32, 3, 16, 16), ("student", 96, 3, 6, 6), ("teacher", 32, 3, 16, 16)]
    assert not all(torch.equal(a, b) for a, b in zip(before, run.encoder.backbone.parameters()))


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_a_loss_over_pairs_falls_on_shapes(lab_config, name):
    config = lab_config(method=name, views="sslight", optimizer="muon", lr=0.05, weight_decay=0.0)
    run = build(config, 96, CPU)
    images, losses = torch.from_numpy(shapes.draw(96, 0, size=16)[0]), []
    for step in range(40):
        losses.append(run.step(images[step % 3 * 32 :][:32], torch.arange(32), 0.05).item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


# ---------------------------------------------------------------------------------------- vit_tiny


def test_vit_tiny_takes_other_sizes_and_is_torchvisions_at_its_own():
    net = build_backbone("vit_tiny", 16, 24).eval()
    torch.nn.init.normal_(net.encoder.pos_embedding)
    x = torch.randn(2, 3, 16, 16)
    for side in (6, 10, 24):
        assert net(torch.randn(2, 3, side, side)).shape == (2, 24)
    own, forward = net(x), type(net).__mro__[1].forward
    torch.testing.assert_close(own, forward(net, x))
    net.image_size = 8  # now 16 is another size than its own, to which a grid of 4 x 4 has to be enlarged
    grid = torch.randn(1, 4, 4, 24)
    token = net.encoder.pos_embedding[:, :1]
    net.encoder.pos_embedding = torch.nn.Parameter(torch.cat([token, grid.flatten(1, 2)], 1))
    enlarged = F.interpolate(grid.permute(0, 3, 1, 2), (8, 8), mode="bicubic").flatten(2).transpose(1, 2)
    other = net(x)
    net.image_size, net.encoder.pos_embedding = 16, torch.nn.Parameter(torch.cat([token, enlarged], 1))
    torch.testing.assert_close(other, net(x))


def test_the_position_embeddings_learn_from_local_crops():
    encoder = Encoder(build_backbone("vit_tiny", 16, 24), 16, dim=8, hidden=8)
    encoder(torch.randn(4, 3, 10, 10)).sum().backward()
    assert encoder.backbone.encoder.pos_embedding.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------- the figure


@pytest.mark.parametrize("script", [sslight, sslight_short], ids=lambda script: script.__name__)
@pytest.mark.parametrize("scale", sweeper.SCALES)
def test_every_point_of_the_figures_can_be_run(script, scale):
    points = script.points(base(scale), scale)
    for config in points.values():
        config.check()
    distinct = {sweeper.identity(asdict(config), 0) for config in points.values()}
    cells = 12 * len(sslight_short.BACKBONES[scale]) if script is sslight_short else len(points)
    assert len(distinct) == len(points) == cells


def test_the_figure_has_five_methods_three_samplings_and_two_thousand_steps():
    points = sslight.points(base("cpu"))
    assert len(points) == 3 * (5 + 1) and {config.method for config in points.values()} == set(sslight.METHODS)
    for config in points.values():
        assert config.epochs * (config.subset // config.batch_size) >= 2000 and config.optimizer == "muon"
        assert config.lr == pytest.approx(LabConfig.lr * (config.batch_size / LabConfig.batch_size) ** 0.5, abs=1e-4)


def test_the_longer_single_views_of_the_short_study_take_as_much_arithmetic():
    points = sslight_short.points(base("cpu"))
    for name, config in points.items():
        if name.endswith(": SSLight"):
            single = points[name.replace("SSLight", sslight_short.LONGER)]
            assert single.views == "single" and single.epochs > config.epochs
            assert abs(single.epochs * sslight.work(single) / sslight.work(config) - config.epochs) < 0.5


def test_the_search_of_learning_rates_changes_nothing_else_and_uses_held_out_images():
    points, of_figure = sslight_lr.points(base("cpu")), sslight_short.points(base("cpu"))
    assert len(points) == 3 * 5 and all(config.holdout == 4000 for config in points.values())
    for name, config in points.items():
        method, sampling, lr = name.rsplit(", ", 2)
        shown = of_figure[f"resnet18, {method}: {sampling}"]
        assert replace(config, lr=shown.lr, holdout=0) == shown
        assert float(lr.removeprefix("lr ")) == pytest.approx(config.lr)


def test_the_arithmetic_of_a_step_counts_every_pass():
    one = LabConfig(arch="resnet18", size=24, width=16)
    whole, local = (sslight.multiply_adds("resnet18", 24, 16, side) for side in (24, 14))
    assert sslight.work(one) == 3 * whole
    assert sslight.work(replace(one, views="sslight")) == 3 * (2 * whole + 6 * local)
    assert sslight.work(replace(one, method="simclr")) == 6 * whole
    assert sslight.work(replace(one, method="moco", views="sslight")) == 8 * whole + 18 * local
    assert sslight.work(replace(one, method="dino", views="twice")) == 8 * whole
    assert sslight.multiply_adds("resnet18", 32, 64, 32) == pytest.approx(555.4e6, rel=1e-3)
    layer = 12 * 192**2 * 65 + 2 * 65**2 * 192  # of vit_tiny, for 65 tokens
    assert sslight.multiply_adds("vit_tiny", 32, 0, 32) == pytest.approx(12 * layer + 64 * 192 * 48, rel=0.01)


@pytest.mark.parametrize("script", [sslight, sslight_short], ids=lambda script: script.__name__)
def test_view_sampling_is_drawn_and_tabulated(script, tmp_path):
    better = ["resnet18, ours: SSLight", "resnet18, SimCLR: multi-crop"]
    runs = invented(script, better=better)
    for run in runs:
        run["final"] |= {"linear_1": 0.2, "linear_10": 0.3}
    sslight.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    first, pairs = list(script.SAMPLINGS)[0], len(runs) // 3 // len(script.SAMPLINGS)
    assert f"less {first} +{10 / pairs:.1f} (ahead in 1 of {pairs})\n" in sslight.title(runs)
    assert f"multi-crop +0.0 (ahead in 1 of {pairs})" in sslight.title(runs)
    lines = sslight.table(runs).splitlines()
    assert len(lines) == 2 + pairs
    line = next(line for line in lines if line.startswith("| resnet18, SimCLR | "))
    column = 1 + list(script.SAMPLINGS).index("multi-crop")
    assert line.split(" | ")[column] == "56.0 ± 1.0 / 30.0 ± 0.0 / 20.0 ± 0.0", "linear, 10 % and 1 % of the labels"
    costs = [float(word) for word in line.split(" | ")[-1].strip(" |").split(" / ")]
    assert costs[0] == 1 and all(cost > 1.5 for cost in costs[1:])


def test_a_run_of_the_figure_has_what_it_needs(lab_config, tmp_path, forked_sweep):
    points = {"resnet10, ours: SSLight": lab_config(epochs=1, views="sslight")}
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, measure=sslight.measure)
    assert {"linear", "knn", "linear_1", "linear_10"} <= runs[0]["final"].keys()
