"""A step of every composed learner against the same step written out in one function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from processes import group

from data import Batch, cutmix
from lab import crops, ranks
from lab.backbones import encoder_of
from lab.train import LabConfig, build

CPU = torch.device("cpu")
N, B, LR = 60, 16, 0.005
BASE = dict(
    negatives=0, window=0, optimizer="sgd", width=8, size=16, dim=16, hidden=32, batch_size=B, temperature=0.1,
    device="cpu", precision="fp32",
)  # fmt: skip
KL, STREAMED, NPID = dict(lam=5.0, kl_temperature=0.1), dict(similarity_gb=1e-9), dict(bank_update="npid")
SETTINGS = {
    "plain": {},
    "sampled": dict(negatives=20),
    "SqrtKL": dict(lam=20.0),
    "SqrtKL, tau": KL,
    "CutMix": dict(cutmix=0.5),
    "as released": dict(cutmix=0.5, negatives=20, lam=20.0, **NPID),
    "NPID": NPID,
    "streamed": STREAMED | KL,
    "streamed NPID": STREAMED | NPID,
    "twice": dict(views="twice"),
    "crops": dict(views="sslight", **KL),
    "crops sampled": dict(views="multicrop", negatives=20, **KL),
    "crops NPID": dict(views="sslight", **NPID),
    "crops streamed": dict(views="sslight", **STREAMED, **KL),
    "sharded": dict(shard_bank=True, **KL),
    "sharded NPID": dict(shard_bank=True, **NPID),
    "crops sharded": dict(views="sslight", shard_bank=True, **KL),
}


def reference_step(encoder, rows, optimizer, config, pixels, index):
    """One step: its losses, and the rows (N, D) after it. Every crop is classified on its own."""
    augments, omega = zip(*((crop.augment, crop.weight) for crop in crops.crops(config)))
    views = [augment(pixels) for augment in augments]
    partner = share = None
    if config.cutmix:
        mixed = cutmix(Batch(views[0], index), config.cutmix)
        views, partner, share = [mixed.views], mixed.partner, mixed.share
    columns, target = torch.arange(N), F.one_hot(index, N).float()
    if config.negatives:
        own, keys = index.sort().values, torch.rand(N)
        keys[own] = 2.0
        columns = torch.cat([own, keys.topk(config.negatives, largest=False).indices])
    target = target[:, columns]  # (B, M)
    if partner is not None:
        target = share[:, None] * target + (1 - share[:, None]) * target[partner]

    sides = sorted({view.shape[-1] for view in views}, reverse=True)
    z = torch.cat([encoder(torch.cat([view for view in views if view.shape[-1] == side])) for side in sides])
    l_nce, l_kl, push = 0, torch.zeros(()), torch.zeros_like(rows)
    for weight, z_v in zip(omega, z.chunk(len(views))):
        s = z_v @ rows[columns].T  # (B, M)
        log_p = (s / config.temperature).log_softmax(1)
        l_nce = l_nce - weight * (target * log_p).sum(1).mean()
        if config.lam:
            p = (s / config.kl_temperature).softmax(1)
            u = p.sqrt() / p.sqrt().sum(1, keepdim=True)
            l_kl = l_kl + weight * (p * (p.log() - u.detach().log())).sum(1).mean()
        if config.bank_update == "npid":
            push += weight * F.one_hot(index, N).float().T @ z_v.detach()
        else:
            push[columns] += weight * (target - log_p.exp()).detach().T @ z_v.detach()
    loss = l_nce + config.lam * l_kl
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    m, moved = config.bank_momentum, torch.arange(N)[push.any(1)]
    after = rows.clone()
    after[moved] = F.normalize(m * rows[moved] + (1 - m) * push[moved], dim=1)
    return torch.stack([loss, l_nce, l_kl]).detach(), after


def start(name):
    """Settings, an encoder, rows of a bank, images and their indices: always the same."""
    config = LabConfig(**(BASE | SETTINGS[name]))
    encoder = encoder_of(vars(config)).to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(7)
    rows = F.normalize(torch.randn(N, config.dim, generator=generator), dim=1)
    pixels = torch.randint(256, (B, 3, 24, 24), dtype=torch.uint8, generator=generator)
    return config, encoder, rows, pixels, torch.randperm(N, generator=generator)[:B]


def sgd(encoder, config, lr=LR):
    return torch.optim.SGD(encoder.parameters(), lr, config.sgd_momentum, weight_decay=config.weight_decay)


def assert_equal(losses, rows, encoder, expected):
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, expected[1], rtol=0, atol=1e-5)
    for name, weight in expected[2].items():
        torch.testing.assert_close(encoder[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_the_step_written_out(name):
    """Three steps, each from equal weights, bank and momentum, since rounding grows with each."""
    config, encoder, rows, pixels, index = start(name)
    run, optimizer = build(config, N, CPU), sgd(encoder, config)
    run.encoder.train()
    for step in range(3):
        run.encoder.load_state_dict(encoder.state_dict())
        run.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run.bank.load_state_dict({"weight": rows})
        torch.manual_seed(step)
        losses = run.step(pixels, index, LR)
        torch.manual_seed(step)
        expected, after = reference_step(encoder, rows, optimizer, config, pixels, index)
        assert (after - rows).abs().max() > 0.01, "the bank moves"
        rows = after
        assert_equal(losses, run.bank.weight, run.encoder.state_dict(), (expected, rows, encoder.state_dict()))
        index = (index + 1) % N


def step_of_a_process(name):
    """The first step in this process of a group: losses, the whole bank, the encoder."""
    config, _, rows, pixels, index = start(name)
    run = build(config, N, CPU)
    run.encoder.train()
    run.bank.load_state_dict({"weight": rows})
    torch.manual_seed(0)
    losses = run.step(pixels, index, LR)
    weight = run.bank.weight
    return losses, ranks.collect(weight, N) if config.shard_bank else weight, run.encoder.state_dict()


def test_a_step_of_two_processes_is_the_step_written_out(tmp_path):
    def steps(_):
        ranks.start(CPU)
        results = {name: step_of_a_process(name) for name in SETTINGS}
        if ranks.first():
            torch.save(results, tmp_path / "x.pt")
        ranks.stop()

    with group(steps) as processes:
        for process in processes:
            status, _, error = process.ended()
            assert status == 0, error
    results = torch.load(tmp_path / "x.pt", weights_only=True)
    for name in SETTINGS:
        config, encoder, rows, pixels, index = start(name)
        torch.manual_seed(0)
        losses, after = reference_step(encoder, rows, sgd(encoder, config), config, pixels, index)
        try:
            assert_equal(*results[name], (losses, after, encoder.state_dict()))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
