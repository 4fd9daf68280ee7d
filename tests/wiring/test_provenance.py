"""What run.json says of the code, in a checkout and where none is."""

import re
import subprocess
from pathlib import Path

import pytest

from dfa.build import provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """The package as Ray or an image brings it: in a folder without .git."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize(("named", "commit"), [(COMMIT, COMMIT), ("", None), (None, None)])
def test_without_a_checkout_the_commit_is_the_one_that_the_environment_names(named, commit, monkeypatch):
    monkeypatch.delenv("DFA_COMMIT", raising=False)
    if named is not None:
        monkeypatch.setenv("DFA_COMMIT", named)  # empty: an image that was built without --build-arg COMMIT
    assert provenance.code() == {"commit": commit, "dirty": None}


def test_a_checkout_speaks_for_itself(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    (tmp_path / "provenance.py").touch()
    for command in (["init", "-q"], ["add", "provenance.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("DFA_COMMIT", COMMIT)
    found = provenance.code()
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]) and found["commit"] != COMMIT
    assert found["dirty"] is False


def test_an_installed_package_inside_somebodys_checkout_is_not_of_their_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    (tmp_path / "provenance.py").touch()  # as in an environment in their folder: there, and not theirs
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.delenv("DFA_COMMIT", raising=False)
    assert provenance.code() == {"commit": None, "dirty": None}


def test_the_image_takes_the_commit_that_its_build_was_given():
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert text.index("\nARG COMMIT=\n") < text.index("DFA_COMMIT=$COMMIT")
    assert "--build-arg COMMIT=$(git rev-parse HEAD)" in (ROOT / "cluster/README.md").read_text()
