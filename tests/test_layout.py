"""The house: six short files on top, imports in one direction, words that name something."""

import ast
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ("bank", "data", "eval_linear", "loss", "models", "train")
BANNED = set("there here some mine rest plain part made found".split())


def sources(root, *folders):
    """Every Python file of those folders ("": the top level, but for a student's my_bank.py)."""
    for folder in folders:
        files = (root / folder).rglob("*.py") if folder else root.glob("*.py")
        yield from sorted(file for file in files if not file.name.startswith("my_"))


def nodes(file, *kinds):
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds))


def six_files_on_top(root):
    names = tuple(file.stem for file in sources(root, ""))
    return [] if names == CORE else [f"at the top level: {names}"]


def core_is_short(root):
    lines = sum(len(file.read_text().splitlines()) for file in sources(root, ""))
    return [f"the core has {lines} lines"] * (lines > 1000)


def readme_is_short(root):
    text = (root / "README.md").read_text()
    lines, words = len(text.splitlines()), len(text.split())
    return [f"README.md has {lines} lines and {words} words"] * (lines > 120 or words > 1000)


def imports_point_one_way(root):
    forbidden = {"": {"lab", "figures"}, "plumbing": {"lab", "figures", *CORE}}
    for folder, names in forbidden.items():
        for file in sources(root, folder):
            for node in nodes(file, ast.Import, ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                wrong = {module.split(".")[0] for module in modules if module} & names
                yield from (f"{file.name}:{node.lineno} imports {name}" for name in wrong)


def training_loads_the_core_alone(root):
    line = [sys.executable, "-c", "import sys, train; print(*sys.modules, sep='\\n')"]
    loaded = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in loaded if name.split(".")[0] == "lab" or name == "torch.utils.flop_counter"]


def functions_are_short(root):
    for file in sources(root, ""):
        for node in nodes(file, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            yield from [f"{file.name}: {node.name} has {lines} lines"] * (lines > 45)


def the_step_is_short(root):
    step = next(node for node in nodes(root / "train.py", ast.FunctionDef) if node.name == "step")
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with tokenize.open(root / "train.py") as file:
        code = {t.start[0] for t in tokenize.generate_tokens(file.readline) if t.type not in silent}
    first = step.body[1].lineno if ast.get_docstring(step) else step.body[0].lineno
    lines = len(code & set(range(first, step.end_lineno + 1)))
    return [f"step has {lines} lines of code"] * (lines > 20)


def the_rule_stands_above_its_code(root):
    lines = (root / "bank.py").read_text().splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\s+# .*w_k <- normalise\(.*Σ_i", line):
            code = "\n".join(below for below in lines[i + 1 : i + 9] if not below.lstrip().startswith("#"))
            return [] if re.search(r"normali[sz]e\(|\.norm\(", code) else [f"bank.py:{i + 1}: code is further below"]
    return ["bank.py: no comment has the corrected rule"]


def names_name_something(root):
    for file in sources(root, "", "plumbing", "lab", "figures"):
        for node in nodes(file, ast.Name, ast.Attribute, ast.arg, ast.alias, ast.FunctionDef, ast.ClassDef):
            loads = isinstance(getattr(node, "ctx", None), ast.Load)
            names = {getattr(node, key, None) for key in ("id", "attr", "arg", "asname", "name") if not loads}
            yield from (f"{file.relative_to(root)}:{node.lineno} defines {name}" for name in names & BANNED)


def lab_has_a_row_per_file(root):
    rows = set(re.findall(r"^\| `(\w+\.py)` \|", (root / "lab" / "README.md").read_text(), re.M))
    files = {file.name for file in (root / "lab").glob("*.py")} - {"__init__.py"}
    return [f"lab/README.md has no row for {name}" for name in sorted(files - rows)]


def lab_has_a_row_per_study(root):
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (root / "lab" / "README.md").read_text(), re.M)
    names = {name for row in rows for name in re.findall(r"\w+", row)}
    files = {file.stem for file in (root / "lab" / "studies").glob("*.py")} - {"__init__"}
    return [f"lab/README.md has no row for the study {name}" for name in sorted(files - names)]


CHECKS = (
    six_files_on_top, core_is_short, readme_is_short, imports_point_one_way, training_loads_the_core_alone,
    functions_are_short, the_step_is_short, the_rule_stands_above_its_code, names_name_something,
    lab_has_a_row_per_file, lab_has_a_row_per_study,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check):
    assert not complaints(check)


@cache
def complaints(check):
    return set(check(ROOT))


def appended(text):
    return lambda old: old + text


def replaced(pattern, text):
    return lambda old: re.sub(pattern, text, old)


MUTATIONS = {
    "a seventh file": (six_files_on_top, "extra.py", appended("")),
    "a thousand lines more": (core_is_short, "loss.py", appended("# more\n" * 1000)),
    "a README of 121 lines": (readme_is_short, "README.md", lambda _: "line\n" * 121),
    "a README of 1001 words": (readme_is_short, "README.md", lambda _: "word " * 1001),
    "the bank imports lab": (imports_point_one_way, "bank.py", appended("\nimport lab\n")),
    "a function imports lab": (imports_point_one_way, "data.py", appended("\ndef f():\n    from lab import x\n")),
    "plumbing imports the core": (imports_point_one_way, "plumbing/files.py", appended("\nfrom train import Config\n")),
    "training loads lab": (training_loads_the_core_alone, "plumbing/devices.py", appended("\n__import__('lab')\n")),
    "a function of 46 lines": (functions_are_short, "loss.py", appended("\ndef f():\n" + "    f()\n" * 45)),
    "a step of 30 lines": (the_step_is_short, "train.py", replaced(r"( +loss.backward\(\)\n)", r"\1" * 15)),
    "the rule without its comment": (the_rule_stands_above_its_code, "bank.py", replaced(r"# w_k <-", "# w <-")),
    "the rule far above": (the_rule_stands_above_its_code, "bank.py", replaced(r"(# w_k.*\n)", r"\1" + "\n" * 9)),
    "a banned variable": (names_name_something, "plumbing/runs.py", appended("\nrest = 1\n")),
    "a banned argument": (names_name_something, "models.py", appended("\ndef f(part):\n    pass\n")),
    "a banned attribute": (names_name_something, "bank.py", appended("\nMemoryBank.found = 1\n")),
    "a lab file without a row": (lab_has_a_row_per_file, "lab/extra.py", appended("")),
    "a study without a row": (lab_has_a_row_per_study, "lab/studies/extra.py", appended("")),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_disorder_is_noticed(name, tmp_path):
    check, place, change = MUTATIONS[name]
    for file in (*sources(ROOT, "", "plumbing", "lab", "figures"), *ROOT.glob("README.md"), *ROOT.glob("lab/*.md")):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    file = tmp_path / place
    file.write_text(change(file.read_text() if file.exists() else ""))
    assert set(check(tmp_path)) - complaints(check)
