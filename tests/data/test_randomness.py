"""Seeds are the same wherever they are made."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

from dfa.data import randomness
from dfa.data.randomness import stable_seed

ROOT = Path(__file__).parents[2]


def test_a_seed_is_the_same_in_another_process():
    assert doctest.testmod(randomness) == (0, 1)  # the number that stands in the docstring, made in another process
    code = "from dfa.data.randomness import stable_seed; print(stable_seed(1, 'key', 2))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == str(stable_seed(1, "key", 2))


def test_keys_that_differ_in_one_part_have_different_seeds():
    keys = [(1, 2, "a"), (2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (12, 0, "a"), (1, 20, "a")]
    assert len({stable_seed(*key) for key in keys}) == len(keys)


def test_no_seed_is_pythons_hash():
    users = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("dfa", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash"
    ]
    assert users == []
