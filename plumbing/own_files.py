"""A student's own bank and losses in place of ours: `train.py --bank FILE --loss FILE`."""

import runpy
from pathlib import Path

from plumbing.command_line import UserError


def with_own_files(learner: type, bank: str = "", loss: str = "") -> type:
    """learner, or a subclass with the MemoryBank of the file `bank` and the losses of `loss`.

    Where loss has no sqrt_kl, ours stays. Raises UserError, naming the flag, for a file that cannot
    be imported or lacks the name.
    """
    own = {}
    if bank:
        own["bank_class"] = _content(bank, "--bank", "MemoryBank")["MemoryBank"]
    if loss:
        content = _content(loss, "--loss", "nce")
        own |= {name: _weighted(content[name]) for name in ("nce", "sqrt_kl") if name in content}
    return type(learner.__name__, (learner,), own) if own else learner


def _content(path: str, flag: str, name: str) -> dict:
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        content = runpy.run_path(path)
    except Exception as error:
        raise UserError(f"{flag} {path}: cannot be imported ({type(error).__name__}: {error})") from error
    if name not in content:
        raise UserError(f"{flag} {path}: has no {name}")
    return content


def _weighted(loss) -> staticmethod:
    """A loss that need not take `weight`, which is None as long as each image has one view."""
    return staticmethod(lambda *args, weight=None: loss(*args) if weight is None else loss(*args, weight=weight))
