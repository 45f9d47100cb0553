"""What tests of all three packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignment import pretrained


@pytest.fixture(scope="session")
def model_home() -> Path:
    """The folder that keeps the real small model between test runs."""
    return Path(os.environ.get("NEWEL_HOME", "~/.cache/newel-test")).expanduser()


@pytest.fixture(scope="session")
def model_dir(model_home: Path) -> Path:
    """The real small model's checkpoint, fetched at the first use."""
    return pretrained.pull(home=model_home)
