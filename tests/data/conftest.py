"""Fixtures of the tests of shards."""

import pytest

from dfa.data.sources import Sample
from tests.data.shard_sets import save_image, save_mask


@pytest.fixture
def samples(tmp_path):
    """Ten samples: every third without a mask, one of them a PNG."""
    folder = tmp_path / "images"
    folder.mkdir()
    found = []
    for number in range(10):
        image = save_image(folder / f"{number}.{'png' if number == 5 else 'jpg'}", seed=number)
        mask = save_mask(folder / f"{number}_mask.png") if number % 3 else None
        found.append(Sample(f"key{number}", image, (1,) if number % 2 else (1, 2), mask))
    return found
