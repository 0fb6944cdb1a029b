"""Large banks: in chunks, in bf16 or split, they give what the plain bank and the losses give."""

import pytest
import torch
from torch.nn.functional import normalize

from bank import MemoryBank
from lab import ranks
from lab.large_bank import LargeBank, Streamed, large_bank, streaming_loss, streaming_losses
from lab.train import build, streams, train
from loss import nce, sqrt_kl
from plumbing.command_line import UserError
from plumbing.runs import read_checkpoint
from train import Pretraining

N, D, B = 20, 6, 5
CPU = torch.device("cpu")


def unit(rows, dim, seed=0):
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    z, weight = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (5, 41))
    index = torch.tensor([3, 40, 3, 0, 17])  # one image twice, the first row and the last
    return normalize(z, dim=1).requires_grad_(), normalize(weight, dim=1), index


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("chunk", [1, 7, 41, 8192])
@pytest.mark.parametrize("tau, lam, t", [(0.07, 0.0, 1.0), (0.07, 20.0, 1.0), (0.2, 3.0, 0.2), (0.005, 1.0, 0.003)])
def test_streaming_equals_the_plain_path_in_value_and_gradient(rows, chunk, tau, lam, t):
    z, weight, index = rows
    similarity = z @ weight.T
    whole = nce(similarity, index, tau) + lam * sqrt_kl(similarity, t)
    streamed = streaming_loss(z, weight, index, tau, lam, t, chunk)
    torch.testing.assert_close(streamed, whole, rtol=1e-10, atol=1e-10)
    (expected,) = torch.autograd.grad(whole, z)
    (got,) = torch.autograd.grad(3 * streamed, z)
    torch.testing.assert_close(got, 3 * expected, rtol=1e-10, atol=1e-10)


def test_streaming_weighs_views_like_the_plain_losses(rows):
    z, weight, index = rows
    omega, similarity = torch.rand(5, dtype=torch.float64), z @ weight.T
    whole = nce(similarity, index, 0.1, omega) + 3 * sqrt_kl(similarity, 0.2, weight=omega)
    l_nce, l_kl, _ = streaming_losses(z, weight, index, 0.1, 0.2, 8, omega=omega)
    torch.testing.assert_close(l_nce + 3 * l_kl, whole)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (whole, l_nce + 3 * l_kl)]
    torch.testing.assert_close(*gradients)


def test_streaming_gives_both_losses_and_the_normaliser(rows):
    z, weight, index = rows
    similarity = z @ weight.T
    l_nce, l_kl, log_total = streaming_losses(z, weight, index, 0.1, 0.5, chunk=8)
    torch.testing.assert_close(l_nce, nce(similarity, index, 0.1))
    torch.testing.assert_close(l_kl, sqrt_kl(similarity, 0.5))
    torch.testing.assert_close(log_total, (similarity / 0.1).logsumexp(1))
    assert not log_total.requires_grad
    assert streaming_losses(z, weight, index, 0.1, None)[1] == 0


def test_streaming_holds_no_matrix_over_the_bank():
    z, weight = (normalize(torch.randn(n, 4), dim=1) for n in (8, 5000))
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(x.numel() for x in results if isinstance(x, torch.Tensor) and x._base is None)
            return out

    with Recorder():
        streaming_loss(z.requires_grad_(), weight, torch.arange(8), 0.1, 1.0, chunk=100).backward()
    assert max(size for size in sizes if size != weight.numel()) <= 8 * 100


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 8), (0.1, 0.0, 8), (0.1, 1.0, 0)])
def test_streaming_refuses_what_is_not_positive(rows, numbers):
    tau, t, chunk = numbers
    with pytest.raises(ValueError):
        streaming_loss(*rows, tau, 1.0, t, chunk)


# --------------------------------------------------------------------------------------- the bank


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 6, 20, 8192])
def test_the_streamed_update_equals_the_plain_one(chunk, weighted):
    whole, streamed = (kind(N, D, 0.6, temperature=0.1).double() for kind in (MemoryBank, LargeBank))
    whole.weight.copy_(streamed.weight)
    z, index = unit(B, D).double(), torch.tensor([3, 19, 3, 0, 11])
    weight = torch.rand(B, dtype=torch.float64) if weighted else None
    log_total = streaming_losses(z, streamed.weight, index, 0.1, None, chunk)[2]
    whole.update(z, index, weight=weight)
    streamed.update(z, index, weight=weight, log_total=log_total, chunk=chunk)
    torch.testing.assert_close(streamed.weight, whole.weight, rtol=0, atol=1e-10)


def test_a_row_that_would_become_zero_stays_as_it_was():
    bank = LargeBank(N, D, 0.5)
    before, log_total = bank.weight.clone(), torch.full((1,), 200.0)  # P is zero: the row cancels against its z
    bank.update(-bank.weight[:1], torch.tensor([0]), log_total=log_total)
    torch.testing.assert_close(bank.weight, before)


@pytest.mark.parametrize("rule", ["corrected", "npid"])
@pytest.mark.parametrize("way", ["whole", "sampled", "streamed"])
def test_a_bank_in_bf16_moves_as_one_in_float32_but_for_its_rounding(rule, way):
    half, full = (LargeBank(N, D, 0.5, rule, 0.1, dtype) for dtype in (torch.bfloat16, torch.float32))
    full.weight.copy_(half.weight)
    before, z, index = half.weight.clone(), unit(B, D, seed=1), torch.arange(B)
    columns = half.sample(index, 4) if way == "sampled" else None
    for bank in (half, full):
        s = bank.similarity(z, columns)
        assert s.dtype == torch.float32
        bank.update(z, index, s, columns, log_total=(s / 0.1).logsumexp(1) if way == "streamed" else None, chunk=7)
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.float(), full.weight, rtol=2**-7, atol=1e-6)  # one step of bf16
    assert (half.weight[:B] != before[:B]).any(1).all()


def test_steps_too_small_for_bf16_count_on_average():
    """A row that moves by a tenth of what bf16 can tell still arrives; rounding would stop it."""
    bank = LargeBank(1, 512, 0.9995, "npid", dtype=torch.bfloat16)
    start, goal = bank.weight.float().clone(), unit(1, 512, seed=1)
    exact = MemoryBank(1, 512, 0.9995, "npid")
    exact.weight.copy_(start)
    for _ in range(1000):
        bank.update(goal, torch.zeros(1, dtype=torch.long))
        exact.update(goal, torch.zeros(1, dtype=torch.long))
    moved, owed = (float((w.float() * goal).sum() - (start * goal).sum()) for w in (bank.weight, exact.weight))
    assert owed > 0.2 and moved == pytest.approx(owed, rel=0.1)


SHARES = (range(0, 7), range(7, 14), range(14, 20))


def banks_of_shares(**options):
    """The shares of a bank, and the bank as a whole: from the same seed."""
    for rows in (*SHARES, None):
        torch.manual_seed(5)
        yield LargeBank(N, D, 0.6, temperature=0.1, rows=rows, **options)


def test_shares_of_a_random_bank_are_those_of_the_whole_bank():
    *shares, whole = banks_of_shares()
    torch.manual_seed(5)
    assert torch.equal(torch.cat([share.weight for share in shares]), whole.weight)
    assert torch.equal(MemoryBank(N, D).weight, whole.weight)


@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_every_share_moves_as_in_the_whole_bank(rule):
    *shares, whole = banks_of_shares(rule=rule)
    z, index = unit(B, D), torch.tensor([3, 19, 3, 0, 11])
    log_total = (whole.similarity(z) / 0.1).logsumexp(1)
    for bank in (*shares, whole):
        bank.update(z, index, log_total=log_total)
    torch.testing.assert_close(torch.cat([share.weight for share in shares]), whole.weight)


def test_shares_are_filled_by_the_forward_pass_and_loaded_from_the_whole_bank():
    *shares, whole = banks_of_shares()
    batches = [(torch.randn(10, D), torch.arange(start, start + 10)) for start in (0, 10)]
    state = {"weight": unit(N, D, seed=3)}
    for fill in (
        lambda bank: bank.init_forward(torch.nn.Identity(), batches),
        lambda bank: bank.load_state_dict(state),
    ):
        for bank in (*shares, whole):
            fill(bank)
        assert torch.equal(torch.cat([share.weight for share in shares]), whole.weight)
    assert torch.equal(whole.weight, state["weight"])


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("options", [{}, {"lam": 5.0, "kl_temperature": 0.1}, {"bank_update": "npid"}], ids=str)
@pytest.mark.parametrize("start", ["forward", "random"])
def test_a_streamed_run_is_the_plain_run_but_for_rounding(lab_config, tmp_path, options, start):
    options = options | {"epochs": 1, "subset": 31, "bank_init": start}  # one step: rounding grows with each
    whole = train(lab_config(**options))
    streamed = train(lab_config(similarity_gb=1e-9, out=str(tmp_path / "streamed"), **options))
    assert streamed["nce"] == pytest.approx(whole["nce"], rel=1e-5)
    assert streamed["sqrt_kl"] == pytest.approx(whole["sqrt_kl"], rel=1e-3)
    one, other = (read_checkpoint(run["out"])["bank"]["weight"] for run in (whole, streamed))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"bank_dtype": "bf16"},
        {"bank_dtype": "bf16", "negatives": 30},
        {"bank_dtype": "bf16", "shard_bank": True},
        {"bank_dtype": "bf16", "bank_update": "npid", "views": "twice"},
        {"shard_bank": True, "views": "sslight"},
    ],
    ids=lambda o: "+".join(o),
)
def test_every_option_runs_to_the_end_and_is_resumed(lab_config, options):
    config = lab_config(**options)
    result = train(config)
    assert result["epoch"] == 2 and 0 <= result["knn"] <= 1
    checkpoint = read_checkpoint(result["out"])
    bank, kind = checkpoint["bank"]["weight"], torch.bfloat16 if "bank_dtype" in options else torch.float32
    assert bank.shape == (96, 16) and bank.dtype == kind
    run = build(config, 96, CPU)
    run.load(checkpoint)
    assert torch.equal(run.bank.weight, bank)


@pytest.mark.parametrize("options", [{"negatives": 30}, {"cutmix": 0.5}])
def test_a_split_bank_refuses_what_needs_whole_similarities(lab_config, options):
    config = lab_config(shard_bank=True, **options)
    with pytest.raises(UserError, match="^--shard-bank "):
        train(config)
    assert not config.folder().exists()


def test_large_similarities_are_streamed_where_the_options_allow_it(lab_config):
    def streamed(**options):
        return streams(lab_config(**({"batch_size": 256, "negatives": 0} | options)), 10**6)

    assert streamed() and streamed(lam=20.0) and not streamed(similarity_gb=1.1)
    assert streamed(similarity_gb=1.1, views="twice") and not streamed(similarity_gb=8.2, views="sslight")
    assert not any(streamed(**options) for options in ({"negatives": 64}, {"cutmix": 0.5}))
    assert isinstance(build(lab_config(similarity_gb=1e-9), 96, CPU), Streamed)
    assert type(build(lab_config(), 96, CPU)).__mro__[1] is Pretraining


def test_a_share_of_the_rows_belongs_to_each_process(lab_config, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 4)
    held = []
    for number in range(4):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        held += large_bank(lab_config(shard_bank=True), 95).rows
    assert held == list(range(95))
