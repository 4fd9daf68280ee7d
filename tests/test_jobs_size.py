"""Hours and costs on a cluster: against sums done by hand, and rates read from the page of benchmarks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfa.config import load
from jobs.size import PAGE, Wanted, estimate, measured, parse

ROOT = Path(__file__).parent.parent
RATES = {"crf_ms": 500.0, "rest_ms": 130.0}
PAGE_TEXT = """# Benchmarks

<!-- bench:labels -->
## Label factory

Overhead (CPU time that was there, beyond CAM and CRF): **20.0 %**. CPU ms an image: CAM 150, CRF 500, reading and encoding 4; 2 images/s.
<!-- /bench:labels -->
"""


def test_hours_are_the_sum_by_hand():
    wanted = Wanted(
        images=36_000,
        gpus=4,
        cpus=10,
        steps=3_600,
        batch_size=16,
        step_ms=400,
        cam_ms=40,
        gpu_price=2.0,
        cpu_price=0.05,
    )
    found = estimate(wanted, RATES)
    assert found["training_hours"] == 0.1  # 3600 steps, a quarter of 400 ms each
    assert found["bounds"]["labelling_gpu_hours"] == 0.1  # 36 000 x 40 ms on 4
    assert found["labelling_hours"] == 0.63  # 36 000 x (500 + 130) ms on 10
    assert found["hours"] == 0.73
    assert found["bottleneck"] == "labelling on CPUs"
    assert found["cpus_for_gpus"] == 63
    assert found["cost"] == {"training": 0.85, "labelling": 5.36}  # 8.50 an hour
    assert found["unknown"] == []
    assert found["from_page"] == RATES


def test_with_the_cpus_it_names_the_stage_is_bound_by_both_alike():
    wanted = Wanted(images=36_000, gpus=4, cpus=63, steps=10, step_ms=400, cam_ms=40)
    bounds = estimate(wanted, RATES)["bounds"]
    assert bounds["labelling_cpu_hours"] == bounds["labelling_gpu_hours"] == 0.1


def test_what_was_never_measured_stays_unknown():
    found = estimate(Wanted(images=1000, gpus=1, cpus=2, steps=100), RATES)
    assert found["unknown"] == ["step_ms", "cam_ms"]
    for name in ("training_hours", "labelling_hours", "hours", "bottleneck", "cpus_for_gpus"):
        assert found[name] is None
    assert found["bounds"]["labelling_cpu_hours"] == 0.087  # what is known is still told
    assert found["cost"] == {"training": None, "labelling": None}
    json.dumps(found, allow_nan=False)


def test_no_price_is_invented():
    found = estimate(Wanted(images=1000, gpus=1, cpus=2, steps=100, step_ms=1, cam_ms=1, gpu_price=1.0), RATES)
    assert found["labelling_hours"] is not None
    assert found["cost"] == {"training": None, "labelling": None}


def test_a_step_waits_for_the_fullest_worker():
    shares = [
        estimate(Wanted(1, gpus, 1, 3_600_000, 8, 1000, cam_ms=1), RATES)["training_hours"] for gpus in (1, 2, 3, 8, 16)
    ]
    assert shares == [1000, 500, 375, 125, 125]  # 8 images: 8, 4, 3, 1 on the fullest, and 16 GPUs are no more than 8


def test_reading_may_bound_the_training():
    wanted = Wanted(images=1, gpus=8, cpus=4, steps=3_600, batch_size=16, step_ms=400, cam_ms=1, read_ms=50)
    found = estimate(wanted, RATES)
    assert found["training_hours"] == 0.2  # 16 x 50 ms on 4 CPUs; the GPUs need 50 ms
    assert found["bottleneck"] == "training on CPUs"


def test_without_a_gpu_the_cam_is_the_cpus_work():
    found = estimate(Wanted(images=3_600, gpus=0, cpus=2, steps=3_600, step_ms=1000, cam_ms=100, cpu_price=1.0), RATES)
    assert found["labelling_hours"] == 0.365  # 3600 x (630 + 100) ms on 2
    assert found["training_hours"] == 1.0
    assert found["bottleneck"] == "training on CPUs"
    assert found["cost"] == {"training": 2.0, "labelling": 0.73}


def test_without_a_gpu_reading_and_the_steps_share_the_cpus():
    wanted = Wanted(images=1, gpus=0, cpus=4, steps=3_600, batch_size=8, step_ms=1000, read_ms=50, cam_ms=1)
    assert estimate(wanted, RATES)["training_hours"] == 1.1  # 8 x 50 ms on 4 CPUs beside each second
    assert estimate(Wanted(1, 0, 4, steps=1), RATES)["training_hours"] is None


def test_the_crf_has_its_own_nodes_alone_where_the_command_says_so():
    wanted = Wanted(images=3_600, gpus=1, cpus=12, crf_cpus=4, steps=1, step_ms=1, cam_ms=63)
    found = estimate(wanted, RATES)
    assert found["labelling_hours"] == 0.158  # 3600 x 630 ms on 4, not on 12
    assert found["cpus_for_gpus"] == 10
    without = Wanted(images=3_600, gpus=0, cpus=12, crf_cpus=9, steps=1, step_ms=1, cam_ms=630)
    assert estimate(without, RATES)["labelling_hours"] == 0.21  # the CAMs on the other 3; the CRF needs 0.07


def test_what_the_command_gives_goes_before_the_page():
    found = estimate(Wanted(images=3_600, gpus=1, cpus=1, crf_ms=1000, rest_ms=0, cam_ms=1), RATES)
    assert found["labelling_hours"] == 1.0
    assert found["from_page"] == {}


def test_rates_are_read_from_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE_TEXT)
    assert measured(page) == RATES
    page.write_text("# Benchmarks\n")
    assert measured(page) == {}
    assert measured(tmp_path / "none.md") == {}


def test_the_projects_page_holds_what_sizing_needs():
    assert measured(PAGE).keys() == {"crf_ms", "rest_ms"}


def test_the_cpu_time_beside_the_cams_is_what_the_page_measured_without_them():
    section = PAGE.read_text().partition("<!-- bench:labels -->")[2].partition("<!-- /bench:labels -->")[0]
    (whole,) = re.findall(r"\| ours \| ([\d.e+]+) \|", section)
    (cam,) = re.findall(r"CAM ([\d.]+), CRF", section)
    rates = measured(PAGE)
    assert rates["crf_ms"] + rates["rest_ms"] == pytest.approx(
        float(whole) - float(cam), rel=0.01
    )  # of rounded numbers


def test_the_worked_example_says_what_the_command_prints():
    text = (PAGE.parent / "SIZING.md").read_text()
    example, printed = re.search(
        r"```\npython -m jobs.size ([^\n]*)\n```.*?```json\n(.*?)```", text, re.DOTALL
    ).groups()
    found = estimate(parse(example.split()), {})
    assert json.loads(printed).items() <= found.items()
    assert parse(example.split()).batch_size == load("coco_dfa", []).train.batch_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=1", "gpus=1"], "cpus missing"),
        (["images=1", "gpus=1", "cpus=1", "gpu_prise=1"], "did you mean 'gpu_price'"),
        (["images=1", "gpus=1", "cpus=1", "cpus=2"], "cpus is given twice"),
        (["images=many", "gpus=1", "cpus=1"], "images is 'many', a whole number is wanted"),
        (["images=1", "gpus=1", "cpus=1", "cam_ms=nan"], "cam_ms is nan"),
        (["images=1", "gpus=1", "cpus=0"], "cpus is 0, more than 0"),
        (["images=1", "gpus=1", "cpus=1", "crf_cpus=2"], "crf_cpus is 2, at most all cpus=1"),
        (["images=1", "gpus=-1", "cpus=1"], "gpus is -1, 0 or more"),
        (["images=1", "gpus=1", "cpus=1", "scaling=2"], "scaling is 2.0"),
        (["images"], "not of the form name=number"),
    ],
)
def test_a_wrong_number_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_the_command_prints_one_json_line():
    command = [
        sys.executable,
        "-m",
        "jobs.size",
        "images=82081",
        "gpus=8",
        "cpus=64",
        "steps=80000",
        "step_ms=500",
        "cam_ms=20",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["training_hours"] == 1.389
