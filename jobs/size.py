"""Hours and costs of a data set on a cluster: `python -m jobs.size images=82081 gpus=8 cpus=64 steps=80000 batch_size=8`.

Rates come from cluster/BENCHMARKS.md, or from the command where they are given or were never measured: step_ms (a step of
batch_size images on one GPU: `step_s` of a run of one worker) and cam_ms (the CAM of an image on one GPU); without GPUs,
both on the CPUs. What is not known is null, and listed. Prices are only what you give: gpu_price and cpu_price, of one for
an hour. The formulas are in cluster/SIZING.md.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import Result, run

_INSTALLED = Path(__file__).resolve().parent / "cluster"  # a wheel carries the page inside this package
PAGE = (_INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "cluster") / "BENCHMARKS.md"
_SECTION = r"<!-- bench:{0} -->(.*?)<!-- /bench:{0} -->"
_LABELLING = r"Overhead[^*]*\*\*([\d.]+) %\*\*\. CPU ms an image: CAM ([\d.]+), CRF ([\d.]+)"


@dataclass(frozen=True)
class Wanted:
    """What is to be done, with what, at which rates. None: not given.

    cpus: of the whole cluster. crf_cpus: those of them on which the CRF may run (`label.crf_resource`); None: all.
    crf_ms: CPU milliseconds of an image. rest_ms: what labelling takes of the CPUs beside CAM and CRF: reading, encoding, Ray,
    waiting. read_ms: CPU milliseconds in which one training image is read and cut. scaling: share of the ideal speed that
    training reaches on all GPUs. gpu_price, cpu_price: of one for an hour, in any currency.
    """

    images: int
    gpus: int
    cpus: int
    steps: int | None = None
    batch_size: int = 16
    step_ms: float | None = None
    read_ms: float | None = None
    scaling: float = 1.0
    cam_ms: float | None = None
    crf_ms: float | None = None
    rest_ms: float | None = None
    gpu_price: float | None = None
    cpu_price: float | None = None
    crf_cpus: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}, a number is wanted")
        for name in ("images", "cpus", "crf_cpus", "steps", "batch_size", "step_ms", "cam_ms", "crf_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, more than 0 is wanted")
        for name in ("gpus", "read_ms", "rest_ms", "gpu_price", "cpu_price"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}, 0 or more is wanted")
        if self.crf_cpus is not None and self.crf_cpus > self.cpus:
            raise ValueError(f"crf_cpus is {self.crf_cpus}, at most all cpus={self.cpus} are wanted")
        if not 0 < self.scaling <= 1:
            raise ValueError(f"scaling is {self.scaling}, allowed is more than 0 to 1")


def parse(arguments: Sequence[str]) -> Wanted:
    """`name=number` pairs.

    Raises:
        ValueError: an unknown name (with the nearest known one), no number, one twice, or images, gpus or cpus missing.
    """
    kinds = {field.name: int if field.type in (int, int | None) else float for field in dataclasses.fields(Wanted)}
    given: dict[str, float] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not of the form name=number")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            raise ValueError(
                f"unknown name {name!r}; {f'did you mean {near[0]!r}?' if near else f'known are {[*kinds]}'}"
            )
        if name in given:
            raise ValueError(f"{name} is given twice")
        try:
            given[name] = kinds[name](text)
        except ValueError:
            raise ValueError(
                f"{name} is {text!r}, {'a whole' if kinds[name] is int else 'a'} number is wanted"
            ) from None
    missing = [name for name in ("images", "gpus", "cpus") if name not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: give images=N gpus=N cpus=N")
    return Wanted(**given)  # type: ignore[arg-type]


def measured(page: Path = PAGE) -> dict[str, float]:
    """crf_ms and rest_ms of the page's section on the label factory; empty where it does not say.

    The page's overhead is a share of CAM and CRF together, made on a machine where CPUs do both.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    section = re.search(_SECTION.format("labels"), text, re.DOTALL)
    found = section and re.search(_LABELLING, section[1])
    if not found:
        return {}
    overhead, cam_ms, crf_ms = (float(each) for each in found.groups())
    return {"crf_ms": crf_ms, "rest_ms": round(overhead / 100 * (cam_ms + crf_ms), 1)}


def estimate(wanted: Wanted, rates: dict[str, float]) -> Result:
    """Hours of both stages, what bounds them, and what they cost."""
    from_page = {name: rate for name, rate in rates.items() if getattr(wanted, name) is None}
    wanted = dataclasses.replace(wanted, **from_page)
    training, labelling = training_bounds(wanted), labelling_bounds(wanted)
    stages = {"training": training, "labelling": labelling}
    hours = {stage: _longest(bounds) for stage, bounds in stages.items()}
    known = [value for value in hours.values() if value is not None]
    return {
        "job": "size",
        **{f"{stage}_hours": _rounded(value) for stage, value in hours.items()},
        "hours": _rounded(sum(known)) if len(known) == len(hours) else None,
        "bounds": {
            f"{stage}_{resource}_hours": _rounded(value)
            for stage, bounds in stages.items()
            for resource, value in bounds.items()
        },
        "bottleneck": _bottleneck(stages),
        "cpus_for_gpus": _cpus_for_gpus(wanted),
        "cost": {stage: _cost(wanted, value) for stage, value in hours.items()},
        "from_page": from_page,
        "unknown": [name for name in _NEEDED if getattr(wanted, name) is None],
    }


_NEEDED = ("steps", "step_ms", "cam_ms", "crf_ms")


def training_bounds(wanted: Wanted) -> dict[str, float | None]:
    """Hours that GPUs and CPUs need for the training's steps; the slower decides, since reading goes on beside. Without a
    GPU the steps are the CPUs' work too."""
    on_gpu = wanted.gpus > 0
    if wanted.steps is None:
        return {"gpu": None if on_gpu else 0.0, "cpu": None}
    largest_part = math.ceil(wanted.batch_size / max(1, wanted.gpus)) / wanted.batch_size  # of the fullest worker
    step_s = None if wanted.step_ms is None else wanted.step_ms / 1000 * largest_part / wanted.scaling
    read_s = (wanted.read_ms or 0.0) / 1000 * wanted.batch_size / wanted.cpus
    step_hours = None if step_s is None else wanted.steps * step_s / 3600
    read_hours = wanted.steps * read_s / 3600
    if on_gpu:
        return {"gpu": step_hours, "cpu": read_hours}
    return {"gpu": 0.0, "cpu": None if step_hours is None else step_hours + read_hours}


def labelling_bounds(wanted: Wanted) -> dict[str, float | None]:
    """Hours that GPUs need for the CAMs and CPUs for CRF and the rest; both work at once. Without a GPU the CAM is the
    work of the CPUs too, or of those that the CRF leaves."""
    crf_cpus = _crf_cpus(wanted)
    cam_s = None if wanted.cam_ms is None else wanted.images * wanted.cam_ms / 1000
    crf_s = None if wanted.crf_ms is None else wanted.images * (wanted.crf_ms + (wanted.rest_ms or 0.0)) / 1000
    if wanted.gpus:
        gpu = None if cam_s is None else cam_s / wanted.gpus
        cpu = None if crf_s is None else crf_s / crf_cpus
    elif cam_s is None or crf_s is None:
        gpu, cpu = 0.0, None
    elif crf_cpus < wanted.cpus:
        gpu, cpu = 0.0, max(crf_s / crf_cpus, cam_s / (wanted.cpus - crf_cpus))
    else:
        gpu, cpu = 0.0, (crf_s + cam_s) / wanted.cpus
    return {"gpu": None if gpu is None else gpu / 3600, "cpu": None if cpu is None else cpu / 3600}


def _crf_cpus(wanted: Wanted) -> int:
    return wanted.crf_cpus or wanted.cpus


def _longest(bounds: dict[str, float | None]) -> float | None:
    """The stage's time; None where a bound is not known, which may be the longest."""
    values = list(bounds.values())
    return None if None in values else max(value for value in values if value is not None)


def _bottleneck(stages: dict[str, dict[str, float | None]]) -> str | None:
    """Stage and resource that take the longest; None while a bound is not known."""
    named = {f"{stage} on {each.upper()}s": hours for stage, bounds in stages.items() for each, hours in bounds.items()}
    known = {name: hours for name, hours in named.items() if hours is not None}
    return max(known, key=lambda name: known[name]) if len(known) == len(named) else None


def _cpus_for_gpus(wanted: Wanted) -> int | None:
    """CPUs for the CRF with which it keeps up with the GPUs' CAMs."""
    cpu = labelling_bounds(wanted)["cpu"]
    gpu = labelling_bounds(wanted)["gpu"]
    return math.ceil(_crf_cpus(wanted) * cpu / gpu - 1e-9) if cpu is not None and gpu else None


def _cost(wanted: Wanted, hours: float | None) -> float | None:
    """All GPUs and CPUs are paid for as long as the stage takes; None where a price or the time is not known."""
    gpu_price = 0.0 if wanted.gpus == 0 else wanted.gpu_price
    if hours is None or gpu_price is None or wanted.cpu_price is None:
        return None
    return round(hours * (wanted.gpus * gpu_price + wanted.cpus * wanted.cpu_price), 2)


def _rounded(hours: float | None) -> float | None:
    return None if hours is None else round(hours, 3)


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="+", metavar="name=number", help=", ".join(Wanted.__dataclass_fields__))
    arguments = parser.parse_args(argv)
    run(lambda: estimate(parse(arguments.numbers), measured()))


if __name__ == "__main__":
    main()
