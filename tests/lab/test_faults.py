"""The exercises' checks catch every planted fault by its idea, and find none in correct code."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_exercises
from faults import FAULTS, AsWritten

import bank
import loss

CHECKS = {
    name: (check, *inspect.signature(check).parameters)
    for name, check in vars(test_exercises).items()
    if name.startswith("test_")
}


def verdicts(kind: str, file) -> dict[str, str]:
    """{check: message} of the checks of a kind ("bank" or "loss") that fail on a file."""
    said = {}
    for name, (check, takes) in CHECKS.items():
        if takes == kind:
            try:
                check(file)
            except pytest.fail.Exception as failed:
                said[name] = failed.msg
            except pytest.skip.Exception:
                pass
    return said


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_caught_by_the_check_of_its_idea(name):
    fault = FAULTS[name]
    said = verdicts(fault.kind, fault.file)
    assert fault.check in said, f"caught by {list(said)} only"
    assert re.search(fault.words, said[fault.check]), said[fault.check]


def test_every_check_has_a_fault_to_catch():
    assert {fault.check for fault in FAULTS.values()} == CHECKS.keys()


def test_what_is_right_is_caught_by_none():
    assert verdicts("bank", bank) == verdicts("loss", loss) == {}
    assert verdicts("bank", type("file", (), {"MemoryBank": AsWritten})) == {}


MINE = """
import torch
from bank import MemoryBank as Ours

class MemoryBank(Ours):
    @torch.no_grad()
    def update(self, z, index, similarity=None, columns=None, **others):
        self.weight[index] = self.momentum * self.weight[index] + (1 - self.momentum) * z
"""


def test_a_file_of_ones_own_is_checked_and_what_it_lacks_is_skipped(tmp_path):
    root = Path(__file__).parents[2]
    mine, losses = tmp_path / "my_bank.py", tmp_path / "my_loss.py"
    mine.write_text(MINE)
    losses.write_text("from loss import nce\n")
    command = [sys.executable, "-m", "pytest", "tests/test_exercises.py", "-rfs", "-p", "no:cacheprovider", "--bank"]
    run = lambda *args: subprocess.run([*command, *map(str, args)], cwd=root, capture_output=True, text=True)  # noqa: E731
    done = run(mine, "--loss", losses)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout and "normalise the rows" in done.stdout
    assert "your file has no sqrt_kl yet: exercise 5" in done.stdout
    assert "::test_npid_moves_only" not in done.stdout and "::test_nce" not in done.stdout, "these are right"
    gone = run(tmp_path / "none.py")
    assert gone.returncode == 4 and "none.py: no such file" in gone.stderr
