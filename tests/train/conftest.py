"""Fixtures of the tests of training."""

import pytest

from dfa.data.shards import ShardIndex
from tests.train.toy import write_toy_shards


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Twenty samples in three shards, to be read only."""
    return write_toy_shards(tmp_path_factory.mktemp("shards") / "toy", num_samples=20, samples_per_shard=7)
