"""A student's own bank and losses in place of ours: `train.py --bank FILE --loss FILE`."""

import functools
import importlib.util
from pathlib import Path

from plumbing.command_line import UserError


def with_own_files(learner: type, bank: str = "", loss: str = "") -> type:
    """learner, or a subclass with the MemoryBank of the file `bank` and the losses of `loss`.

    Where loss has no sqrt_kl, ours stays. Raises UserError, naming the flag, for a file that cannot
    be imported or lacks the name.
    """
    own = {}
    if bank:
        own["bank_class"] = _imported(bank, "--bank", "MemoryBank").MemoryBank
    if loss:
        module = _imported(loss, "--loss", "nce")
        for name in ("nce", "sqrt_kl"):
            if hasattr(module, name):
                own[name] = staticmethod(_without_weight(getattr(module, name)))
    return type(learner.__name__, (learner,), own) if own else learner


def _imported(path: str, flag: str, name: str):
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag} {path}: cannot be imported ({type(error).__name__}: {error})") from error
    if not hasattr(module, name):
        raise UserError(f"{flag} {path}: has no {name}")
    return module


def _without_weight(loss):
    """A loss that need not take `weight`, which is None as long as each image has one view."""

    @functools.wraps(loss)
    def call(similarity, *args, weight=None):
        *args, last = args if len(args) > 2 else (*args, weight)
        return loss(similarity, *args) if last is None else loss(similarity, *args, weight=last)

    return call
