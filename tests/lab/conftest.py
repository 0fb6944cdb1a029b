import pytest
from invented import lab


@pytest.fixture
def lab_config(tiny):
    """A function that gives the settings of a run of lab.train of a few seconds."""
    return lambda **options: lab(tiny(window=0), **options)
