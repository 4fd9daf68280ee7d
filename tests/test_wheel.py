"""A wheel holds all that a checkout has, and the command `dfa` runs every job from anywhere."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from jobs.__main__ import JOBS

ROOT = Path(__file__).parent.parent


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy: a build leaves folders in its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("conf", "dfa", "jobs", "cluster"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = python("-c", code, str(source / "wheel"), cwd=source)
    assert built.returncode == 0, built.stderr
    return next((source / "wheel").glob("*.whl"))


def test_a_wheel_holds_every_module_every_recipe_and_the_tiny_clip_and_nothing_beside_its_two_packages(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path for folder in ("dfa", "jobs") for path in (ROOT / folder).rglob("*.py")}
    wanted = {path.relative_to(ROOT).as_posix() for path in modules | set((ROOT / "dfa/world").glob("tiny_clip.*"))}
    recipes = [path for path in (ROOT / "conf").rglob("*") if path.suffix in (".yaml", ".json")]
    wanted |= {f"dfa/{path.relative_to(ROOT).as_posix()}" for path in recipes}
    wanted.add("jobs/cluster/BENCHMARKS.md")
    assert held == wanted


def test_an_installed_package_finds_its_files_outside_the_checkout(wheel, tmp_path):
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "from dfa.config import class_set, load, project_file",
        "from jobs.size import PAGE",
        "clip = load('demo').clip",
        "load('coco_dfa_vitl'), class_set('classes_coco')",
        "print(project_file(clip.model), project_file(clip.checkpoint), PAGE)",
    )
    done = python("-c", "\n".join(code), cwd=elsewhere, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    files = ("dfa/conf/tiny_clip.json", "dfa/world/tiny_clip.safetensors", "jobs/cluster/BENCHMARKS.md")
    assert done.stdout.split() == [str(installed / file) for file in files]
    assert all((installed / file).is_file() for file in files)


def test_the_command_dfa_is_the_one_that_runs_jobs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dfa": "jobs.__main__:main"}


def test_the_command_lists_every_job_with_a_line_of_its_own():
    runnable = {
        path.stem if path.parent == ROOT / "jobs" else path.parent.name
        for path in [*(ROOT / "jobs").glob("*.py"), *(ROOT / "jobs").glob("*/__main__.py")]
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8") and path != ROOT / "jobs/__main__.py"
    }
    assert set(JOBS) == runnable
    shown = python("-m", "jobs", "--help", cwd=ROOT).stdout
    lines = [line for line in shown.partition("jobs:\n")[2].splitlines()]
    assert [line.split()[0] for line in lines] == list(JOBS)
    assert all(len(line) <= 120 for line in lines)
    assert python("-m", "jobs", cwd=ROOT).stdout == shown


@pytest.mark.parametrize("arguments", [["size", "images=100", "cpus=8"], ["bench", "--help"], ["size", "image=100"]])
def test_dfa_job_is_python_m_jobs_job(arguments, tmp_path):
    name, *rest = arguments
    one = python("-m", "jobs", name, *rest, cwd=tmp_path, PYTHONPATH=str(ROOT))
    other = python("-m", f"jobs.{name}", *rest, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (one.returncode, one.stdout) == (other.returncode, other.stdout)
    assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


def test_a_mistyped_job_is_answered_with_the_nearest():
    done = python("-m", "jobs", "trian", cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "error: there is no job 'trian'; did you mean 'train'?\n")
