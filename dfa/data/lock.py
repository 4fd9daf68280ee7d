"""One job at a time in a folder."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dfa.data import storage

_BUSY = (errno.EAGAIN, errno.EACCES)
_INTERVAL_S = 0.5
logger = logging.getLogger(__name__)


@contextmanager
def alone_in(folder: str, *, busy: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the system's lock on a folder that is there: it needs no file, and ends with its process however that ends.

    It holds between machines where their shared file system has such locks. At a remote address, and where the file system has
    none, nothing is held.

    Raises:
        ValueError: another process holds it for longer than `patience_s`; `busy` is the message.
    """
    if not storage.is_local(folder):
        yield
        return
    handle = os.open(storage.local_path(folder), os.O_RDONLY)
    try:
        deadline, told = time.monotonic() + patience_s, False
        while not _take(handle, folder):
            if time.monotonic() >= deadline:
                raise ValueError(busy)
            if not told:
                logger.warning("%s is in use; waiting for that to end", folder)
            told = True
            time.sleep(_INTERVAL_S)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: str) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        logger.debug("%s: no lock on this file system (%s)", folder, error)
    return True
