"""The checks of EXERCISES.md, one for each idea: on our files, or on yours.

    .venv/bin/python -m pytest tests/test_exercises.py                                     ours
    .venv/bin/python -m pytest tests/test_exercises.py --bank my_bank.py --exercise 1      yours

--bank, --loss, --order and --newton name your files, --exercise picks the checks of one exercise. A
check that fails says which idea is missing (tests/slips.py knows how the usual slips look). Without
--exercise, what your file does not have yet is skipped. All is in float64, so "equal" means equal
to eight digits. `tests/lab/test_faults.py` shows that every planted fault is caught by its idea.
"""

import difflib
import importlib
import importlib.util
import inspect
import itertools
import traceback
from types import SimpleNamespace

import pytest
import slips
import torch
import torch.nn.functional as F
from slips import equal
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import data as our_data
import loss as ours
from bank import MemoryBank
from lab.large_bank import streaming_loss
from plumbing.optimizer import orthogonalise

N, D, B = 24, 8, 3
NAMES = {  # what each file holds, and the exercises that ask for it
    "bank": {"MemoryBank": (1, 3)},
    "loss": {
        "nce": (2,), "nce_gradient": (2,), "sqrt_kl": (5,), "sqrt_kl_gradient": (5,), "streaming_loss": (9,),
    },
    "order": {"windows": (13,)},
    "newton": {"newton_schulz": (14,)},
}  # fmt: skip


def exercise(*numbers):
    return pytest.mark.exercise(*numbers)


def nce_gradient(similarity, target, temperature):
    """dL_NCE/ds (B, N), in closed form."""
    p = (similarity / temperature).softmax(1)
    return (p - F.one_hot(target, similarity.shape[1])) / (len(p) * temperature)


def sqrt_kl_gradient(similarity, temperature=1.0, direction="p||u", detach=True):
    """dL_SqrtKL/ds (B, N), in closed form."""
    p, u = (similarity / temperature).softmax(1), (similarity / (2 * temperature)).softmax(1)
    if direction == "p||u":
        entropy = -(p * p.log()).sum(1, keepdim=True)
        row = p * (p.log() + entropy) / 2 + (0 if detach else (u - p) / 2)
    else:
        kl = (u * (u / p).log()).sum(1, keepdim=True)
        row = p - u + (0 if detach else u * ((u / p).log() - kl) / 2)
    return row / (len(p) * temperature)


def windows(order, size, visits):
    """The passes of one cycle: yields (images in the window (W,), images that enter)."""
    stride = max(1, size // visits)
    for begin in range(0, len(order) - size + 1, stride):
        images = order[begin : begin + size]
        yield images, images[size - stride :] if begin else images


def newton_schulz(matrix, steps=5):
    """The iterates X_0 ... X_steps (steps + 1, R, C) on the way to U V'."""
    return torch.stack([orthogonalise([matrix], k)[0] if k else matrix / matrix.norm() for k in range(steps + 1)])


OURS = {
    "bank": lambda: SimpleNamespace(MemoryBank=MemoryBank),
    "loss": lambda: SimpleNamespace(  # loss.py has its gradients as comments; lab/ has the loss that streams
        nce=ours.nce, sqrt_kl=ours.sqrt_kl, nce_gradient=nce_gradient, sqrt_kl_gradient=sqrt_kl_gradient,
        streaming_loss=streaming_loss,
    ),
    "order": lambda: SimpleNamespace(windows=windows),
    "newton": lambda: SimpleNamespace(newton_schulz=newton_schulz),
}  # fmt: skip


def opened(request, kind):
    path, number = request.config.getoption(f"--{kind}"), request.config.getoption("--exercise")
    if not path:
        return OURS[kind]()
    spec = importlib.util.spec_from_file_location(f"my_{kind}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        problem = names_of(module, kind, path, number)
    except Exception as error:
        problem = f"{path} cannot be imported: {told(error, path)}"
    if problem:
        pytest.fail(problem, pytrace=False)
    module.exercise_asked = number
    return module


def names_of(module, kind: str, path: str, number: int | None = None) -> str:
    """What is wrong with the names in a student's file, "" if nothing is."""
    wanted = NAMES[kind]
    own = [
        n
        for n, f in vars(module).items()
        if callable(f) and getattr(f, "__module__", "") == module.__name__ and n[0] != "_"
    ]
    for name in wanted:
        value = getattr(module, name, None)
        if value is not None and name not in own:
            advice = "import ours under another name, and write your own under this one"
            return f"{name} in {path} is ours, imported: {advice}. Your file's own names: {', '.join(own) or 'none'}."
    for name in own:
        close = difflib.get_close_matches(name.lower().replace("_", ""), [n.lower().replace("_", "") for n in wanted])
        missing = [n for n in wanted if n not in own and n.lower().replace("_", "") in close]
        if name not in wanted and missing:
            return f"{path} has {name}, and no {missing[0]}: the checks look for the name {missing[0]}."
    asked = [name for name, numbers in wanted.items() if number in numbers and name not in own]
    if asked or not set(own) & set(wanted):
        names = ", ".join(asked or wanted)
        return f"{path} has no {names}: the checks look for this name. It has {', '.join(own) or 'nothing of its own'}."
    if kind == "bank" and module.MemoryBank.update is MemoryBank.update:
        return f"MemoryBank in {path} has no update of its own: it would be checked against ours, which it inherits."
    return ""


def told(error: Exception, path: str = "") -> str:
    """An exception in a student's file, in one line: what, and in which line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(path or ".py")]
    frames = [f for f in frames if not f.filename.endswith("test_exercises.py")]
    where = f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    text = str(error).split("\n")[0]
    hint = ""
    if "Float" in text and "Double" in text:
        hint = " The checks are in float64: keep the dtype of what you get, where do you make a float32?"
    elif "does not require grad" in text or "not have been used in the graph" in text:
        hint = " The gradient is lost: look for .item(), float(), .detach() or no_grad."
    elif "leaf Variable" in text or "modified by an inplace operation" in text:
        hint = " A tensor that autograd needs is changed in place."
    elif "NoneType" in text and "similarity" in where:
        hint = " similarity is None where the caller has none: ask self.similarity(z) then."
    return f"{type(error).__name__}: {text}{where}.{hint}"


def called(function, *args, **options):
    """What a student's function returns; an exception becomes a message of one line."""
    try:
        return function(*args, **options)
    except Exception as error:
        problem = f"{getattr(function, '__name__', 'your function')} stops with {told(error)}"
    pytest.fail(problem, pytrace=False)  # not above, where pytest would print both exceptions


def checked(name: str, value, like, shape=(), grad=False):
    """A student's tensor, if it has this shape and is float64: else a message says why not."""
    require(value is not None, f"{name} returns nothing: is the return forgotten?")
    advice = "return the tensor itself. With .item() or float() the gradient is lost"
    require(isinstance(value, torch.Tensor), f"{name} returns a {type(value).__name__}, not a tensor: {advice}.")
    if tuple(value.shape) != tuple(shape):
        advice = "a loss is one number: take the mean over the batch" if not shape else "one number for each element"
        pytest.fail(f"{name} returns the shape {tuple(value.shape)}, expected {tuple(shape)}: {advice}.", pytrace=False)
    dtype = str(value.dtype).removeprefix("torch.")
    require(value.dtype == like.dtype, f"{name} returns {dtype} for float64: where do you make a {dtype}?")
    require(torch.isfinite(value).all(), f"{name} returns a value that is not finite: a log of 0, or exp of too much?")
    require(
        not grad or value.requires_grad,
        f"{name} returns a value without a gradient: look for .item(), .detach(), no_grad or .data.",
    )
    return value


@pytest.fixture
def bank(request):
    return opened(request, "bank")


@pytest.fixture
def loss(request):
    return opened(request, "loss")


@pytest.fixture
def order(request):
    return opened(request, "order")


@pytest.fixture
def newton(request):
    return opened(request, "newton")


def need(file, name, option=None):
    """What the file calls `name`. Skips the check if it has none, or if it lacks the option."""
    numbers = " and ".join(str(n) for names in NAMES.values() for n in names.get(name, ()))
    if not hasattr(file, name):
        pytest.skip(f"your file has no {name} yet: exercise {numbers} of EXERCISES.md")
    if option and option not in inspect.signature(getattr(file, name)).parameters:
        pytest.skip(f"your {name} does not take {option}= yet: exercise {numbers} of EXERCISES.md")
    return getattr(file, name)


def require(holds, idea, slip=None):
    """Fails with the slip that the numbers show, or else with the idea of the check."""
    if not holds:
        pytest.fail((slip() if callable(slip) else slip) or idea, pytrace=False)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def bank_of(bank, rule="corrected", m=0.5, tau=0.1):
    table = called(need(bank, "MemoryBank"), N, D, momentum=m, rule=rule, temperature=tau).double()
    table.weight.data.copy_(unit(N, D, seed=7))
    return table


def moved(bank, z, index, similarity=None, **options):
    """The rows before and after one update: (N, D) each."""
    table = bank_of(bank, **options)
    before = table.weight.detach().clone()
    called(table.update, z, index, *(() if similarity is None else (similarity,)))
    after = table.weight
    require(isinstance(after, torch.Tensor), "self.weight is the bank: update it in place, keep it a tensor.")
    after = after.detach()
    require(after.shape == before.shape, f"the bank has {N} x {D} rows; after your update {tuple(after.shape)}.")
    require(after.dtype == before.dtype, f"the bank is float64 in the checks, and {after.dtype} after your update.")
    require(torch.isfinite(after).all(), "the update has made rows that are not finite: a log, or a division by 0?")
    require(
        not torch.equal(after, before),
        f"the update has moved nothing: it changes a copy, or the rule {table.rule!r} is not written yet. Indexing "
        "with a tensor, clone, .to and F.normalize all make copies; write the rows back into self.weight, in place.",
    )
    return before, after


def slip_of(bank, rule):
    """The known slip that the bank's rule shows, or None."""
    m, tau = 0.6, 0.1  # the factors of any two slips differ
    for index in (torch.tensor([4, 9, 0]), torch.tensor([8, 8, 2])):
        z = unit(B, D)
        before, after = moved(bank, z, index, rule=rule, m=m, tau=tau)
        known = {
            words: F.normalize(rows, dim=1) for words, rows in getattr(slips, rule)(before, z, index, m, tau).items()
        }
        known = {words: rows for words, rows in known.items() if not equal(rows, right(before, z, index, rule, m, tau))}
        if words := slips.named(F.normalize(after, dim=1), known):
            return words.strip()
    return None


def right(w, z, index, rule, m, tau):
    """The rows after the rule as it should be."""
    own = F.one_hot(index, len(w)).to(w.dtype)
    pull = own if rule == "npid" else own - (z @ w.T / tau).softmax(1)
    return F.normalize(torch.where(pull.any(0)[:, None], m * w + (1 - m) * pull.T @ z, w), dim=1)


def pulls(before, after, z):
    """How strongly each view pulls each row at m = 1/2.

    The c_ki (N, B) in w_k <- normalise(w_k + Σ_i c_ki z_i). A row's new direction lies in the span
    of its old one and the views, so its coordinates in this span give c, whatever its length.
    """
    frames = torch.cat([before[:, None], z.expand(len(before), *z.shape)], 1).mT  # (N, D, 1 + B)
    coordinates = torch.linalg.lstsq(frames, after[..., None]).solution[..., 0]  # (N, 1 + B)
    return coordinates[:, 1:] / coordinates[:, :1]


def one_view(own_cosine=0.0, seed=3):
    """A view z (1, D) of image 4 that has this cosine with row 4 and is random otherwise."""
    w = unit(N, D, seed=7)[4]
    other = unit(1, D, seed=seed)[0]
    side = F.normalize(other - (other @ w) * w, dim=0)
    return (own_cosine * w + (1 - own_cosine**2) ** 0.5 * side)[None], torch.tensor([4])


OTHERS = torch.arange(N) != 4


def require_unit(bank, rule):
    length = moved(bank, unit(B, D), torch.tensor([4, 9, 0]), rule=rule)[1].norm(dim=1)
    worst = length[(length - 1).abs().argmax()].item()
    require(
        equal(length, torch.ones_like(length)),
        f"normalise the rows: s = z · w is a cosine only while every w_k has length 1, and after one {rule} update a "
        f"row has length {worst:.3f}. A row that grows gets louder in every softmax, whatever it points at.",
    )


def require_both_views(bank, rule):
    z, index, m, tau = unit(B, D), torch.tensor([8, 8, 2]), 0.7, 0.1
    before, after = moved(bank, z, index, rule=rule, m=m, tau=tau)
    require(
        equal(F.normalize(after, dim=1)[8], right(before, z, index, rule, m, tau)[8]),
        "an image that is drawn twice adds both of its views: weight[index] = ... and step[index] += ... keep one of "
        "two equal indices. Sum the views of equal indices first (index_add_, or a one-hot matrix times z).",
        lambda: slip_of(bank, rule),
    )


# ------------------------------------------------------------------------- the bank: NPID's rule


@exercise(1)
def test_rows_stay_unit_under_npids_rule(bank):
    require_unit(bank, "npid")


@exercise(1)
def test_npid_moves_only_the_own_rows(bank):
    before, after = moved(bank, unit(B, D), torch.tensor([4, 9, 0]), rule="npid")
    turned = (F.normalize(after, dim=1) - before).norm(dim=1) > 1e-9
    require(
        turned.nonzero()[:, 0].tolist() == [0, 4, 9],
        "only the own rows move under NPID's rule: a batch of images 4, 9 and 0 turned rows "
        f"{turned.nonzero()[:, 0].tolist()}. Look at `self.rule`.",
        lambda: slip_of(bank, "npid"),
    )


@exercise(1)
def test_m_is_the_share_of_the_old_row(bank):
    z, index = one_view()
    before, after = moved(bank, z, index, rule="npid", m=0.9)
    away = F.cosine_similarity(after[4], z[0], dim=0) < 0
    require(not away, "the sign: NPID's rule moves a row TOWARDS its view, yours away from it.")
    require(
        equal(F.normalize(after[4], dim=0), F.normalize(0.9 * before[4] + 0.1 * z[0], dim=0)),
        "m is the share of the OLD row, 1 - m of the view: at m = 0.9 the row is mostly its old self. Its cosine with "
        f"the old one is {F.cosine_similarity(after[4], before[4], dim=0):.4f}.",
        lambda: slip_of(bank, "npid"),
    )


@exercise(1)
def test_an_image_drawn_twice_adds_both_views(bank):
    require_both_views(bank, "npid")


# ------------------------------------------------------------------------- the bank: corrected rule


@exercise(3)
def test_rows_stay_unit_under_the_corrected_rule(bank):
    require_unit(bank, "corrected")


@exercise(3)
def test_the_corrected_rule_moves_every_row(bank):
    z, index = one_view()
    c = pulls(*moved(bank, z, index), z)[:, 0]
    still = (c.abs() < 1e-12).sum().item()
    require(
        still == 0,
        f"every row moves: dL/dw_k does not vanish for the rows of other images, and {still} of {N} rows stayed where "
        "they were. Where P is dropped, NPID's rule remains.",
        lambda: slip_of(bank, "corrected"),
    )


@exercise(3)
def test_other_rows_are_pushed_away_and_the_own_row_is_pulled(bank):
    z, index = one_view()
    before, after = moved(bank, z, index)
    closer = F.cosine_similarity(after, z) - before @ z[0]
    slip = lambda: slip_of(bank, "corrected")  # noqa: E731
    require(
        closer[4] > 0,
        "the sign: the rule goes DOWN the gradient. One update took the image's own row away from its view.",
        slip,
    )
    require(
        (closer[OTHERS] < 1e-12).all(),
        "the sign: rows of other images are pushed away from a view, and here some came closer to it.",
        slip,
    )


@exercise(3)
def test_the_own_row_is_pulled_by_one_minus_p(bank):
    for cosine in (0.0, 0.5):
        z, index = one_view(cosine)
        before, after = moved(bank, z, index)
        p, c = (before @ z[0] / 0.1).softmax(0)[4].item(), pulls(before, after, z)[4, 0].item()
        require(
            abs(c - (1 - p)) < 0.05,
            f"the own row is pulled by 1 - P_y: an image that is recognised (P_y = {p:.2f}) has little left to pull, "
            f"{1 - p:.2f}, and yours pulls with {c:.2f}. The own row is in the softmax, too.",
            lambda: slip_of(bank, "corrected"),
        )


@exercise(3)
def test_the_pushes_add_up_to_the_pull(bank):
    z, index = one_view(0.5)
    c = pulls(*moved(bank, z, index), z)[:, 0]
    require(
        abs(c.sum()) < 1e-8 * c.abs().sum(),
        "the pushes add up to the pull, because P sums to 1 over the rows: the strengths with which one view moves "
        f"the rows sum to 0, and yours sum to {c.sum():.3f} (pull {c[4]:.3f}, pushes {c[OTHERS].sum():.3f}). Over what "
        "is your softmax taken, and is it there for k = y?",
        lambda: slip_of(bank, "corrected"),
    )


@exercise(3)
def test_p_has_the_temperature_tau(bank):
    for tau in (0.1, 0.4):
        z, index = one_view()
        before, after = moved(bank, z, index, tau=tau)
        s, c = (before @ z[0])[OTHERS], pulls(before, after, z)[OTHERS, 0].abs().clamp(min=1e-300).log()
        slope = ((s - s.mean()) * (c - c.mean())).sum() / (s - s.mean()).square().sum()  # log c = s / T + const
        require(
            abs(slope * tau - 1) < 1e-4,
            "P has the temperature tau, as in the loss: yours is spread over the rows as if the temperature were "
            f"{1 / slope:.3g}, where tau is {tau}.",
            lambda: slip_of(bank, "corrected"),
        )


@exercise(3)
def test_the_views_of_a_batch_add(bank):
    z, index = unit(B, D), torch.tensor([4, 9, 0])
    together = pulls(*moved(bank, z, index), z)  # (N, B)
    alone = torch.cat([pulls(*moved(bank, z[i : i + 1], index[i : i + 1]), z[i : i + 1]) for i in range(B)], 1)
    ratio = (together.abs().sum() / alone.abs().sum()).item()
    require(
        equal(together, alone),
        f"the views of a batch add, Σ_i, each with the P it would have alone: {B} views at once pull {ratio:.2f} "
        f"times as strongly as they do one by one. ({1 / B:.2f} would be a mean over the batch.)",
        lambda: slip_of(bank, "corrected"),
    )


@exercise(3)
def test_an_image_drawn_twice_adds_both_views_to_the_corrected_rule(bank):
    require_both_views(bank, "corrected")


@exercise(3)
def test_p_is_the_one_the_loss_saw(bank):
    z, index = one_view()
    seen = torch.linspace(-0.4, 0.4, N, dtype=torch.float64)[None]  # as if the bank had been another one then
    c = pulls(*moved(bank, z, index, similarity=seen), z)[OTHERS, 0].abs().clamp(min=1e-300).log()
    fit = torch.corrcoef(torch.stack([c, seen[0, OTHERS]]))[0, 1]
    require(
        fit > 0.999,
        "P is the one the loss saw: it comes from the similarities of this step, before any row has moved. `update` "
        "was given them and made its own P; so rows that were moved for one view change the P of the next.",
        lambda: slip_of(bank, "corrected"),
    )


@exercise(3)
def test_the_corrected_rule_is_a_gradient_step(bank):
    z, index, m, tau = unit(B, D), torch.tensor([4, 9, 0]), 0.7, 0.1
    before, after = moved(bank, z, index, m=m, tau=tau)
    w = before.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(z @ w.T / tau, index), w)
    require(
        equal(after, F.normalize(m * before - (1 - m) * tau * B * gradient, dim=1)),
        "the corrected rule is a gradient step on the bank, with the step size of derivations.md, section 2, and a "
        "return to the sphere. Yours differs; if every other check of the bank passes, look at m and at the order of "
        "sum and normalisation.",
        lambda: slip_of(bank, "corrected"),
    )


@exercise(15)
def test_sampled_rows_move_as_the_rule_says(bank):
    """For --negatives K: similarity and target are those of the M rows in columns."""
    takes = inspect.signature(need(bank, "MemoryBank").update).parameters
    if "columns" not in takes and getattr(bank, "exercise_asked", None) != 15:
        pytest.skip("your update does not take columns= yet: exercise 15 of EXERCISES.md")
    z, index, m, tau = unit(B, D), torch.tensor([4, 9, 0]), 0.7, 0.1
    table, columns = bank_of(bank, m=m, tau=tau), torch.tensor([0, 4, 9, 2, 17, 20])
    before, target = table.weight.detach().clone(), torch.tensor([1, 2, 0])
    words = "with sampled negatives, `similarity` (B, M), `columns` (M,) and `target` (B,) speak of M rows of the N"
    problem = ""
    try:
        table.update(z, index, similarity=z @ before[columns].T, columns=columns, target=target)
    except Exception as error:
        problem = f"{words}; your update takes them for all rows: {told(error)}"
    require(not problem, problem)
    expected = before.clone()
    expected[columns] = right(before[columns], z, target, "corrected", m, tau)
    after = table.weight.detach()
    outside = torch.ones(N, dtype=torch.bool)
    outside[columns] = False
    require(
        torch.equal(after[outside], before[outside]),
        "with sampled negatives only the rows in `columns` are in the softmax, so only they move; yours moved others.",
    )
    require(
        equal(after, expected),
        "with sampled negatives P runs over the rows in `columns`, and `target` says which column is a view's own. "
        "Yours moves these rows otherwise.",
    )


# --------------------------------------------------------------- the bank: what surrounds the rules


@exercise(1)
def test_reading_the_bank_moves_nothing(bank):
    table = bank_of(bank)
    before, index = table.weight.detach().clone(), torch.tensor([4, 9, 0])
    table.locate(index)
    table.similarity(unit(B, D))
    require(
        equal(table.weight.detach(), before),
        "similarity first, update afterwards: asking for the similarities has moved the bank. A row that was moved "
        "towards z has z in it, so z finds it whatever the image shows, and the loss falls without anything being "
        "learnt.",
    )


@exercise(1)
def test_the_positive_is_never_among_the_negatives(bank):
    table, index = bank_of(bank), torch.tensor([4, 9, 0])
    counts = torch.zeros(N, dtype=torch.long)
    for _ in range(50):
        counts += torch.bincount(table.sample(index, 8), minlength=N)
    require(
        (counts[index] == 50).all(),
        "the positive is never among the negatives: each image's own row belongs into the softmax once, as the right "
        "answer. Drawn again as a negative it is pushed away by its own view (rows 4, 9 and 0 came "
        f"{counts[index].tolist()} times in 50 draws).",
    )


@exercise(1)
def test_the_gradient_stops_at_the_bank(bank):
    table, z = bank_of(bank), unit(B, D).requires_grad_()
    similarity = table.similarity(z)
    F.cross_entropy(similarity / 0.1, torch.tensor([4, 9, 0])).backward()
    called(table.update, z, torch.tensor([4, 9, 0]))
    require(
        z.grad is not None and not table.weight.requires_grad and table.weight.grad is None,
        "the gradient stops at the bank: it is a constant for autograd and moves by its own rule. Here gradients "
        "reach it: a buffer, not a Parameter; @torch.no_grad() on update; z.detach().",
    )


@exercise(1)
def test_a_random_bank_has_unit_rows(bank):
    table = bank_of(bank)
    table.init_random()
    length = table.weight.detach().norm(dim=1)
    require(
        equal(length, torch.ones_like(length)),
        f"a bank starts with unit rows: after init_random they have lengths {length.min():.2f} to {length.max():.2f}.",
    )


class Spy(nn.Module):
    """An encoder that notes in which mode it is called."""

    def __init__(self):
        super().__init__()
        self.layer, self.modes = nn.Linear(12, D), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.layer(x.flatten(1))


@exercise(1)
def test_forward_initialisation_fills_row_i_with_view_i(bank):
    table, encoder = bank_of(bank).float(), Spy()
    images, order = torch.randn(N, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(N).flip(0)
    table.init_forward(encoder, [(images[i], i) for i in order.split(7)])
    z = F.normalize(encoder.layer(images.flatten(1)), dim=1).detach()
    require(
        torch.allclose(table.weight, z, atol=1e-5),
        "forward initialisation fills row i with the unit embedding of image i: w_i = z_i, looked up by index and "
        "not by order.",
    )
    require(
        encoder.modes == [True] * 4,
        "forward initialisation runs the encoder in train mode, as the first step will: an untrained BatchNorm in "
        "eval mode has mean 0 and variance 1, and its features are others.",
    )


# --------------------------------------------------------------------------------------- the losses

TARGET = torch.tensor([3, 1, 4, 1, 5])


def cosines():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(5, 11, generator=generator, dtype=torch.float64) - 1).requires_grad_()


def gradient(value, x):
    return called(torch.autograd.grad, value, x, retain_graph=True)[0]


def value(file, name, s, *args, **options):
    """A loss of the student's, checked to be a number that autograd can go back from."""
    got = called(need(file, name), s, *args, **options)
    return checked(name, got, s, grad=s.requires_grad)


@exercise(2)
def test_nce_is_minus_log_p_of_the_own_row(loss):
    s = cosines()
    for tau in (1.0, 0.3):
        got, expected = value(loss, "nce", s, TARGET, tau), ours.nce(s, TARGET, tau)
        require(
            tau < 1 or equal(got, expected),
            "L_NCE is the cost, in nats, of the own row under the softmax over ALL rows: yours at tau = 1 is "
            f"{got:.4f}, expected {expected:.4f}.",
            lambda: slips.named(got, slips.nce(s.detach(), TARGET, tau)),  # noqa: B023
        )


@exercise(2)
def test_nce_divides_by_tau(loss):
    s = cosines()
    got = value(loss, "nce", s, TARGET, 0.3)
    require(
        equal(got, value(loss, "nce", s / 0.3, TARGET, 1.0)) and not equal(got, value(loss, "nce", s, TARGET, 1.0)),
        "L_NCE reads s / tau: cosines lie in [-1, 1], and only division by a small tau lets one row of thousands "
        "have most of P.",
        lambda: slips.named(got, slips.nce(s.detach(), TARGET, 0.3)),
    )


@exercise(2)
def test_the_gradient_of_nce_is_p_minus_one_hot(loss):
    s = cosines()
    got = gradient(value(loss, "nce", s, TARGET, 0.3), s)
    require(
        equal(got, nce_gradient(s.detach(), TARGET, 0.3)),
        "the gradient of NCE pushes every row of the softmax and pulls the own one: autograd goes back through your "
        "nce and finds another gradient. Is some of it detached?",
        lambda: slips.named(got, slips.nce_gradient(s.detach(), TARGET, 0.3)),
    )


@exercise(2)
def test_the_gradient_of_nce_by_hand(loss):
    s = cosines().detach()
    got = checked("nce_gradient", called(need(loss, "nce_gradient"), s, TARGET, 0.3), s, s.shape)
    require(
        equal(got, nce_gradient(s, TARGET, 0.3)),
        "dL_NCE/ds by hand is not what autograd gets. Count the factors, from the mean and from the logits, and ask "
        "of each row: is it in the softmax, is it the own one?",
        lambda: slips.named(got, slips.nce_gradient(s, TARGET, 0.3)),
    )


def kl(p, q):
    return (p * (p / q).log()).sum(1).mean()


@exercise(5)
def test_u_is_the_softmax_at_twice_the_temperature(loss):
    s = cosines()
    p, u = s.softmax(1), (s / 2).softmax(1)
    require(
        equal(p.sqrt() / p.sqrt().sum(1, keepdim=True), u), "sqrt of a softmax is a softmax at twice the temperature"
    )
    got = value(loss, "sqrt_kl", s, 1.0)
    require(
        equal(got, kl(p, u)),
        "L_SqrtKL is the divergence of P from u, and u the square root of P, normalised: a softmax at TWICE the "
        f"temperature, flatter than P. Yours is {got:.5f} at T = 1, expected {kl(p, u):.5f}.",
        lambda: slips.named(got, slips.sqrt_kl(s.detach(), 1.0)),
    )


@exercise(5)
def test_sqrt_kl_divides_by_its_temperature(loss):
    s = cosines()
    got = value(loss, "sqrt_kl", s, 0.3)
    require(
        equal(got, value(loss, "sqrt_kl", s / 0.3, 1.0)) and not equal(got, value(loss, "sqrt_kl", s, 1.0)),
        "L_SqrtKL reads s / T: its temperature has no effect, or not the effect of dividing the cosines by it.",
        lambda: slips.named(got, slips.sqrt_kl(s.detach(), 0.3)),
    )


def require_gradient(loss, got, s, direction, detach, idea):
    """got is autograd's, through the student's sqrt_kl at T = 0.3."""
    slip = lambda: slips.named(got, slips.sqrt_kl_gradient(s.detach(), 0.3, direction, detach))  # noqa: E731
    require(equal(got, sqrt_kl_gradient(s.detach(), 0.3, direction, detach)), idea, slip)


@exercise(5)
def test_u_is_held_constant(loss):
    s = cosines()
    got = gradient(value(loss, "sqrt_kl", s, 0.3), s)
    idea = (
        "u is held constant (stop-gradient): it is the teacher, and P carries the gradient. Autograd finds another "
        "gradient in your sqrt_kl. Is it P that is detached, in place of u?"
    )
    require_gradient(loss, got, s, "p||u", True, idea)


@exercise(5)
def test_u_may_move(loss):
    s, _ = cosines(), need(loss, "sqrt_kl", "detach")
    got = gradient(value(loss, "sqrt_kl", s, 0.3, detach=False), s)
    idea = "with detach=False u moves, and adds a term to the gradient. In yours autograd finds another gradient."
    require_gradient(loss, got, s, "p||u", False, idea)


@exercise(5)
def test_the_other_direction_is_kl_u_p(loss):
    s, _ = cosines(), need(loss, "sqrt_kl", "direction")
    p, u, got = s.softmax(1), (s / 2).softmax(1), value(loss, "sqrt_kl", s, 1.0, direction="u||p")
    require(
        equal(got, kl(u, p)),
        f"the other direction is KL(u‖P): expected {kl(u, p):.5f}, got {got:.5f}. KL is not symmetric.",
        lambda: slips.named(got, slips.sqrt_kl(s.detach(), 1.0, "u||p")),
    )
    got = gradient(value(loss, "sqrt_kl", s, 0.3, direction="u||p"), s)
    idea = "KL(u‖P) with u held is a cross-entropy with u as the target. Autograd finds another gradient in yours."
    require_gradient(loss, got, s, "u||p", True, idea)


@exercise(5)
def test_near_uniform_sqrt_kl_is_an_eighth_of_the_variance(loss):
    need(loss, "sqrt_kl")
    a = -0.03 * torch.rand(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log()  # skewed
    variance, third = a.var(1, unbiased=False).mean(), (a - a.mean(1, keepdim=True)).pow(3).mean()
    got = value(loss, "sqrt_kl", a, 1.0)
    ratio = (got / variance).item()
    require(
        abs(ratio - 0.125) < 0.02,
        f"near a uniform P, the divergence is an eighth of the variance of the a_j: yours is {ratio:.3f} Var. Which "
        "power of P is u?",
        lambda: slips.named(got, slips.sqrt_kl(a, 1.0)),
    )
    require(
        abs(ratio - 0.125 - 5 / 48 * (third / variance).item()) < 0.001,
        "an eighth of the variance is the first term only: the divergence has a next one, of the third central "
        f"moment. Yours leaves {ratio - 0.125:.4f} Var.",
    )


def require_by_hand(loss, direction="p||u", detach=True):
    s, by_hand = cosines().detach(), need(loss, "sqrt_kl_gradient")
    options = ({} if direction == "p||u" else {"direction": direction}) | ({} if detach else {"detach": False})
    for option in options:
        need(loss, "sqrt_kl_gradient", option)
    got = checked("sqrt_kl_gradient", called(by_hand, s, 0.3, **options), s, s.shape)
    idea = (
        f"dL_SqrtKL/ds by hand, {direction}, u {'held' if detach else 'moving'}: autograd gets something else. Count "
        "the factors, and ask what each of P and u adds."
    )
    require_gradient(loss, got, s, direction, detach, idea)


@exercise(5)
def test_the_gradient_of_sqrt_kl_by_hand(loss):
    require_by_hand(loss)


@exercise(5)
def test_the_gradient_by_hand_has_the_term_of_a_moving_u(loss):
    require_by_hand(loss, detach=False)


@exercise(5)
def test_the_gradient_by_hand_in_the_other_direction(loss):
    require_by_hand(loss, "u||p")
    require_by_hand(loss, "u||p", detach=False)


# ---------------------------------------------------------------------------------------- streaming


def rows():
    return unit(B, 7).requires_grad_(), unit(41, 7, seed=1), torch.tensor([3, 40, 3])


def whole_bank(z, weight, index, tau, lam, t):
    s = z @ weight.T
    return ours.nce(s, index, tau) + lam * ours.sqrt_kl(s, t)


def streamed(loss, z, *args, **options):
    return checked("streaming_loss", called(need(loss, "streaming_loss"), z, *args, **options), z, grad=z.requires_grad)


@exercise(9)
def test_streaming_nce_has_the_same_value(loss):
    z, weight, index = rows()
    expected = whole_bank(z, weight, index, 0.1, 0.0, 1.0)
    whole, pieces = (streamed(loss, z, weight, index, 0.1, chunk=chunk) for chunk in (41, 8))
    slip = lambda got: lambda: slips.named(got, slips.nce((z @ weight.T).detach(), index, 0.1))  # noqa: E731
    require(
        equal(whole, expected),
        f"in one chunk streaming_loss is plain nce, {expected:.5f}; yours is {whole:.5f}.",
        slip(whole),
    )
    require(
        equal(pieces, expected),
        "the chunks share ONE normaliser: sum the exponentials over all of them, the last short one too, then take "
        f"the log. Chunks of 8 give {pieces:.5f}, the whole bank {expected:.5f}.",
        slip(pieces),
    )


@exercise(9)
def test_streaming_has_the_same_gradient(loss):
    z, weight, index = rows()
    expected = gradient(whole_bank(z, weight, index, 0.1, 0.0, 1.0), z)
    got = gradient(streamed(loss, z, weight, index, 0.1, chunk=8), z)
    require(
        equal(got, expected),
        "the gradient streams too, as a mean of rows under P and the own row. Yours has only part of it.",
        lambda: slips.named(got, slips.streaming((z @ weight.T).detach(), index, 0.1, weight)),
    )


@exercise(9)
def test_streaming_heeds_the_upstream_gradient(loss):
    z, weight, index = rows()
    once, thrice = (gradient(k * streamed(loss, z, weight, index, 0.1, chunk=8), z) for k in (1, 3))
    require(
        equal(thrice, 3 * once),
        "the upstream gradient: backward is given dL/d(your loss), and has to multiply by it. Three times the loss "
        "has the gradient of one.",
    )


@exercise(9)
def test_streaming_has_sqrt_kl_too(loss):
    (z, weight, index), _ = rows(), need(loss, "streaming_loss", "lam")
    for tau, lam, t in ((0.1, 20.0, 1.0), (0.2, 3.0, 0.2)):
        expected, got = (
            whole_bank(z, weight, index, tau, lam, t),
            streamed(loss, z, weight, index, tau, lam, t, chunk=8),
        )
        kl_part = lam * ours.sqrt_kl(z @ weight.T, t)
        known = {
            "SqrtKL is missing: with lam > 0 your value is that of NCE alone.": expected - kl_part,
            "lam > 0: SqrtKL is there, lambda is not.": expected - kl_part + kl_part / lam,
            "lam > 0: NCE and SqrtKL share a temperature, and T is not tau.": whole_bank(
                z, weight, index, tau, lam, tau
            ),
        }
        require(
            equal(got, expected),
            "SqrtKL streams: it is made of three sums that grow chunk by chunk (derivations.md, section 5), with a "
            "temperature of its own. Your value with lam > 0 is not nce + lam * sqrt_kl.",
            lambda: slips.named(got, known),  # noqa: B023
        )
        moves = whole_bank(z, weight, index, tau, 0.0, t) + lam * ours.sqrt_kl(z @ weight.T, t, detach=False)
        found = gradient(got, z)
        require(
            not equal(found, gradient(moves, z)),
            "u is held constant when it streams, too: autograd through logsumexp(a / 2) lets it move, with the right "
            "value and another gradient.",
        )
        require(
            equal(found, gradient(expected, z)),
            "the gradient of SqrtKL streams: it is half a covariance under P (derivations.md, section 8). Yours, with "
            "lam > 0, is another.",
            lambda: slips.named(found, slips.streaming((z @ weight.T).detach(), index, tau, weight, lam, t)),  # noqa: B023
        )


@exercise(9)
def test_streaming_does_not_overflow(loss):
    z, weight, index = rows()
    z = z.detach()[:1].float()
    for turn in (False, True):  # the largest logit first, or last
        ordered = weight.float()[(weight.float() @ z[0]).argsort(descending=not turn)]
        got = called(need(loss, "streaming_loss"), z, ordered, index[:1], 0.005, chunk=8)
        expected = whole_bank(z, ordered, index[:1], 0.005, 0.0, 1.0)
        words = "Keep the running maximum and scale the old sums when it grows"
        require(
            torch.allclose(torch.as_tensor(got, dtype=torch.float32), expected, rtol=1e-3),
            f"subtract the largest logit before exp: at tau = 0.005 logits reach 200, and exp(200) is no float32. "
            f"{words}. Expected {expected:.2f}, got {got:.2f}"
            + (": the first chunk's maximum is not the maximum of all." if turn else "."),
        )


class Watch(TorchDispatchMode):
    """Notes the largest tensor that is made, and which tensors are still alive later."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.largest, self.alive = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
                self.alive[x.untyped_storage().data_ptr()] = StorageWeakRef(x.untyped_storage()), x.numel()
        return result

    def kept(self) -> int:
        return sum(count for storage, count in self.alive.values() if not storage.expired())


@exercise(9)
def test_streaming_keeps_no_matrix_for_the_backward_pass(loss):
    z, weight, index = unit(8, 3).requires_grad_(), unit(4000, 3, seed=1), torch.arange(8)
    matrix = 8 * 4000
    with Watch(z, weight, index) as watch:
        got = streamed(loss, z, weight, index, 0.1, chunk=100)
        kept = watch.kept()
    with Watch(z, weight, index) as backward:
        called(got.backward)
    largest = max(watch.largest, backward.largest)
    require(
        largest < matrix,
        f"no (B, N) matrix is made: your loss makes a tensor of {largest} numbers, where B x N is {matrix}. With a "
        "million rows this is what does not fit. Go through the rows chunk by chunk, in the forward pass and in the "
        "backward pass.",
    )
    require(
        kept < matrix / 4,
        f"nothing of size B x N is kept: {kept} numbers wait for the backward pass, where the matrix has {matrix}. "
        "Chunks in a loop are not enough: autograd keeps each one's exponentials, and so does a list of chunks on "
        "ctx. Write the gradient yourself (autograd.Function) and keep only what is (B, D).",
    )


# ------------------------------------------------------------------- what is new: windows, and Muon


@exercise(13)
def test_windows_hold_the_images_that_ours_hold(order):
    write = need(order, "windows")
    for count, size, visits in ((100, 20, 4), (97, 20, 4), (1000, 17, 5), (64, 16, 1)):
        images = our_data.shuffled(torch.arange(count), 0, "order")
        passes = (count - size) // max(1, size // visits) + 1
        whole = list(itertools.islice(our_data.windows(count, size, visits, 0), passes))
        got = called(lambda: list(itertools.islice(write(images, size, visits), passes + 1)))  # noqa: B023
        require(bool(got), "windows yields nothing: it is a generator, with a yield for each pass.")
        setting = f"with {count} images, a window of {size} and {visits} visits"
        for number, (pair, (_, members, entering)) in enumerate(zip(got, whole)):
            require(
                isinstance(pair, tuple) and len(pair) == 2,
                "windows yields pairs: (images in the window, images that enter).",
            )
            own, new = pair
            require(
                len(own) == size, f"a window holds W = {size} images, {setting}: yours in pass {number} has {len(own)}."
            )
            require(
                len(set(own.tolist())) == size, f"no image is in a window twice, {setting}: yours in pass {number} is."
            )
            if number == 1 and not torch.equal(own, members):
                kept = len(set(own.tolist()) & set(got[0][0].tolist()))
                stride = max(1, size // visits)
                require(
                    kept == size - stride,
                    f"the window slides by W / r images after each pass, so that an image has r visits: {setting} "
                    f"{size - stride} images stay, in yours {kept}.",
                )
            require(
                torch.equal(torch.as_tensor(own), members),
                f"the window slides along the order, {setting}: in pass {number} yours holds other images than ours, "
                "or the same ones in another order. First come those that entered first.",
            )
            require(
                set(torch.as_tensor(new).tolist()) == set(entering.tolist()),
                f"the images that enter are those that were not in the window before; in pass 0 all are new. "
                f"{setting}, pass {number}: yours names {len(new)}, ours {len(entering)}.",
            )
        require(
            len(got) == passes,
            f"a cycle ends when the window would pass the end of the order: {setting} after {passes} passes, yours "
            f"after {'more' if len(got) > passes else len(got)}.",
        )


@exercise(14)
def test_newton_schulz_brings_all_singular_values_near_one(newton):
    for matrix in (torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), unit(2, 2), unit(2, 2, seed=4)):
        got = called(need(newton, "newton_schulz"), matrix)
        require(
            isinstance(got, torch.Tensor) and got.shape == (6, 2, 2),
            "newton_schulz returns the six iterates X_0 ... X_5, stacked: a tensor (6, 2, 2).",
        )
        u, _, v = torch.linalg.svd(matrix)
        first = torch.linalg.svdvals(got[0])
        require(
            equal(got[0], matrix / matrix.norm()),
            "X_0 is the matrix divided by its Frobenius norm, so that no singular value is above 1: yours has "
            f"{first[0]:.3f} and {first[1]:.3f}.",
        )
        a, b, c = 3.4445, -4.7750, 2.0315
        for k in range(5):
            x = got[k]
            square, cube = x @ x.mT @ x, x * x * x
            wrong = {
                "powers are matrix products, X X'; yours are those of the elements.": a * x
                + b * cube
                + c * cube * x * x,
                "the fifth power is missing.": a * x + b * square,
                "X X' X keeps the singular vectors; yours multiplies X X X.": a * x
                + b * x @ x @ x
                + c * x @ x @ x @ x @ x,
            }
            expected = a * x + b * square + c * x @ x.mT @ square
            require(
                bool(torch.allclose(got[k + 1], expected, rtol=1e-6, atol=1e-8)),
                f"each step applies the same odd polynomial to all singular values: your X_{k + 1} does not follow "
                f"from X_{k}.",
                lambda: slips.named(got[k + 1], wrong),  # noqa: B023
            )
        values = (u.mT @ got[5] @ v.mT).diagonal()
        require(
            bool(((values > 0.6) & (values < 1.3)).all()),
            f"after five steps all singular values are near 1: yours are {values.tolist()}.",
        )
