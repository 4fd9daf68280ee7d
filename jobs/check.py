"""Look at a PASCAL VOC or COCO folder before sharding it: `python -m jobs.check ROOT`.

Says what is fine, missing or wrong, where the official parts are, and the commands to run next. Exit code 1 where something
that is needed is missing or wrong.
"""

import argparse
import logging
import shlex

from dfa.config import class_set
from dfa.data.inspection import Inspection, inspect
from jobs import Result, run

log = logging.getLogger("jobs.check")


def look(root: str, *, num_sampled: int = 100) -> Inspection:
    """Inspect, and tell all findings."""
    found = inspect(root, voc=class_set("classes_voc"), coco=class_set("classes_coco"), num_sampled=num_sampled)
    for each in found.findings:
        log.info("%-8s%s%s", each.state, each.what, f" <- {each.source}" if each.source else "")
    return found


def work(root: str, *, num_sampled: int) -> Result:
    """Inspect, tell, and return all findings."""
    found = look(root, num_sampled=num_sampled)
    commands = [f"python -m jobs.shard {shlex.join(command)}" for command in found.commands]
    log.info("%s", "\n  ".join(["then:", *commands]) if commands else "nothing can be sharded yet")
    return {
        "job": "check",
        "kind": found.kind,
        "root": root,
        "num_problems": found.num_problems,
        "findings": [[each.state, each.what, each.source] for each in found.findings],
        "commands": commands,
    }


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "root", help="a VOC devkit (or the folder above), or a folder with COCO's images and annotations"
    )
    parser.add_argument("--sample", type=int, default=100, help="images and masks of each split that are decoded (100)")
    arguments = parser.parse_args(argv)
    results = list[Result]()

    def keep() -> Result:
        results.append(work(arguments.root, num_sampled=max(0, arguments.sample)))
        return results[0]

    run(keep)
    if results[0]["num_problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
