"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# No cluster that somebody left on this machine, nor the address of one that died.
os.environ["RAY_ADDRESS"] = "local"
# With it, every process that Ray starts compiles torch anew where the installer did not.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read real photographs are the stage `photographs`, before pytest chooses by markers."""
    for item in items:
        if "sample_data" in getattr(item, "fixturenames", ()):
            item.add_marker("photographs")


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real VOC and COCO samples, from the environment variable DFA_SAMPLE_DATA; skips without it."""
    address = os.environ.get("DFA_SAMPLE_DATA")
    if not address:
        pytest.skip("DFA_SAMPLE_DATA is not set: no real sample data")
    if not Path(address).is_dir():
        pytest.skip(f"DFA_SAMPLE_DATA={address} is no folder: no real sample data")
    return Path(address)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray of two CPUs for all tests that need it."""
    import ray

    from dfa.train.loop import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()
