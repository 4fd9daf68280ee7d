"""One training in a run folder at a time: two would write each other's checkpoints and metrics."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from dfa.data import storage

LOCK_NAME = "lock"
_INTERVAL_S = 1.0
logger = logging.getLogger(__name__)


@contextmanager
def alone_in(run: str, *, patience_s: float = 60.0) -> Iterator[None]:
    """Hold the folder `run` while the block runs.

    By a lock of the operating system on RUN/lock, which ends with its process however that ends, and holds between machines where
    their shared file system has such locks. A run before this one may still be writing its last checkpoint: it is waited for. At a
    remote address, and where the file system has no locks, nothing is held.

    Raises:
        ValueError: somebody else holds it for longer than `patience_s`.
    """
    if not storage.is_local(run):
        yield
        return
    storage.make_folder(run)
    path = os.path.join(storage.local_path(run), LOCK_NAME)
    with open(path, "a+", encoding="utf-8") as file:
        _hold(file, run, time.monotonic() + patience_s)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _hold(file: TextIO, run: str, deadline: float) -> None:
    waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{run} is being trained by {holder}; give this run another folder (run=...), or end that one first"
                ) from None
            if not waited:
                logger.warning("%s is held by %s; waiting for it to end", run, holder)
            waited = True
            time.sleep(_INTERVAL_S)
        except OSError as error:
            logger.warning("%s has no locks (%s): see to it that nothing else trains there", run, error)
            return
