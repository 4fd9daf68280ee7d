"""What a result was made with: packages, code, machine."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

COMMIT_VARIABLE = "DFA_COMMIT"
_PACKAGES = ("torch", "ray", "deepspeed", "open_clip_torch", "pydensecrf2", "webdataset", "pyarrow", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def code() -> dict[str, Any]:
    """Commit of the git checkout that this package belongs to, and whether tracked files differ from it.

    Images, wheels and what `ray job submit` sends come without .git: there it is the commit that DFA_COMMIT names, and whether
    files differ is not known. None: nobody said.
    """
    file = Path(__file__).resolve()
    folder = file.parent
    # A wheel in an environment inside somebody's checkout is not part of that checkout: git does not track its files.
    tracked = _git(folder, "ls-files", "--error-unmatch", file.name) is not None
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if commit is None:
        return {"commit": os.environ.get(COMMIT_VARIABLE) or None, "dirty": None}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow disk
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """The machine that the job was started on; the workers' may be others."""
    gpus = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }
