"""Jobs on a real cluster that asks for a token: submitted, failing, stopped and submitted again, while nodes come and go."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfa.config import load
from dfa.train.checkpoint import list_checkpoints, read_info
from dfa.world.folder import write_voc
from jobs import INTERRUPTED
from tests.small_runs import write_shards
from tests.standing_cluster import RAY, ROOT, StandingCluster, result_of, wait_for

pytestmark = pytest.mark.clusters
RUNTIME_ENV = ROOT / "cluster/runtime_env.yaml"
NUM_PHOTOS = 1000  # a node takes 20 s to join on a busy machine: the job must still run then
TINY = [
    "decoder.width=32",
    "decoder.depth=1",
    "train.batch_size=2",
    "train.workers=1",
    "train.engine=torch",
    "train.validate_every=1000",
    "train.validate_images=1",
    "train.log_every=1",
    "train.checkpoint_every=1000",
    "evaluate.scales=[1.0]",
    "evaluate.flip=false",
    "label.checkpoint=latest",
    "label.min_probability=0.2",
]


@pytest.fixture(scope="module")
def cluster():
    one = StandingCluster(num_cpus=2)
    yield one
    one.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder that all nodes see: shards of a few scenes, and pictures."""
    root = tmp_path_factory.mktemp("shared")
    config = load("demo", [f"data.root={write_voc(root / 'world', seed=1, num_train=8, num_val=2)}"])
    for split in ("train", "val"):
        write_shards(config, str(root / split), split)
    return root


def train_job(data: Path, run: Path, steps: int) -> str:
    paths = [f"run={run}", f"shards.train={data}/train", f"shards.val={data}/val", f"train.steps={steps}"]
    return " ".join(["jobs.train", "demo", *paths, *TINY])


@pytest.fixture(scope="module")
def submitted(cluster, data):
    """A training through the command of the README; what it printed, and the job."""
    command = [*RAY, "job", "submit", "--address", cluster.dashboard, "--runtime-env", str(RUNTIME_ENV), "--"]
    command += [sys.executable, "-m", *train_job(data, data / "run", 2).split()]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, cluster.jobs()[0]


@pytest.fixture(scope="module")
def runtime_env(submitted):
    """What Ray made of cluster/runtime_env.yaml: the uploaded working directory serves all jobs."""
    return submitted[1]["runtime_env"]


def test_a_submitted_training_succeeds_and_its_result_is_the_last_json_line(cluster, submitted, data):
    printed, job = submitted
    assert job["status"] == "SUCCEEDED"
    result = result_of(printed)
    assert (result["job"], result["step"], result["run"]) == ("train", 2, str(data / "run"))
    assert [read_info(each).step for each in list_checkpoints(data / "run")] == [2]
    assert json.loads(cluster.log(job["submission_id"]).splitlines()[-1]) == result


def test_the_uploaded_working_directory_holds_the_code_and_no_data(cluster, submitted):
    uri = submitted[1]["runtime_env"]["working_dir"]
    (folder,) = cluster.folder.glob(f"session_2*/runtime_resources/working_dir_files/{Path(uri).stem}")
    assert (folder / "jobs/train.py").is_file() and (folder / "dfa/world/tiny_clip.safetensors").is_file()
    assert (folder / "dfa/build/model.py").is_file()  # `/build/` in .gitignore is the top folder alone
    assert not [name for name in (".git", "runs", "shards", "shared") if (folder / name).exists()]


def test_wrong_input_fails_the_job_with_the_message_and_no_traceback(cluster, runtime_env, data):
    wrong = {
        "jobs.train demo train.step=2": "unknown key 'train.step'; did you mean 'train.steps'?",
        "jobs.train demo shards.train=/data": "error: run=runs/demo is relative, and this job was submitted",
        f"jobs.predict demo run={data}/run predict.input={data}/nothing": "nothing",
    }
    names = [cluster.submit(entrypoint, runtime_env) for entrypoint in wrong]
    for name, message in zip(names, wrong.values(), strict=True):
        assert cluster.finished(name) == "FAILED"
        log, job = cluster.log(name), cluster.job(name)
        assert message in log and "Traceback" not in log
        assert job["driver_exit_code"] == 1 and message in job["message"]


def test_a_stopped_training_leaves_a_checkpoint_and_continues_when_submitted_again(cluster, runtime_env, data):
    run = data / "stopped"
    name = cluster.submit(train_job(data, run, 100_000), runtime_env)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: (metrics.exists() and metrics.stat().st_size) or cluster.job(name)["status"] == "FAILED", "a step")
    cluster.stop_job(name)
    begin = time.monotonic()
    assert cluster.finished(name) == "STOPPED", cluster.log(name)
    print(f"stopped within {time.monotonic() - begin:.1f} s")
    result = cluster.result(name)
    assert result["interrupted"] and result["step"] >= 1
    assert [read_info(each).step for each in list_checkpoints(run)] == [result["step"]]

    again = cluster.submit(train_job(data, run, result["step"] + 2), runtime_env)
    assert cluster.finished(again) == "SUCCEEDED", cluster.log(again)
    continued = cluster.result(again)
    assert (continued["step"], continued["steps_made"], continued["interrupted"]) == (result["step"] + 2, 2, False)


@pytest.fixture(scope="module")
def photos(data):
    """More pictures than are predicted before a test interferes."""
    folder, scenes = data / "photos", sorted(data.glob("world/**/*.jpg"))
    folder.mkdir()
    for number in range(NUM_PHOTOS):
        (folder / f"{number:04d}.jpg").write_bytes(scenes[number % len(scenes)].read_bytes())
    return folder


def predict_job(data: Path, photos: Path, output: Path) -> str:
    paths = [f"run={data}/run", f"predict.input={photos}", f"predict.output={output}", "predict.png=false"]
    return " ".join(["jobs.predict", "demo", *paths, "data.samples_per_shard=8", "label.batch_size=4", *TINY])


def committed(output: Path) -> int:
    return len(list(output.glob("shard-*.json")))


def test_a_node_that_joins_and_leaves_during_a_job_costs_nothing(cluster, runtime_env, data, photos):
    output = data / "masks"
    name = cluster.submit(predict_job(data, photos, output), runtime_env)
    wait_for(lambda: committed(output) or cluster.job(name)["status"] == "FAILED", "the first shard")
    node = cluster.add_node(f"--address={cluster.address}", "--num-cpus=1")
    wait_for(lambda: cluster.num_alive() == 2, "the second node")
    before = committed(output)
    wait_for(lambda: committed(output) >= before + 2 or cluster.job(name)["status"] != "RUNNING", "work beside it")
    assert cluster.job(name)["status"] == "RUNNING", f"over before the node could leave: {cluster.log(name)}"
    cluster.kill_node(node)
    assert cluster.finished(name) == "SUCCEEDED", cluster.log(name)
    result = cluster.result(name)
    assert (result["num_images"], result["num_rejects"], result["predicted_now"]) == (NUM_PHOTOS, 0, NUM_PHOTOS)


def test_a_driver_that_is_told_to_stop_exits_with_130_and_keeps_its_shards(cluster, submitted, data, photos):
    output = data / "stopped_masks"
    command = [sys.executable, "-m", *predict_job(data, photos, output).split()]
    environment = cluster.environment(RAY_ADDRESS=cluster.address)
    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: committed(output) or driver.poll() is not None, "the first shard")
    driver.send_signal(signal.SIGTERM)
    printed, log = driver.communicate(timeout=60)
    assert (driver.returncode, printed) == (INTERRUPTED, ""), log
    assert "Traceback" not in log
    assert 0 < committed(output) < NUM_PHOTOS / 8


def connect(cluster: StandingCluster, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """A driver on a node, as a user starts it."""
    code = "import jobs, dfa.train.loop as loop; jobs.run(lambda: loop.start_ray() or {'joined': True})"
    environment = cluster.environment(**changes) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_driver_takes_the_token_that_is_there(cluster):
    done = connect(cluster, RAY_ADDRESS=cluster.address, RAY_AUTH_MODE=None)
    assert (done.returncode, json.loads(done.stdout.splitlines()[-1])) == (0, {"joined": True}), done.stderr


def test_a_wrong_token_is_told_in_one_line(cluster, tmp_path):
    (tmp_path / "token").write_text("f" * 64)
    done = connect(cluster, RAY_ADDRESS=cluster.address, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert done.returncode == 1
    assert f"error: Ray at RAY_ADDRESS={cluster.address} cannot be joined" in done.stderr
    assert f"the token in {tmp_path}/token must be the one" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_a_dead_cluster_left_is_named(cluster, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    done = connect(cluster, RAY_TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert f"error: Ray at 127.0.0.1:1, which {tmp_path}/ray/ray_current_cluster names, cannot be joined" in done.stderr
    assert "run `ray stop` or delete the file" in done.stderr and "Traceback" not in done.stderr
