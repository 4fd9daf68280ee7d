"""A process that stands still ends; one that moves does not."""

import subprocess
import sys

from dfa.train.watchdog import EXIT_CODE

CODE = """
import threading, time
from dfa.train.watchdog import Watchdog

def stuck_on_a_dead_disk():
    time.sleep(60)

dog = Watchdog(0.5)
with dog.watching():
    time.sleep(1.0)  # the start may take long
    for _ in range(8):
        dog.progress()
        time.sleep(0.2)
    print("trained", flush=True)
    if {hangs}:
        stuck_on_a_dead_disk()
time.sleep(1.0)  # nobody watches any more
print("ended")
"""


def watched(hangs: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE.format(hangs=hangs)], capture_output=True, text=True, timeout=50)


def test_a_process_that_stands_still_ends_and_says_where_it_stood() -> None:
    done = watched(hangs=True)
    assert (done.returncode, done.stdout) == (EXIT_CODE, "trained\n")
    assert "no progress for" in done.stderr and "in stuck_on_a_dead_disk" in done.stderr


def test_a_process_that_moves_on_is_left_alone_and_so_is_one_that_has_ended() -> None:
    done = watched(hangs=False)
    assert (done.returncode, done.stdout) == (0, "trained\nended\n")
