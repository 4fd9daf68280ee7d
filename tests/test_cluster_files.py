"""What cluster/ holds: read by Ray's own validator, the Kubernetes client's models, shellcheck and hadolint.

KubeRay's own fields are held against the names of its published API reference: its schema comes with no package.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from ray.autoscaler._private.util import prepare_config, validate_config

from dfa.config import load

CLUSTER = Path(__file__).parent.parent / "cluster"
PINNED = {
    name: version
    for line in (CLUSTER.parent / "requirements.txt").read_text().splitlines()
    for name, equals, version in [line.partition("==")]
    if equals
}

# KubeRay's API reference, ray.io/v1: the fields of each type that we may use, and those that must be there.
CLUSTER_SPEC = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    "headServiceAnnotations",
    "suspend",
    "gcsFaultToleranceOptions",
    "managedBy",
}
AUTOSCALER = {
    "resources",
    "image",
    "imagePullPolicy",
    "env",
    "envFrom",
    "idleTimeoutSeconds",
    "upscalingMode",
    "version",
}
HEAD = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
WORKERS = HEAD - {"serviceType", "headService", "enableIngress"} | {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "numOfHosts",
    "idleTimeoutSeconds",
    "scaleStrategy",
    "suspend",
}
JOB_SPEC = {
    "entrypoint",
    "runtimeEnvYAML",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "backoffLimit",
    "activeDeadlineSeconds",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
    "clusterSelector",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "metadata",
    "suspend",
    "deletionStrategy",
}


def read(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all((CLUSTER / name).read_text())
    return document


def check_model(value: Any, kind: str, where: str) -> None:
    """`value` has the fields and types of the Kubernetes model `kind`; unknown fields fail, which the API would drop."""
    if kind.startswith(("list[", "List[")):
        assert isinstance(value, list), where
        for number, each in enumerate(value):
            check_model(each, kind[5:-1], f"{where}[{number}]")
    elif kind.startswith(("dict", "Dict")):
        assert isinstance(value, dict) and all(isinstance(each, str) for each in value), where
        for key, each in value.items():
            check_model(each, kind.rpartition(", ")[2][:-1], f"{where}.{key}")
    elif hasattr(client, kind):
        model = getattr(client, kind)
        names = {outside: inside for inside, outside in model.attribute_map.items()}
        assert isinstance(value, dict) and set(value) <= set(names), f"{where}: {set(value) - set(names)} not in {kind}"
        for key, each in value.items():
            check_model(each, model.openapi_types[names[key]], f"{where}.{key}")
        model(**{names[key]: each for key, each in value.items()})  # refuses what is missing
    elif kind != "object":
        wanted = {"str": str, "int": int, "bool": bool, "float": float, "datetime": str}[kind]
        assert isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)), (
            f"{where}: {value!r}, {kind}"
        )


def cluster_spec(name: str) -> dict[str, Any]:
    document = read(name)
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]


@pytest.mark.parametrize("name", KUBERAY)
def test_the_kuberay_files_use_the_fields_of_its_reference(name):
    document, spec = read(name), cluster_spec(name)
    assert document["apiVersion"] == "ray.io/v1"
    if document["kind"] == "RayJob":
        assert set(document["spec"]) <= JOB_SPEC and {"entrypoint", "rayClusterSpec"} <= set(document["spec"])
        assert document["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
        assert set(document["spec"]["submitterConfig"]) == {"backoffLimit"}
        assert document["spec"]["shutdownAfterJobFinishes"] is True  # ttlSecondsAfterFinished does nothing without
    assert set(spec) <= CLUSTER_SPEC and set(spec["autoscalerOptions"]) <= AUTOSCALER
    assert spec["authOptions"] == {"mode": "token"}
    assert {"rayStartParams", "template"} <= set(spec["headGroupSpec"]) <= HEAD
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_what_kubernetes_knows_and_share_storage_and_memory(name):
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        check_model(group["template"], "V1PodTemplateSpec", name)
        pod = group["template"]["spec"]
        volumes, (container,) = {volume["name"]: volume for volume in pod["volumes"]}, pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert (
            mounts["/mnt/shared"]["persistentVolumeClaim"]["claimName"]
            == read("kuberay/storage.yaml")["metadata"]["name"]
        )
        assert container["resources"]["limits"] == container["resources"]["requests"]  # Ray counts limits
        assert pod["securityContext"]["fsGroup"] == 100  # of the image's user; a new volume is root's


def test_the_claim_is_what_kubernetes_knows_and_many_pods_may_write():
    claim = read("kuberay/storage.yaml")
    check_model(claim, "V1PersistentVolumeClaim", "storage")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", KUBERAY)
def test_the_pools_are_gpus_and_cpus_for_the_crf_on_spot_nodes(name):
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] is True
    pools = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    limits = {key: group["template"]["spec"]["containers"][0]["resources"]["limits"] for key, group in pools.items()}
    assert limits["gpu"]["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" not in limits["crf"]
    quoted = pools["crf"]["rayStartParams"]["resources"]  # KubeRay puts it on a shell's command line
    assert json.loads(json.loads(quoted)) == {"crf": 1}
    assert all("spot" in str(group["template"]["spec"]["tolerations"]) for group in pools.values())
    pod = pools["gpu"]["template"]["spec"]
    given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    drained = int(given["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])  # without it Ray ends a node's work after 30 s
    assert 60 <= drained < pod["terminationGracePeriodSeconds"]


def test_job_and_cluster_describe_the_same_cluster():
    assert cluster_spec("kuberay/rayjob.yaml") == cluster_spec("kuberay/raycluster.yaml")


def commands() -> list[list[str]]:
    """`JOB CONF key=value ...` of each command that submits a job: of the RayJob, and as the pages have them."""
    lines = [read("kuberay/rayjob.yaml")["spec"]["entrypoint"]]
    for page in (CLUSTER / "README.md", CLUSTER.parent / "README.md"):
        for block in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            lines += [line for line in block.splitlines() if line.startswith(("ray job submit", "sbatch"))]
    (pod,) = cluster_spec("kuberay/raycluster.yaml")["headGroupSpec"]["template"]["spec"]["containers"]
    (shared,) = (mount["mountPath"] for mount in pod["volumeMounts"] if mount["name"] == "shared")
    found = []
    for line in lines:
        words = shlex.split(line.replace("$SHARED", shared), comments=True)
        first = next(number for number, word in enumerate(words) if word.startswith("jobs."))
        assert words[first - 1] in ("-m", "cluster/slurm.sh"), line
        found.append(words[first:])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_name_jobs_configurations_and_keys_that_exist(command):
    job, name, *overrides = command
    assert (CLUSTER.parent / f"{job.replace('.', '/')}.py").is_file()
    loaded = load(name, overrides)
    paths = {loaded.run, loaded.shards.train, loaded.shards.val if job == "jobs.train" else ""}
    for path in paths - {""}:  # what the configurations have is relative: it would be a copy's, on one node
        assert "://" in path or Path(path).is_absolute(), path


def test_the_pages_submit_jobs_in_every_way():
    assert [command[0] for command in commands()].count("jobs.train") >= 3
    assert len(commands()) >= 6


def test_the_training_of_the_rayjob_has_room_at_its_start():
    _, name, *overrides = commands()[0]
    loaded = load(name, overrides)
    pools = {group["groupName"]: group for group in cluster_spec("kuberay/rayjob.yaml")["workerGroupSpecs"]}
    fewest = getattr(loaded.train, "min_workers", 0) or loaded.train.workers
    assert fewest <= pools["gpu"]["replicas"], "the training would be refused at its start"


def test_the_page_asks_for_crf_nodes_only_where_the_cluster_begins_with_some():
    text = (CLUSTER / "README.md").read_text().partition("## Kubernetes")[2].partition("\n## ")[0]
    asked = any("label.crf_resource" in line for line in text.splitlines() if line.startswith("ray job submit"))
    pools = {group["groupName"]: group for group in cluster_spec("kuberay/raycluster.yaml")["workerGroupSpecs"]}
    assert not asked or pools["crf"]["minReplicas"] > 0  # without a node the job is refused, and asks for none


def test_versions_are_the_pinned_one_everywhere():
    ray = PINNED["ray"]
    assert f"FROM rayproject/ray:{ray}-py311-gpu\n" in (CLUSTER / "Dockerfile").read_text()
    for name in KUBERAY:
        assert cluster_spec(name)["rayVersion"] == ray
    images = {
        group["template"]["spec"]["containers"][0]["image"]
        for name in KUBERAY
        for group in (cluster_spec(name)["headGroupSpec"], *cluster_spec(name)["workerGroupSpecs"])
    }
    assert images == {read("aws.yaml")["docker"]["image"]}


def test_the_file_for_ray_up_passes_rays_own_validator():
    prepared = prepare_config(read("aws.yaml"))
    validate_config(prepared)
    assert prepared["setup_commands"] == [] == prepared["head_setup_commands"]  # not the defaults, which install Ray
    for command in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        environment, start, options = command[-1].partition(" ray start ")
        assert start and "RAY_AUTH_MODE=token" in environment.split()
        assert "--metrics-export-port=8080" in options.split()  # otherwise each node has a port of its own
    assert prepared["available_node_types"]["crf"]["resources"]["crf"] == 1
    for name, kind in prepared["available_node_types"].items():  # Ray's default image has a driver too old for CUDA 13
        assert kind["node_config"].get("ImageId", "").startswith("ami-"), name


def test_rays_validator_refuses_a_wrong_file():
    wrong = read("aws.yaml") | {"max_worker": 1}
    with pytest.raises(Exception, match="max_worker"):  # jsonschema's error, of no package of ours
        validate_config(prepare_config(wrong))


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed (extra `test`)"
    return found


def test_the_slurm_script_is_clean_shell():
    script = str(CLUSTER / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    checked = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_lost_node_ends_neither_the_slurm_job_nor_the_step_of_the_others():
    lines = (CLUSTER / "slurm.sh").read_text().replace("\\\n", " ").splitlines()
    assert "#SBATCH --no-kill" in lines  # of the job alone: each srun needs its own
    (node,) = (line for line in lines if line.startswith("readonly NODE=("))
    assert {"srun", "--no-kill", "--kill-on-bad-exit=0"} <= set(node.partition("(")[2].rstrip(")").split())
    starts = [line.strip() for line in lines if " ray start " in line]
    assert len(starts) == 2 and all(line.startswith('"${NODE[@]}" ') for line in starts)
    for line in starts:  # without the dashboard or the address Ray Train's cleaner warns, or finds another cluster
        assert "--include-dashboard=false" not in line and "env -u" not in line


def test_the_steps_of_the_slurm_script_get_the_cpus_of_the_job():
    text = (CLUSTER / "slurm.sh").read_text()  # srun takes --cpus-per-task from no #SBATCH line
    assert 0 < text.find("\nexport SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}") < text.index("$(srun ")


def test_the_dockerfile_is_clean_and_copies_what_is_there():
    text = (CLUSTER / "Dockerfile").read_text()
    checked = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "warning", str(CLUSTER / "Dockerfile")],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
    copied = [word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[2:-1]]
    allowed = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(copied) == allowed
    assert all((CLUSTER.parent / name).exists() for name in copied)


def test_the_runtime_environment_is_one_that_ray_takes():
    environment = read("runtime_env.yaml")
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**environment | {"working_dir": None})  # a local folder becomes an address when it is uploaded
    assert environment["working_dir"] == "."
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3
    assert environment["env_vars"]["DFA_COMMIT"] == ""  # or the image's would pass for the commit of what was sent
