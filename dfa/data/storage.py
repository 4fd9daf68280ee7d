"""Where shards lie: the few file operations that they need, all by address string.

Local folders today. A remote store can be added here without touching a caller: each needs only whole-object reads,
listings and an atomic put, and the order of writes (the commit marker last) already fits stores without renames.
"""

import json
import os
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO, cast

PARTIAL_SUFFIX = ".partial"


def local_path(address: str) -> str:
    """Return the local path behind an address.

    Raises:
        ValueError: the address names a remote store.
    """
    if address.startswith("file://"):
        return address[len("file://") :]
    if "://" in address:
        raise ValueError(f"{address!r} is a remote address; shards are read from and written to local folders")
    return address


def join(root: str, name: str) -> str:
    """Return the address of `name` inside the folder `root`."""
    return root.rstrip("/") + "/" + name if root not in ("", "/") else root + name


def exists(address: str) -> bool:
    """Tell whether a file or folder is there."""
    return os.path.exists(local_path(address))


def size_bytes(address: str) -> int:
    """Return the size of a file in bytes."""
    return os.path.getsize(local_path(address))


def list_names(folder: str) -> list[str]:
    """Return the sorted names of what a folder holds."""
    return sorted(os.listdir(local_path(folder)))


def make_folder(folder: str) -> None:
    """Create a folder and its parents; fine if it is there already."""
    os.makedirs(local_path(folder), exist_ok=True)


def remove(address: str) -> None:
    """Delete a file if it is there."""
    if exists(address):
        os.remove(local_path(address))


def open_read(address: str) -> BinaryIO:
    """Open a file for reading bytes."""
    return cast(BinaryIO, open(local_path(address), "rb"))


def read_bytes(address: str) -> bytes:
    """Return the whole content of a file."""
    with open_read(address) as file:
        return file.read()


def read_json(address: str) -> Any:
    """Read a JSON file; a ValueError names it if it is broken."""
    try:
        return json.loads(read_bytes(address))
    except ValueError as error:
        raise ValueError(f"{address} is not valid JSON: {error}") from error


def write_atomic(address: str, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is either complete under its name or not there: temporary name, fsync, rename.

    The temporary name is hidden and unique, so that two attempts at the same file cannot mix their bytes. A killed
    attempt leaves a `*.partial` file behind, which nobody reads.
    """
    path = local_path(address)
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "xb") as file:
            write(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    _sync_folder(folder or ".")


def _sync_folder(folder: str) -> None:
    """Make the rename itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
