"""The tests themselves: pytest finds every file, CI runs every stage, and no test module lends code to another."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# Their helpers are still to be moved out.
STILL_LENDING = {"tests.core.analysis.test_cross_entropy", "tests.train.test_step"}


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(TESTS.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def _collected(folder: pytest.Directory) -> Iterator[Path]:
    """The test modules that pytest finds below a folder; nothing is imported."""
    for found in folder.collect():
        if isinstance(found, pytest.Directory):
            yield from _collected(found)
        elif isinstance(found, pytest.Module):
            yield found.path


def test_pytest_collects_every_file_that_holds_a_test(request):
    """A folder named `build` was once passed over: that name is among pytest's `norecursedirs`."""
    with_tests = {
        path
        for path, tree in _trees()
        if path.name.startswith("test_")
        or any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
    }
    found = set(_collected(pytest.Package.from_parent(request.session, path=TESTS)))
    assert len(with_tests) > 80
    assert not with_tests - found, f"never collected: {sorted(map(str, with_tests - found))}"


def _settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]


def test_the_quick_stage_and_the_rest_are_every_test():
    names = [line.partition(":")[0] for line in _settings()["markers"]]
    rest = " or ".join(names)
    assert f"-m 'not ({rest})'" in _settings()["addopts"], "the quick stage is what has none of the markers"
    assert f'-m "{rest}"' in (ROOT / ".ci/run").read_text(encoding="utf-8"), "CI runs what has one of them"
    page = (TESTS / "README.md").read_text(encoding="utf-8")
    assert f'-m "{rest}"' in page
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(names)


def test_no_test_module_imports_another():
    lenders = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
        if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")
        if module not in STILL_LENDING
    }
    assert not lenders
