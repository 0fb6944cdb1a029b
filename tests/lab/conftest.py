from dataclasses import asdict

import pytest

from lab.train import LabConfig


@pytest.fixture
def lab_config(tiny):
    """A function that gives the settings of a run of lab.train of a few seconds."""
    return lambda **options: LabConfig(**(asdict(tiny(window=0)) | options))
