"""docs/reading.md shows code: every excerpt is in its file word for word, so it cannot drift."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "reading.md").read_text()
EXCERPTS = re.findall(r"^`(\w+\.py)`, `[\w.]+`:\n\n```python\n(.*?)```$", TEXT, re.M | re.S)


def stands_in(excerpt: str, source: str) -> bool:
    """Whether the lines of excerpt occur in source one after the other, indented alike."""
    wanted, lines = excerpt.rstrip("\n").split("\n"), source.split("\n")
    windows = (lines[i : i + len(wanted)] for i in range(len(lines) - len(wanted) + 1))
    return any(textwrap.dedent("\n".join(window)) == textwrap.dedent("\n".join(wanted)) for window in windows)


def test_every_python_block_says_where_it_stands():
    assert len(EXCERPTS) == TEXT.count("```python") >= 10


@pytest.mark.parametrize(("file", "excerpt"), EXCERPTS, ids=[f"{i}-{e[0]}" for i, e in enumerate(EXCERPTS)])
def test_every_excerpt_is_in_its_file(file, excerpt):
    assert stands_in(excerpt, (ROOT / file).read_text())


def test_an_excerpt_that_differs_in_one_word_is_noticed():
    file, excerpt = EXCERPTS[0]
    assert not stands_in(re.sub(r"\w+", "other", excerpt, count=1), (ROOT / file).read_text())
