"""Whose a folder of labels is: what it holds, and which job writes it now.

plan.json says which labels of which images these are. While a job writes, it holds a lock of the operating system on the
folder, which ends with the job however that ends. Where there are no such locks (object stores, some network folders) two
jobs may meet: of the same labels they do the same work twice, to the same bytes (at worst one of them stops with an error
that starting it again mends); of others, the job that came first stops at its next shard, because plan.json no longer is
its own.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dfa.data import storage
from dfa.data.lock import alone_in
from dfa.data.planning import PLAN_NAME
from dfa.data.shards import FORMAT_VERSION, INDEX_NAME
from dfa.data.writer import write_json

PLAN_KIND = "dfa-label-plan"

logger = logging.getLogger(__name__)


class UnwritableError(ValueError):
    """The labels' folder cannot be written: full, read-only, or gone. What is committed stays as it is."""


@dataclass(frozen=True)
class Claim:
    """The labels that a folder shall hold.

    hash: of all that decides the labels besides the images. image_plan_hash: of the images' sharding.
    origin: address of the images, where the folder is to be theirs alone; "": other images may take it over.
    """

    root: str
    class_names: Sequence[str]
    hash: str
    image_plan_hash: str
    origin: str = ""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder that of these labels, and keep other jobs out. Older labels of other content there are replaced
        shard by shard.

        Raises:
            ValueError: another job is writing here, the folder holds something else, or cannot be written.
        """
        with _writable(self.root):
            storage.make_folder(self.root)
        busy = f"another job is labelling into {self.root}; wait for it, or choose another folder"
        with alone_in(self.root, busy=busy):
            with _writable(self.root):
                self._take()
            yield

    def check(self) -> None:
        """Raise a ValueError where another job has taken the folder over."""
        if storage.read_json(storage.join(self.root, PLAN_NAME)) != self._plan():
            raise ValueError(
                f"another job labels into {self.root}, with another model, other settings or other images, and has taken"
                " it over; give one of them another folder"
            )

    def reopen(self) -> None:
        """Take back that the folder is finished, before shards are added or done again."""
        with _writable(self.root):
            storage.remove(storage.join(self.root, INDEX_NAME))

    def _plan(self) -> dict[str, Any]:
        plan = {"kind": PLAN_KIND, "format": FORMAT_VERSION, "class_names": list(self.class_names)}
        plan |= {"hash": self.hash, "image_plan_hash": self.image_plan_hash}
        return plan | ({"origin": self.origin} if self.origin else {})

    def _take(self) -> None:
        root, wanted, address = self.root, self._plan(), storage.join(self.root, PLAN_NAME)
        if storage.exists(address):
            found = storage.read_json(address)
            if found == wanted:
                return
            if not isinstance(found, dict) or found.get("kind") != PLAN_KIND:
                raise ValueError(f"{address} is no plan of dfa labels; choose an empty or a new folder")
            if self.origin and found.get("origin", self.origin) != self.origin:
                raise ValueError(
                    f"{root} holds the masks of {found['origin']}, not of {self.origin}; choose another folder (of"
                    " jobs.predict: predict.output), or delete this one"
                )
            _warn_of_replacing(root, found, wanted)
            self.reopen()
        elif names := [name for name in storage.list_names(root) if not name.endswith(storage.PARTIAL_SUFFIX)]:
            raise ValueError(
                f"{root} is not empty and holds no dfa labels ({', '.join(names[:4])}); choose an empty or a new folder"
            )
        write_json(address, wanted)


def _warn_of_replacing(root: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = {"image_plan_hash": "images", "class_names": "classes", "hash": "settings or model"}
    differ = [said for name, said in names.items() if found.get(name) != wanted[name]]
    logger.warning(
        "%s holds labels of other %s; they are replaced, shard by shard (give another folder to keep them)",
        root,
        " and other ".join(differ) or "form",
    )


@contextmanager
def _writable(root: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"labels cannot be written to {root}: {error}") from error
