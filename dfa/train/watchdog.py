"""Ends a process that hangs, so that somebody can start it again."""

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
_LOOKS = 10  # within the limit


class Watchdog:
    """Kills its process after `limit_s` seconds without progress, and writes down where every thread stood. Before the first
    progress it waits: a start may take as long as a cluster needs.

    A rank that waits for a lost one in a collective is helped by the collective's timeout; nothing else ends one that is
    stuck in a driver, on a dead disk or in the stream, and the others, and Ray, would wait with it.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._at = limit_s, math.inf
        self._over = threading.Event()

    def progress(self) -> None:
        """Call it at least every `limit_s` seconds."""
        self._at = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The body is watched."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._limit_s / _LOOKS):
            still_s = time.monotonic() - self._at
            if still_s > self._limit_s:
                logger.error("no progress for %.0f s: this process ends; every thread's place follows", still_s)
                faulthandler.dump_traceback()
                os._exit(EXIT_CODE)
