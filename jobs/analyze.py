"""Spectral analysis of predictions: `python -m jobs.analyze CONF analyze.prediction=FOLDER analyze.truth=FOLDER`.

Either folder holds PNG masks, arrays (.npy, .npz: label maps, or logits) or shards with masks; pairs are joined by file stem or
key. OUTPUT/analysis.json and analysis.html say how much of the cross entropy and of the IoU lies below each frequency,
what coarser grids would cost in mIoU and save in operations, and which one to take. Killed and started again it sums what
is missing, to the same numbers.
"""

import logging

from dfa import build
from dfa.analysis import stream, sums
from dfa.analysis.maps import join_pairs
from dfa.analysis.summary import summarise
from dfa.config import Config
from dfa.data import storage
from dfa.data.writer import write_rejects
from dfa.report.page import write_page
from dfa.report.spectral import spectral_report
from dfa.train.loop import start_ray
from jobs import Result, main

log = logging.getLogger("jobs.analyze")
NUMBERS_NAME, PAGE_NAME = "analysis.json", "analysis.html"
_REJECTS_SHOWN = 5
_DIGITS = 6


def work(config: Config) -> Result:
    """Sum all pairs, then write the numbers and the page."""
    analyze, settings = config.analyze, build.analysis_settings(config)
    prediction, truth = build.analysis_pairs(config)
    parts = join_pairs(prediction, truth, pairs_per_part=analyze.pairs_per_part)
    log.info("%d predictions, %d truths", prediction.key_count(), truth.key_count())
    costs = build.truncation_costs(config, analyze.grids)
    output = build.analysis_output(config)
    sums.begin(output, {"prediction": prediction.root, "truth": truth.root, "settings": repr(settings)})
    start_ray()
    done = stream.run(output, parts, settings, cpus=analyze.cpus)
    write_rejects(output, done.sums.rejects)
    _check_rejects(done.sums, config.data.max_reject_share)
    names = ("background", *build.class_set(config).names)
    found = summarise(
        done.sums,
        class_names=names,
        grids=analyze.grids,
        max_drop=analyze.max_drop,
        epsilon=analyze.epsilon or None,
        costs=costs,
    )
    storage.write_json(storage.join(output, NUMBERS_NAME), found)
    provenance = {"predictions": prediction.root, "ground truth": truth.root, "versions": _versions()}
    report = spectral_report(found, title=f"{storage.base_name(prediction.root)}, by frequency", provenance=provenance)
    page = write_page(report, storage.join(output, PAGE_NAME))
    curve = found["curve"]
    return {
        "job": "analyze",
        "output": output,
        "page": page,
        "num_pairs": found["num_pairs"],
        "num_rejects": found["num_rejects"],
        "rejects": [f"{each.key}: {each.reason}" for each in done.sums.rejects[:_REJECTS_SHOWN]],
        "analyzed_now": done.pairs_now,
        "seconds": round(done.seconds, 2),
        "pairs_per_s": round(done.pairs_now / done.seconds, 1) if done.seconds else None,
        "miou": round(100 * found["miou"], 2),
        "boundary_miou": None if found["boundary_miou"] is None else round(100 * found["boundary_miou"], 2),
        "loss_rate": {
            str(grid): round(rate, _DIGITS) for grid, rate in zip(curve["grid"], curve["loss_rate"], strict=True)
        },
        "recommended_grid": found["recommended_grid"],
        "best_grid": {each["model"]: each["best_grid"] for each in found["feature_truncation"]},
    }


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in build.versions().items())


def _check_rejects(found: sums.PairSums, allowed: float) -> None:
    num_rejects = len(found.rejects)
    share = num_rejects / max(1, num_rejects + found.labels.num_images)
    shown = "; ".join(f"{each.key}: {each.reason}" for each in found.rejects[:3])
    if share > allowed:
        raise ValueError(
            f"{num_rejects} pairs cannot be analysed ({share:.2%}), allowed are data.max_reject_share={allowed:.2%}: {shown}"
        )
    if num_rejects:
        log.warning("%d pairs are left out: %s", num_rejects, shown)


if __name__ == "__main__":
    main(__doc__, work, kept=("run", "analyze.output"))
