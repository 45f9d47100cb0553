"""What tests of all three packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignment import encoder as encoders
from alignment import pretrained
from guardrails import encoder


@pytest.fixture(scope="session")
def model_home() -> Path:
    """The folder that keeps the real small model between test runs."""
    return Path(os.environ.get("NEWEL_HOME", "~/.cache/newel-test")).expanduser()


@pytest.fixture(scope="session")
def model_dir(model_home: Path) -> Path:
    """The real small model's checkpoint, fetched at the first use."""
    return pretrained.pull(home=model_home)


@pytest.fixture(scope="session")
def encoder_dir(model_home: Path) -> Path:
    """The encoder of the guard's classifiers: the one that setup pulled, or fetched at the first use."""
    where = encoder.folder()
    return where if all((where / name).is_file() for name in encoder.FILES) else encoders.pull(model_home)


@pytest.fixture(scope="session", autouse=True)
def encoder_files(encoder_dir: Path) -> Path:
    """The encoder is where policies look for it, here and in the processes that tests start."""
    os.environ["NEWEL_ENCODER"] = str(encoder_dir)
    return encoder_dir
