"""The exercises' checks catch every planted fault by its idea, and find none in correct code."""

import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import test_exercises
from faults import FAULTS, AsWritten
from processes import Forked

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


ANSWERS = (
    "P - [",
    "[k = y]",
    "[j = y]",
    "log P_k + H",
    "E_P[",
    "u_k - P_k",
    "P_k - u_k",
    "(1 - m) z",
    "softmax(s / 2T)",
)


@pytest.mark.parametrize("name", FAULTS)
def test_no_message_prints_the_formula_that_the_exercise_asks_for(name):
    said = " ".join(verdicts(FAULTS[name].kind, FAULTS[name].file).values())
    assert not [answer for answer in ANSWERS if answer in said]


def test_every_check_has_a_fault_to_catch():
    assert {fault.check for fault in FAULTS.values()} == CHECKS.keys()


def test_what_is_right_is_caught_by_none():
    for kind, ours in test_exercises.OURS.items():
        assert verdicts(kind, ours()) == {}
    assert verdicts("bank", type("file", (), {"MemoryBank": AsWritten})) == {}


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("bank", "class Bank:\n    pass", "has no MemoryBank.*It has Bank"),
        ("bank", "from bank import MemoryBank\nclass MyBank(MemoryBank):\n    pass", "is ours, imported.*MyBank"),
        ("bank", "import bank\nclass MemoryBank(bank.MemoryBank):\n    pass", "no update of its own"),
        ("loss", "def nce_loss(s, y, t):\n    pass", "has nce_loss, and no nce"),
        ("loss", "def sqrtkl(s):\n    pass\ndef nce(s, y, t):\n    pass", "has sqrtkl, and no sqrt_kl"),
        ("loss", "from loss import nce", "is ours, imported"),
        ("loss", "x = 1", "has no nce.*nothing of its own"),
        ("order", "def window(order, size, visits):\n    pass", "has window, and no windows"),
        ("newton", "def f(x):\n    pass", "has no newton_schulz"),
    ],
)
def test_another_name_is_told_and_nothing_passes_by_it(kind, text, words, tmp_path):
    module = type(sys)("student")
    exec(text, vars(module))
    assert re.search(words, test_exercises.names_of(module, kind, "my.py"))


def test_an_exercise_that_is_asked_for_and_not_written_is_no_pass():
    module = type(sys)("student")
    exec("def nce(s, y, t):\n    pass", vars(module))
    assert test_exercises.names_of(module, "loss", "my.py") == ""
    assert "has no sqrt_kl, sqrt_kl_gradient" in test_exercises.names_of(module, "loss", "my.py", 5)


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
    losses.write_text("import loss\n\ndef nce(*args):\n    return loss.nce(*args)\n")

    def run(*words):
        line = ["tests/test_exercises.py", "-rfs", "-p", "no:cacheprovider", "--bank", *words]
        with Forked(pytest.main, line, lambda: os.chdir(root)) as process:
            return process.ended()

    status, printed, error = run(mine, "--loss", losses)
    assert status == 1, printed + error
    assert "FAILED" in printed and "normalise the rows" in printed
    assert "your file has no sqrt_kl yet: exercise 5" in printed
    assert "::test_npid_moves_only" not in printed and "::test_nce" not in printed, "these are right"
    status, _, error = run(tmp_path / "none.py")
    assert status == 4 and "none.py: no such file" in error


def test_the_letters_of_break_it_are_dealt_by_chance_once_and_kept(tmp_path, monkeypatch):
    from figures import break_it

    dealt = []
    monkeypatch.setattr(break_it, "histories", lambda config: {name: [] for name in break_it.KINDS})
    monkeypatch.setattr(break_it, "draw", lambda runs, deal, reveal, place: (dealt.append(deal), place.touch()))
    folders = [str(tmp_path / str(i)) for i in range(6)]
    for folder in folders:
        assert break_it.main(["--out", folder]) == break_it.main(["--out", folder, "--reveal"]) == 0
    assert dealt[::2] == dealt[1::2] and len(set(dealt)) > 3
    assert break_it.main(["--out", folders[0], "--deal", "7"]) == break_it.main(["--out", folders[0], "--reveal"]) == 0
    assert dealt[-2:] == [7, 7]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"epochs": 3}'])
def test_a_damaged_file_of_break_it_is_named(tmp_path, capsys, content):
    from figures import break_it

    (tmp_path / "break_it-24-0.json").write_text(content)
    assert break_it.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "break_it-24-0.json: damaged (" in error and "; delete it" in error and error.count("\n") == 1
