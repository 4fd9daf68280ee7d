"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real VOC and COCO samples, from the environment variable DFA_SAMPLE_DATA; skips without it."""
    address = os.environ.get("DFA_SAMPLE_DATA")
    if not address:
        pytest.skip("DFA_SAMPLE_DATA is not set: no real sample data")
    if not Path(address).is_dir():
        pytest.skip(f"DFA_SAMPLE_DATA={address} is no folder: no real sample data")
    return Path(address)
