"""README, lab/README, EXERCISES and docs name files, functions, flags: each of them exists."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from plumbing.command_line import flag
from train import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "lab/README.md", "EXERCISES.md")] + sorted(ROOT.glob("docs/*.md"))
PACKAGES = [file for folder in ("plumbing", "lab", "figures") for file in ROOT.glob(f"{folder}/**/*.py")]
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"plumbing", "lab"}
OTHERS = {
    "--help",
    "--nproc-per-node",
    "--ignore",
    "--durations",
    "--bank",
    "--loss",
    "--order",
    "--newton",
    "--exercise",
}  # torchrun's, pytest's
README = (ROOT / "README.md").read_text()


def pages(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(function)


@pages
def test_every_function_named_exists(page):
    for name in sorted(set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", page.read_text()))):
        module, *attributes = name.split(".")
        if module not in MODULES or attributes[-1] in ("py", "md", "json", "jsonl", "png", "pt", "toml", "txt"):
            continue  # files, of the repository (below) or of a run, and other libraries
        while attributes and list(ROOT.glob(f"{module}/{attributes[0]}*".replace(".", "/"))):
            module, attributes = f"{module}.{attributes[0]}", attributes[1:]
        value = importlib.import_module(module)
        for attribute in attributes:
            # a buffer or a field without a default is annotated, in a class that the text may omit
            owners = [value, *(owner for owner in vars(value).values() if isinstance(owner, type))]
            fields_of = [getattr(owner, "__annotations__", {}) for owner in owners]
            assert hasattr(value, attribute) or any(attribute in names for names in fields_of), name
            value = getattr(value, attribute, None)


@pages
def test_every_flag_named_exists(page):
    scripts = [*ROOT.glob("*.py"), *PACKAGES]
    known = {name for file in scripts for name in re.findall(r'"(--[a-z][a-z-]*)"', file.read_text())}
    known |= {flag(f.name) for f in fields(Config)} | OTHERS
    settings = "".join(file.read_text() for file in ROOT.glob("lab/*.py"))
    known |= {flag(name) for name in re.findall(r"^    (\w+): \w+ = option\(", settings, re.M)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text()))
    assert sorted(name for name in named if name not in known and name.replace("--no-", "--") not in known) == []
    assert "--momentum" not in named, "the bank's m is --bank-momentum"


@pages
def test_every_file_and_target_named_exists(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w/.-])(?:figures|tests|docs|lab|plumbing)/[\w./-]+\.(?:py|md|png|json|sh)", text):
        assert (ROOT / path).exists() or path.startswith("figures/results/") and "…" in path, path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", text, re.M)) <= targets
    for module in re.findall(r"python -m ((?:lab|plumbing)[\w.]*)", text):
        if module.rstrip(".") != "lab.studies" and "NAME" not in module:
            assert (ROOT / (module.rstrip(".").replace(".", "/") + ".py")).exists(), module


@pages
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pages
def test_every_link_to_a_heading_finds_it(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", page.read_text()):
        file = page.parent / target if target else page
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("number", range(1, 6))
def test_every_figure_of_the_paper_has_its_script(number):
    (script,) = ROOT.glob(f"figures/fig{number}_*.py")
    assert "Figures 1 to 5" in README or script.name in README
