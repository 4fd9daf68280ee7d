"""What all jobs share: paths that every node reads alike, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs
from dfa.config import load
from jobs import pretrain
from jobs.bench import __main__ as bench
from jobs.submitted import JOB_VARIABLE, absolute_paths, is_submitted

ROOT = Path(__file__).parent.parent
KEPT = ("run", "label.output", "predict.output")


@pytest.fixture
def submission(monkeypatch):
    """The environment of a job's entry point, as Ray makes it."""
    told = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {"job_submission_id": "raysubmit_0"}}
    monkeypatch.setenv(JOB_VARIABLE, json.dumps(told))


def test_relative_paths_become_absolute_and_others_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["run=runs/a", "shards.train=s3://bucket/train", "shards.val=/val", "data.label_file=labels.csv"]
    config = absolute_paths(load("demo", [*given, "label.output=out"]), kept=KEPT)
    assert (config.run, config.label.output) == (f"{tmp_path}/runs/a", f"{tmp_path}/out")
    assert (config.shards.train, config.shards.val) == ("s3://bucket/train", "/val")
    assert (config.data.label_file, config.data.root, config.predict.output) == (f"{tmp_path}/labels.csv", "", "")
    assert config.clip.model == "conf/tiny_clip.json"  # found beside conf/ from anywhere, and part of what a run is


def test_a_job_started_by_hand_is_not_submitted(monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert not is_submitted()
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert not is_submitted()


@pytest.mark.usefixtures("submission")
@pytest.mark.parametrize("name", KEPT)
def test_a_submitted_job_that_would_lose_what_it_writes_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}=here/it is relative, and this job was submitted"):
        absolute_paths(load("demo", [f"run={tmp_path}/run", f"{name}=here/it"]), kept=KEPT)


@pytest.mark.usefixtures("submission")
def test_a_submitted_job_may_write_elsewhere_and_read_what_travels_with_it(tmp_path):
    given = [
        "run=gs://bucket/run",
        f"label.output={tmp_path}/labels",
        "data.label_file=labels.csv",
        "shards.train=shards",
    ]
    config = absolute_paths(load("demo", given), kept=KEPT)
    assert (config.run, config.label.output) == ("gs://bucket/run", f"{tmp_path}/labels")
    assert config.data.label_file == f"{os.getcwd()}/labels.csv"


def test_the_shard_job_minds_its_output_alone(submission, tmp_path):
    config = absolute_paths(load("demo", [f"data.output={tmp_path}/shards"]), kept=("data.output",))
    assert Path(config.run).is_absolute()  # it is not written: no reason to refuse
    with pytest.raises(ValueError, match=r"^data\.output=shards is relative"):
        absolute_paths(load("demo", ["data.output=shards"]), kept=("data.output",))


@pytest.mark.usefixtures("submission")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--work=state", "--output={there}/clip.safetensors"], "--work=state is relative, and this job was submitted"),
        (["--work={there}", "--output=clip.safetensors"], "--output=clip.safetensors is relative"),
        (["--work={there}"], "tiny_clip.safetensors lies beside the code"),  # the default
    ],
)
def test_a_submitted_pretraining_that_would_lose_what_it_writes_is_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *(each.format(there=tmp_path) for each in given)])
    monkeypatch.setattr(pretrain, "work", lambda *arguments: {"too": "late"})  # hours, should this test ever fail
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        pretrain.main()


@pytest.mark.usefixtures("submission")
@pytest.mark.parametrize("page", [["--page=page.md"], []])
def test_a_submitted_benchmark_whose_page_would_be_lost_is_refused_before_it_runs(page, capsys, monkeypatch):
    monkeypatch.setattr(bench, "MODES", ("no_such_mode",))  # its import is what would come next
    with pytest.raises(SystemExit):
        bench.main(["no_such_mode", *page])
    assert f"{'is relative' if page else 'lies beside the code'}, and this job was submitted" in capsys.readouterr().err


def test_an_interrupted_training_prints_its_result_and_exits_with_130(capsys):
    with pytest.raises(SystemExit) as ended:
        jobs.run(lambda: {"job": "train", "interrupted": True})
    assert ended.value.code == 130
    assert json.loads(capsys.readouterr().out)["interrupted"]
    jobs.run(lambda: {"job": "train", "interrupted": False})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_job_with_130(number, tmp_path):
    # A shell ignores SIGINT for what it runs in the background, and children inherit that: these tests may run so.
    code = "import jobs, signal, time, pathlib, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "jobs.run(lambda: pathlib.Path(sys.argv[1]).touch() or time.sleep(60))"
    ready = tmp_path / "ready"
    job = subprocess.Popen([sys.executable, "-c", code, str(ready)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(number)
    _, log = job.communicate(timeout=60)
    assert (job.returncode, log) == (130, "")
