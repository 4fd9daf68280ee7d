"""Beside a running training: label with one of its checkpoints after the other, as better ones appear.

    ROOT/current.json               which generation of labels a training reads now (see `dfa.data.offline`)
    ROOT/step-00000080-1f3a90c2     one generation, named after its checkpoint's step and content
    SNAPSHOTS/checkpoints/...       copies of the models: the training may delete its own at any time

The training's own plan says when it has ended. Killed and started again, a follower goes on where it was.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from dfa.data import storage
from dfa.data.offline import CURRENT_NAME, begin_generations, set_current
from dfa.data.shards import sha256_of
from dfa.label.slots import NothingFreeError
from dfa.train.checkpoint import (
    FOLDER,
    STATE_NAME,
    CorruptCheckpointError,
    copy_model,
    find_checkpoint,
    list_checkpoints,
    read_info,
)

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0
_ATTEMPTS = 3  # at one checkpoint
_GENERATION = re.compile(r"(step-\d+-[0-9a-f]{8})(_.*)?")

Made = TypeVar("Made")


@dataclass(frozen=True)
class FollowPlan:
    """Whom to follow.

    run: folder or address of the training.
    root: that of the generations.
    snapshots: that for the models' copies, in the form of a run's; no other follower's.
    which: the checkpoints to label with.
    planned_samples: how many samples the training consumes in all; None while its folder does not say.
    interval_s: between two looks.
    patience_s: how long the training may take to show up, and a free CPU once it has ended.
    """

    run: str
    root: str
    snapshots: str
    which: Literal["best", "latest"]
    planned_samples: Callable[[], int | None]
    interval_s: float
    patience_s: float


def follow(plan: FollowPlan, label: Callable[[str, str], Made]) -> list[Made]:
    """Call `label(checkpoint, folder)` for each newer checkpoint, until the training has ended and the last one is done.

    Args:
        label: makes the generation of the checkpoint NAME of `plan.snapshots`, in the folder that it is given; called
            again where it raised NothingFreeError.

    Returns:
        What `label` made, in order. The generation before the current one stays, because it may still be read.

    Raises:
        ValueError: no training shows up in `plan.run`, its last checkpoint is damaged, or the root is none for
            generations.
    """
    current, follower, made = begin_generations(plan.root), _Follower(plan), list[Made]()
    logger.info("following the checkpoints of %s into %s", plan.run, plan.root)
    while True:
        ended, newest = follower.has_ended(), follower.newest()
        if newest is not None and newest.name == current:
            if ended:
                return made
        elif newest is not None and follower.keep(newest, ended=ended):
            name = newest.name
            made.append(follower.when_free(lambda name=name: label(name, storage.join(plan.root, name))))
            set_current(plan.root, name)
            _forget(plan, {name, current or name})
            current = name
            logger.info("the labels of %s are current", name)
        time.sleep(plan.interval_s)


@dataclass(frozen=True)
class _Found:
    """A checkpoint of the training, and the name of its copy and its labels."""

    folder: str
    name: str


class _Follower:
    """What is known of the training so far."""

    def __init__(self, plan: FollowPlan) -> None:
        self.plan, self.run = plan, plan.run
        self.begin = time.monotonic()
        self.failures: dict[str, int] = {}
        self._said: dict[str, tuple[str, float]] = {}

    def has_ended(self) -> bool:
        """Whether the newest checkpoint is the last one of the training's plan."""
        planned, checkpoints = self.plan.planned_samples(), list_checkpoints(self.run)
        if planned is None:
            self._check_patience(bool(checkpoints))
            return False
        if not checkpoints:
            self._say("training", f"{self.run} has no checkpoint yet")
            return False
        try:
            info = read_info(checkpoints[-1])
        except CorruptCheckpointError as error:
            self._say("training", str(error))  # deleted meanwhile, or damaged: there will be a newer one
            return False
        self._say(
            "training",
            f"the training has seen {info.samples_seen} of {planned} samples at {storage.base_name(checkpoints[-1])}",
        )
        return info.samples_seen >= planned

    def _check_patience(self, has_checkpoints: bool) -> None:
        waited_s = time.monotonic() - self.begin
        what = f"{self.run} has {'checkpoints but ' if has_checkpoints else 'neither checkpoints nor '}"
        what += "no run.json" if has_checkpoints else "a run.json"
        if waited_s < self.plan.patience_s:
            self._say("training", f"{what}: waiting for jobs/train to start there")
            return
        address = storage.join(self.plan.root, CURRENT_NAME)
        if storage.read_json(address)["folder"] is None:
            storage.remove(address)  # nobody shall wait for labels that will not come
        raise ValueError(
            f"{what} after {waited_s:.0f} s: no training by jobs/train is in that folder; give its folder as run=, or"
            f" more time as label.follow_patience_s={self.plan.patience_s:g}"
        )

    def newest(self) -> "_Found | None":
        """The checkpoint to label with now, None where there is none."""
        if not list_checkpoints(self.run):
            return None
        try:
            folder = find_checkpoint(self.run, self.plan.which)
            content = sha256_of(storage.join(folder, STATE_NAME))
            return _Found(folder, f"{storage.base_name(folder)}-{content[:8]}")
        except (CorruptCheckpointError, FileNotFoundError) as error:
            self._say("checkpoint", f"deleted while it was looked at: {error}")
            return None

    def keep(self, found: "_Found", *, ended: bool) -> bool:
        """Copy a checkpoint's model; False where it is damaged, or deleted meanwhile: the next look may find a newer."""
        if self.failures.get(found.name, 0) >= _ATTEMPTS:
            return False
        try:
            copy_model(found.folder, self.plan.snapshots, name=found.name)
            return True
        except CorruptCheckpointError as error:
            self.failures[found.name] = self.failures.get(found.name, 0) + 1
            if ended and self.failures[found.name] >= _ATTEMPTS:
                raise ValueError(f"the training has ended, and its last checkpoint cannot be used: {error}") from error
            logger.warning("looking for another checkpoint: %s", error)
            return False

    def when_free(self, label: Callable[[], Made]) -> Made:
        """Label as soon as the cluster has room beside the training."""
        ended_at: float | None = None
        while True:
            try:
                return label()
            except NothingFreeError as error:
                self._say("cluster", f"waiting: {error}")
                if ended_at is None and self.has_ended():
                    ended_at = time.monotonic()
                if ended_at is not None and time.monotonic() - ended_at >= self.plan.patience_s:
                    raise
            time.sleep(self.plan.interval_s)

    def _say(self, topic: str, message: str) -> None:
        """Log what is new of a topic, and now and then what is not."""
        said, at = self._said.get(topic, ("", 0.0))
        if message != said or time.monotonic() - at >= _SAY_EVERY_S:
            logger.info("%s", message)
            self._said[topic] = (message, time.monotonic())


def _forget(plan: FollowPlan, kept: set[str]) -> None:
    """Delete older generations, with what was exported beside them, and the models that they were made with."""
    for entry in storage.list_names(plan.root):
        match = _GENERATION.fullmatch(entry)
        if match and match[1] not in kept:
            storage.remove_tree(storage.join(plan.root, entry))
    snapshots = storage.join(plan.snapshots, FOLDER)
    for entry in storage.list_names(snapshots):
        if entry not in kept:
            storage.remove_tree(storage.join(snapshots, entry))
