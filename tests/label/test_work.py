"""What a worker of the factory does for itself."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource
from dfa.label.work import keep_freed_memory
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(40 * 2**20, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = [faults() for _ in range(3)][-1]
keep_freed_memory()
print(before, [faults() for _ in range(3)][-1])
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_large_block_is_not_fetched_from_the_system_again():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before > 10  # pages, or huge pages
    assert after <= 2
