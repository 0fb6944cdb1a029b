"""Known slips: what a wrong rule or loss computes, and the idea that it misses.

A check that fails asks these tables whether the student's numbers are those of a known slip. Then
the message names the idea. It never prints the formula that the exercise asks for.
"""

import torch
import torch.nn.functional as F


def equal(a, b) -> bool:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-8, atol=1e-11))


def named(got, slips: dict) -> str | None:
    """The words of the first slip whose value is `got`."""
    return next((words for words, value in slips.items() if equal(got, value)), None)


# ---------------------------------------------------------------------------------------- the bank


def corrected(w, z, y, m, tau) -> dict:
    """What slips in the corrected rule make of the rows w (N, D), by the words for them."""
    own, s = F.one_hot(y, len(w)).to(w.dtype), z @ w.T  # (B, N) each
    p = (s / tau).softmax(1)
    pull = own - p
    step = pull.T @ z  # (N, D)
    last = own * (own.flip(0).cumsum(0).flip(0) == 1)
    first = own * (own.cumsum(0) == 1)
    mixed = lambda step: m * w + (1 - m) * step  # noqa: E731
    seen = own.sum(0)[:, None].clamp(max=1)  # (N, 1)
    twice = (
        "an image drawn twice adds both views: under `step[index] += z` one of two equal indices is lost. "
        "Sum over the batch with index_add_ or a matrix product."
    )
    absorbed = "1/tau is absorbed by (1 - m), as derivations.md, section 2, explains: your step still has this factor"
    return {
        f"{absorbed}.": mixed(step / tau),
        f"{absorbed}, and you take the mean over the batch where the rule has a sum.": mixed(step / tau / len(z)),
        "the rule sums over the views of a batch, Σ_i: yours is their mean. The loss is a mean; the rule has "
        "absorbed the 1 / B.": mixed(step / len(z)),
        "P has the temperature tau: yours is the softmax of the cosines as they are.": mixed(
            (own - s.softmax(1)).T @ z
        ),
        "P has the temperature tau: divide the cosines by it, do not multiply.": mixed(
            (own - (s * tau).softmax(1)).T @ z
        ),
        "P is taken over the rows of the bank, for each view: yours is a softmax over the batch.": mixed(
            (own - (s / tau).softmax(0)).T @ z
        ),
        "P is a softmax: yours is not divided by its sum.": mixed((own - (s / tau).exp()).T @ z),
        "P is a probability: yours is its logarithm.": mixed((own - p.log()).T @ z),
        "P is a softmax of the cosines: yours are the cosines themselves.": mixed((own - s).T @ z),
        "P is dropped: every row moves, also those of other images. Without P NPID's rule is left.": mixed(own.T @ z),
        "every row moves: yours moves the rows of the batch's images only.": torch.where(seen > 0, mixed(step), w),
        "the own row is in the softmax, too: it is pulled by less than 1, by 1 - P_y.": mixed(
            (own - p * (1 - own)).T @ z
        ),
        "the sign: the rule goes DOWN the gradient, and yours goes up.": mixed(-step),
        "the sign: rows of other images are pushed away from a view, yours are pulled.": mixed((own + p).T @ z),
        "the sign: rows of other images are pushed away from a view, and yours are pulled.": mixed(
            (own * (1 - p) + (1 - own) * p).T @ z
        ),
        twice: mixed((last - p).T @ z),
        twice + " ": mixed((first - p).T @ z),
        "m is the share of the OLD row: m and 1 - m are swapped.": (1 - m) * w + m * step,
        "1 - m is missing: it is the share of the step.": m * w + step,
        "m is missing: it is the share of the old row.": w + (1 - m) * step,
        "m and 1 - m are missing: they are the shares of old row and step.": w + step,
        "the old row is missing: m is its share.": step,
        "normalise once, after the sum: yours normalises the step first.": mixed(F.normalize(step, dim=1)),
        "each view has its own P: yours are averaged over the batch.": mixed((own - p.mean(0)).T @ z),
        "the step has the direction of the views z: yours has that of the rows.": mixed(pull.sum(0)[:, None] * w),
    }  # fmt: skip


def npid(w, z, y, m, tau) -> dict:
    """The same for NPID's rule."""
    own = F.one_hot(y, len(w)).to(w.dtype)
    step, seen = own.T @ z, own.sum(0)[:, None]
    last, first = own * (own.flip(0).cumsum(0).flip(0) == 1), own * (own.cumsum(0) == 1)
    only = lambda rows: torch.where(seen > 0, rows, w)  # noqa: E731
    twice = (
        "an image that is drawn twice adds both of its views: weight[index] = ... keeps the last assignment. Sum the "
        "views of equal indices first (index_add_, or a one-hot matrix times z)."
    )
    right = m * w + (1 - m) * (own - (z @ w.T / tau).softmax(1)).T @ z
    return {
        "the sign: NPID's rule moves a row TOWARDS its view, yours away from it.": only(m * w - (1 - m) * step),
        "m is the share of the OLD row: m and 1 - m are swapped.": only((1 - m) * w + m * step),
        twice: only(m * w + (1 - m) * last.T @ z),
        twice + " ": only(m * w + (1 - m) * first.T @ z),
        "1 - m is missing: it is the share of the view.": only(m * w + step),
        "m is missing: it is the share of the old row.": only(w + (1 - m) * step),
        "m and 1 - m are missing: they are the shares of old row and view.": only(w + step),
        "the old row is missing: m is its share.": only(step),
        "the views of a batch do not share: each row gets its own view, not a mean over the batch.": only(
            m * w + (1 - m) * step / len(z)
        ),
        "NPID's rule has no temperature: where does your 1/tau come from?": only(m * w + (1 - m) * step / tau),
        'look at self.rule: under "npid" only the own rows move. Yours is the corrected rule.': right,
        "each row gets the view of its own image: yours all get the mean view.": only(m * w + (1 - m) * z.mean(0)),
    }


# -------------------------------------------------------------------------------------- the losses


def nce(s, y, tau) -> dict:
    """What slips make of L_NCE's value."""
    own = s.gather(1, y[:, None])[:, 0]
    right = (s / tau).logsumexp(1) - own / tau  # (B,)
    others = (s / tau).scatter(1, y[:, None], -torch.inf).logsumexp(1) - own / tau
    p = (s / tau).softmax(1).gather(1, y[:, None])
    return {
        "the sign: L_NCE is a cost, MINUS the logarithm of P_y; yours is a gain.": -right.mean(),
        "L_NCE is the mean over the batch: yours is the sum, its size depends on --batch-size.": right.sum(),
        "L_NCE is the mean over the B views of the batch: yours is averaged over all B x N elements.": right.sum()
        / s.numel(),
        "P is the softmax over ALL rows, the own one among them: yours leaves the own row out.": others.mean(),
        "L_NCE has a logarithm: yours is P_y itself.": -p.mean(),
        "L_NCE has a logarithm: yours is 1 - P_y.": (1 - p).mean(),
        "s / tau: yours multiplies the cosines by tau.": F.cross_entropy(s * tau, y),
        "s / tau: your temperature has no effect.": F.cross_entropy(s, y),
        "s / tau: the own cosine is divided by tau, but the softmax is not.": (s.logsumexp(1) - own / tau).mean(),
        "s / tau: the softmax is divided by tau, but the own cosine is not.": ((s / tau).logsumexp(1) - own).mean(),
        "one logarithm too many: cross_entropy takes logits, not a softmax.": F.cross_entropy((s / tau).softmax(1), y),
        "P is a softmax over the rows, for each view: yours is over the batch.": -(s / tau)
        .log_softmax(0)
        .gather(1, y[:, None])
        .mean(),
        "the unit is the nat: yours has the logarithm to base 2.": right.mean() / torch.log(torch.tensor(2.0)).double(),
    }


def nce_gradient(s, y, tau) -> dict:
    """What slips make of dL_NCE/ds by hand."""
    p, own = (s / tau).softmax(1), F.one_hot(y, s.shape[1]).to(s.dtype)
    row, b = p - own, len(s)
    return {
        "count the factors: 1 / tau, from the logits, is missing.": row / b,
        "count the factors: 1 / B, from the mean, is missing.": row / tau,
        "count the factors: 1 / B from the mean and 1 / tau from the logits are missing.": row,
        "count the factors: tau divides, it does not multiply.": row * tau / b,
        "count the factors: the mean is over B views, not over all B x N elements.": row / (s.numel() * tau),
        "the sign: the own row's cosine has to rise for the loss to fall.": -row / (b * tau),
        "the own row is missing: its cosine is in the numerator of P_y, too.": p / (b * tau),
        "P is missing: only the own row gets a gradient, but each row of the softmax does.": -own / (b * tau),
        "P has the temperature tau: yours is the softmax of s itself.": (s.softmax(1) - own) / (b * tau),
        "the own row is in the softmax, too: yours has no P there.": (p * (1 - own) - own) / (b * tau),
    }


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(1)


def sqrt_kl(s, t, direction="p||u") -> dict:
    """What slips make of L_SqrtKL's value."""
    a = s / t
    log_p, log_u, root = a.log_softmax(1), (a / 2).log_softmax(1), a.log_softmax(1) / 2
    swap = (lambda p, u: kl(p, u)) if direction == "p||u" else (lambda p, u: kl(u, p))
    right, other = swap(log_p, log_u), swap(log_u, log_p)
    wanted = "KL(P‖u), P first" if direction == "p||u" else "KL(u‖P), u first"
    p, u = log_p.exp(), log_u.exp()
    return {
        f"the direction: this one is {wanted}. KL is not symmetric, and yours is the other one (F.kl_div takes its "
        "arguments the other way round).": other.mean(),
        "the sign: a divergence is never below 0, yours is.": -right.mean(),
        "the sign: a divergence is never below 0, yours is, and the direction is the other one.": -other.mean(),
        "L_SqrtKL is the mean over the batch: yours is the sum over its images.": right.sum(),
        "L_SqrtKL sums over the rows and takes the mean over the batch: yours is averaged over all B x N elements.": (
            right.sum() / s.numel()
        ),
        "the direction is the other one, and yours is averaged over all B x N elements.": other.sum() / s.numel(),
        "the direction is the other one, and yours is the sum over the batch.": other.sum(),
        "u is sqrt(P) DIVIDED BY ITS SUM: without the division it is no distribution.": swap(log_p, root).mean(),
        "u is flatter than P, at TWICE the temperature: yours is at half of it.": swap(
            log_p, (2 * a).log_softmax(1)
        ).mean(),
        "u is the SQUARE root of P: yours is the third root.": swap(log_p, (a / 3).log_softmax(1)).mean(),
        "KL is a cross-entropy MINUS an entropy: yours has only the cross-entropy.": -(p * log_u).sum(1).mean(),
        "KL is a cross-entropy minus an entropy: yours is an entropy alone.": -(p * log_p).sum(1).mean(),
        "KL is between distributions: your P and u are divided by T only in one of them.": swap(
            log_p, (s / 2).log_softmax(1)
        ).mean(),
        "s / T: your temperature has no effect.": kl(s.log_softmax(1), (s / 2).log_softmax(1)).mean(),
        "s / T: yours multiplies by T.": kl((s * t).log_softmax(1), (s * t / 2).log_softmax(1)).mean(),
        "P and u are softmaxes over the rows, for each view: yours are over the batch.": (
            (a.softmax(0) * (a.log_softmax(0) - (a / 2).log_softmax(0))).sum() / len(s)
        ),
        "KL has the logarithms' difference: yours has the difference of P and u.": (p * (p - u)).sum(1).mean(),
    }  # fmt: skip


def sqrt_kl_gradient(s, t, direction="p||u", detach=True) -> dict:
    """What slips make of dL_SqrtKL/ds by hand."""
    b, a = len(s), s / t
    p, u = a.softmax(1), (a / 2).softmax(1)
    h, q = -(p * p.log()).sum(1, keepdim=True), (u * (u / p).log()).sum(1, keepdim=True)
    held = {"p||u": p * (p.log() + h) / 2, "u||p": p - u}
    moving = {"p||u": (u - p) / 2, "u||p": u * ((u / p).log() - q) / 2}
    other = "u||p" if direction == "p||u" else "p||u"
    base, term = held[direction], moving[direction]
    right = base if detach else base + term
    scale = b * t
    slips = {
        "count the factors: 1 / B, from the mean, is missing.": right / t,
        "count the factors: 1 / T, from a = s / T, is missing.": right / b,
        "count the factors: 1 / B from the mean and 1 / T from a = s / T are missing.": right,
        "the sign of the whole gradient is turned round.": -right / scale,
        "the direction is the other one.": (held[other] if detach else held[other] + moving[other]) / scale,
    }
    if direction == "p||u":
        slips |= {
            "the 1/2, which u takes off, is missing: without it, it is the gradient of the entropy.": (right + base)
            / scale,
            "the entropy H(P) is missing: the gradient sums to 0 over the rows, yours does not.": (
                (p * p.log() / 2 if detach else p * p.log() / 2 + term) / scale
            ),
            "the sign of H(P): the gradient sums to 0 over the rows, yours does not.": (
                (p * (p.log() - h) / 2 + (0 if detach else term)) / scale
            ),
            "the factor P_k is missing: a row that nothing looks like gets hardly any gradient.": (
                ((p.log() + h) / 2 + (0 if detach else term)) / scale
            ),
        }
    if detach:
        slips |= {
            "u is held constant: yours has the term of a u that moves.": (base + term) / scale,
            "u is held constant: yours has minus the term of a u that moves.": (base - term) / scale,
        }
    else:
        slips |= {
            "u moves: the term of a moving u is missing.": base / scale,
            "u moves: the term of a moving u is there half.": (base + term / 2) / scale,
            "u moves: the term of a moving u is there twice.": (base + 2 * term) / scale,
            "u moves: the term of a moving u has the wrong sign.": (base - term) / scale,
            "u moves: only the term of a moving u is there, P's is missing.": term / scale,
        }
    return slips


def streaming(s, y, tau, rows, lam=0.0, t=1.0) -> dict:
    """What slips make of dL/dz (B, D): s (B, N) are the cosines with rows (N, D)."""
    b = len(s)
    p, own = (s / tau).softmax(1), rows[y]
    nce_part = (p @ rows - own) / (b * tau)
    root = (s / t).softmax(1)
    e_a = (root * s / t).sum(1, keepdim=True)
    cov = (root * s / t) @ rows - e_a * (root @ rows)
    kl_part = lam * cov / (2 * t * b)
    first = {
        "count the factors: 1 / tau is missing from the gradient of NCE.": nce_part * tau + kl_part,
        "count the factors: 1 / B is missing from the gradient of NCE.": nce_part * b + kl_part,
        "count the factors: 1 / B and 1 / tau are missing from the gradient of NCE.": nce_part * b * tau + kl_part,
        "the sign of the gradient of NCE is turned round.": -nce_part + kl_part,
        "the own row is missing from the gradient of NCE.": p @ rows / (b * tau) + kl_part,
        "the mean row under P is missing from the gradient of NCE: it has only the pull.": -own / (b * tau) + kl_part,
    }
    if lam:
        first |= {
            "the gradient of SqrtKL is missing.": nce_part,
            "lambda is missing from the gradient of SqrtKL.": nce_part + kl_part / lam,
            "the 1/2 is missing from the gradient of SqrtKL: it is half a covariance.": nce_part + 2 * kl_part,
            "count the factors: 1 / T is missing from the gradient of SqrtKL.": nce_part + t * kl_part,
            "count the factors: 1 / B is missing from the gradient of SqrtKL.": nce_part + b * kl_part,
            "the sign of the gradient of SqrtKL is turned round.": nce_part - kl_part,
            "a covariance has the product of the means taken off: yours does not.": nce_part
            + lam * ((root * s / t) @ rows) / (2 * t * b),
        }
    return first
