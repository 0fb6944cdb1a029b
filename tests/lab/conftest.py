import pytest
from invented import lab
from processes import FORK


@pytest.fixture
def lab_config(tiny):
    """A function that gives the settings of a run of lab.train of a few seconds."""
    return lambda **options: lab(tiny(window=0), **options)


@pytest.fixture
def forked_sweep(monkeypatch):
    """The processes of a sweep are forks: they import nothing, and have what is patched."""
    monkeypatch.setattr("figures.sweep.get_context", lambda _: FORK)
