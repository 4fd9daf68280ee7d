"""Train variants of one configuration on the same shards and compare them: `python -m jobs.ablate CONF VARIANTS key=value ...`.

VARIANTS is a YAML file (or a name in conf/) with `variants`, names to differences from CONF, `seeds`, values of train.seed, and, if
all variants share some, `common` differences. The command line overrules `common`, and a variant overrules both:

    seeds: [0, 1]
    common: {cam.propagation: 1}
    variants:
      dfa: {}
      plain: {loss.alignment: 0, loss.rectification: 0}

Each is trained in RUN/ablation/NAME-SEED and scored as `evaluate.parts` says; what is done is not done again. The table is in
RUN/ablation/ablation.md, its numbers in ablation.json.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfa.config import load, read_yaml
from dfa.data import storage
from jobs import Result, evaluate, run, train
from jobs.submitted import absolute_paths

log = logging.getLogger("jobs.ablate")
_FOLDER, _RESULT, _TABLE = "ablation", "ablation.json", "ablation.md"
_SCORES = ("seed_miou", "mask_miou", "val_miou", "val_miou_no_crf")


@dataclass(frozen=True)
class Ablation:
    """Which trainings are compared. variants: name -> `key=value` overrides of the configuration; common: those of all."""

    seeds: tuple[int, ...]
    variants: Mapping[str, tuple[str, ...]]
    common: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> "Ablation":
        """Raises ValueError where `content` is not of the form that this module describes."""
        unknown = sorted(set(content) - {"seeds", "common", "variants"})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}, allowed are seeds, common and variants")
        variants, seeds = content.get("variants"), content.get("seeds", [0])
        common = content.get("common", {})
        if not isinstance(common, dict):
            raise ValueError(f"common must be a mapping {{section.key: value}}, got {common!r}")
        if not isinstance(variants, dict) or not variants:
            raise ValueError("variants must map names to differences, {name: {section.key: value}}")
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise ValueError(f"seeds must be a list of whole numbers, got {seeds!r}")
        each = {str(name): _overrides(str(name), changes) for name, changes in variants.items()}
        return cls(tuple(seeds), each, _typed(common))


def _typed(changes: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())


def _overrides(name: str, changes: Any) -> tuple[str, ...]:
    if not name or set(name) & set("/\\ ") or name.startswith("."):
        raise ValueError(
            f"variant {name!r} is the name of a folder too: no slashes, no spaces, no dot at its beginning"
        )
    if not isinstance(changes, dict):
        raise ValueError(f"variant {name} must be a mapping {{section.key: value}}, got {changes!r}")
    return _typed(changes)


def work(conf: str, ablation: Ablation, overrides: list[str]) -> Result:
    """Train and score what is missing.

    Raises:
        ValueError: a variant or an override is not valid; found before anything is trained.
    """
    folder = storage.join(absolute_paths(load(conf, overrides), kept=("run",)).run, _FOLDER)
    plans = {}
    for seed in ablation.seeds:
        for name, changes in ablation.variants.items():
            own = [f"run={storage.join(folder, f'{name}-{seed}')}", f"train.seed={seed}"]
            try:
                told = [*ablation.common, *overrides, *changes, *own]
                plans[name, seed] = absolute_paths(load(conf, told), kept=("run",))
            except ValueError as error:
                raise ValueError(f"variant {name}: {error}") from error
    rows: list[Result] = []
    for number, ((name, seed), config) in enumerate(plans.items(), start=1):
        log.info("== %s, seed %d (%d of %d)", name, seed, number, len(plans))
        if train.work(config)["interrupted"]:
            raise KeyboardInterrupt
        scores = evaluate.work(config)
        rows.append({"variant": name, "seed": seed} | {key: scores[key] for key in _SCORES if key in scores})
        _keep(folder, ablation, rows)
    return {"job": "ablate", "table": storage.join(folder, _TABLE), "rows": rows}


def _keep(folder: str, ablation: Ablation, rows: list[Result]) -> None:
    """Table and numbers so far."""
    text = table(ablation, rows)
    for name, content in ((_TABLE, text), (_RESULT, json.dumps({"rows": rows}, indent=1) + "\n")):
        data = content.encode()
        storage.write_atomic(storage.join(folder, name), lambda file, data=data: file.write(data))
    log.info("\n%s", text)


def table(ablation: Ablation, rows: list[Result]) -> str:
    """Markdown: a variant a row, mean over its seeds and the range where there are several, mIoU in percent."""
    columns = [key for key in _SCORES if any(key in row for row in rows)]
    lines = ["| variant | " + " | ".join(columns) + " | differences |", "|" + "---|" * (len(columns) + 2)]
    for name, changes in ablation.variants.items():
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            cells = [_cell([row[key] for row in mine if row.get(key) is not None]) for key in columns]
            lines.append(f"| {name} | {' | '.join(cells)} | {' '.join(f'`{each}`' for each in changes)} |")
    if ablation.common:
        lines += ["", f"All: {' '.join(f'`{each}`' for each in ablation.common)}"]
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", help="a name in conf/ or the path of a YAML file")
    parser.add_argument("variants", help="a name in conf/ or the path of a YAML file with variants and seeds")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="differences from CONF, of all variants"
    )
    arguments = parser.parse_args()

    def all_of_it() -> Result:
        try:
            path, content = read_yaml(arguments.variants)
        except ValueError as error:
            raise ValueError(f"VARIANTS: {error}") from error
        try:
            ablation = Ablation.from_mapping(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return work(arguments.conf, ablation, arguments.overrides)

    run(all_of_it)


if __name__ == "__main__":
    main()
