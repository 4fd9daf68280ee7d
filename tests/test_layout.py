"""The tree keeps its rules: imports point one way, each dependency has its doors, the README's tree is the disk."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["core", "data", "clip", "label", "analysis", "model", "report", "train", "world", "config", "build"]
DOORS = {
    "ray": {
        "dfa/analysis/stream",
        "dfa/data/stream",
        "dfa/label/slots",
        "dfa/train/callbacks",
        "dfa/train/cluster",
        "dfa/train/gauges",
        "dfa/train/loop",
        "jobs/",
    },
    "deepspeed": {"dfa/train/engine", "dfa/train/lean_deepspeed"},
    "open_clip": {"dfa/clip", "dfa/world/pretrain", "jobs/bench/features"},
    "timm": {"dfa/clip/second"},
    "webdataset": {"dfa/data/shards", "jobs/bench/contenders"},
    "pydensecrf": {"dfa/label/crf"},
    "matplotlib": {"dfa/report/figures"},
    "omegaconf": {"dfa/config"},
    "fsspec": {"dfa/data/storage"},
    "mlflow": {"dfa/train/tracking"},
    "pycocotools": {"dfa/data/sources", "dfa/label/export"},
}
FORBIDDEN_NAMES = {"utils", "common", "base", "registry", "types", "helpers"}
TOP_LEVEL = {"dfa", "jobs", "cluster", "conf", "tests", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"}


def _modules() -> list[Path]:
    return sorted(path for folder in ("dfa", "jobs") for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(found)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("path", [path for path in _modules() if ROOT / "dfa" in path.parents[1:]], ids=_name)
def test_imports_point_to_the_same_package_or_an_earlier_one(path):
    own = path.relative_to(ROOT / "dfa").parts[0]
    allowed = ORDER[: ORDER.index(own) + 1]
    for module in _imports(path):
        parts = module.split(".")
        assert parts[0] != "jobs", f"{_name(path)} imports {module}"
        if parts[0] == "dfa" and len(parts) > 1:
            assert parts[1] in allowed, f"{_name(path)} ({own}) imports {module}; allowed are {allowed}"


@pytest.mark.parametrize("dependency", DOORS)
def test_a_dependency_is_imported_at_its_doors_only(dependency):
    users = {_name(path) for path in _modules() if dependency in {module.split(".")[0] for module in _imports(path)}}
    strangers = {user for user in users if not any(user.startswith(door) for door in DOORS[dependency])}
    assert not strangers, f"{dependency} is imported by {sorted(strangers)}; its doors are {sorted(DOORS[dependency])}"


def test_only_build_and_jobs_know_the_configuration():
    readers = {
        _name(path)
        for path in (ROOT / "dfa").rglob("*.py")
        if any(f"{module}.".startswith("dfa.config.") for module in _imports(path))
    }
    assert {reader for reader in readers if not reader.startswith(("dfa/build/", "dfa/config/"))} == set()


def test_core_needs_torch_alone():
    code = "import sys, dfa.core.affinity, dfa.core.cam, dfa.core.metrics, dfa.core.rectify, dfa.core.spectrum, dfa.core.transport,"
    code += " dfa.core.analysis.cost, dfa.core.analysis.gradients, dfa.core.analysis.labels, dfa.core.analysis.truncation, dfa.core.ffr;"
    code += (
        f"print([m for m in {sorted([*DOORS, 'PIL', 'pyarrow', 'safetensors', 'torchvision'])} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_a_module_can_be_imported(path):
    """Those that nothing else of the quick stage imports too: the benchmarks."""
    importlib.import_module(_name(path).replace("/", ".").removesuffix(".__init__"))


def test_no_module_has_a_name_that_says_nothing():
    assert not [_name(path) for path in _modules() if path.stem in FORBIDDEN_NAMES]


def test_the_top_level_is_fixed():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_the_readme_shows_the_tree_that_is_on_disk():
    tree = re.search(r"## The tree\s+```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree, "README.md has no section 'The tree' with a code block"
    stack, shown = [], set()
    for line in tree.group(1).splitlines():
        entry = re.match(r"( *)([\w.]+/?)", line)
        if not entry:
            continue
        depth = len(entry.group(1)) // 2
        stack = [*stack[:depth], entry.group(2).rstrip("/")]
        shown.add("/".join(stack))
    on_disk = {_name(path) + ".py" for path in _modules() if path.name != "__init__.py"}
    on_disk |= {str(path.parent.relative_to(ROOT)) for path in _modules()} | {"cluster", "conf", "tests"}
    assert shown == on_disk, f"only in README: {sorted(shown - on_disk)}; only on disk: {sorted(on_disk - shown)}"
