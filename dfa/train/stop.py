"""A polite stop, asked for through a file in the run folder: the workers may be on other machines than the asker."""

import time

from dfa.data import storage

STOP_NAME = "stop-requested"
REMOTE_INTERVAL_S = 2.0


class StopFile:
    """The file RUN/stop-requested. Anyone may create it; the next run removes it.

    On a disk it is looked for each time; a remote store, where that is a request over the network, is asked at most every
    2 s.
    """

    def __init__(self, run: str) -> None:
        self._address = storage.join(run, STOP_NAME)
        self._interval_s = 0.0 if storage.is_local(run) else REMOTE_INTERVAL_S
        self._asked, self._looked_at = False, -float("inf")

    def ask(self) -> None:
        """Create the file."""
        self._asked = True
        storage.write_atomic(self._address, lambda file: None)

    def asked(self) -> bool:
        """Tell whether the file is there."""
        now = time.monotonic()
        if not self._asked and now - self._looked_at >= self._interval_s:
            self._asked, self._looked_at = storage.exists(self._address), now
        return self._asked

    def withdraw(self) -> None:
        """Remove the file if it is there."""
        storage.remove(self._address)
        self._asked = False
