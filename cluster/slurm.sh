#!/bin/bash
# A job of jobs/ on several nodes: sbatch cluster/slurm.sh jobs.train voc_dfa run=$SHARED/runs/voc ... , from the checkout.
# Two minutes before its time is over the job is told to stop, writes a checkpoint and goes back into the queue; there it
# continues. When it is preempted, too, but only where slurm.conf has PreemptParameters=send_user_signal; elsewhere Slurm
# ends Ray's processes, and the steps since the last checkpoint (train.checkpoint_every) are made again.
# Before: an environment with requirements.txt in .venv, on a file system of all nodes.
#SBATCH --job-name=dfa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# B: to this script alone. Without it Slurm would signal Ray's own processes, and the nodes would be gone before the checkpoint.
# --no-kill: a lost node would end the whole job, which goes on with those that are left (train.min_workers).
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch cluster/slurm.sh JOB CONF key=value ..." >&2
    exit 2
fi
readonly PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
readonly FOLDER=/tmp/ray-$SLURM_JOB_ID
readonly STOPPED=130 # exit code of a job that was told to stop
PATH=${DFA_ENVIRONMENT:-$PWD/.venv}/bin:$PATH
export PATH

RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))') # srun hands it to all nodes
export RAY_AUTH_MODE RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05 srun does not take it over by itself
export RAY_health_check_period_ms=1000 # a lost node is noticed within 5 s, not 15 to 20

# awk reads to the end: a writer whose reader has gone fails, and with it, silently, this script.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | awk 'NR == 1 {print $1}')
export RAY_ADDRESS=$head_ip:$PORT

driver=
stopping=
# shellcheck disable=SC2329  # by the trap below
stop() {
    stopping=yes
    [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true
}
trap stop TERM
# shellcheck disable=SC2329
end_ray() {
    # shellcheck disable=SC2046  # a word each
    kill $(jobs -p) 2>/dev/null || true
    wait
}
trap end_ray EXIT

# Ray's processes inherit RAY_ADDRESS: Ray Train's placement-group cleaner looks for its cluster by it, and two jobs may share
# a node. With the dashboard, which the cleaner asks. A node that is lost or fails must not take the others with it.
readonly NODE=(srun --overlap --no-kill --kill-on-bad-exit=0 --wait=0)
"${NODE[@]}" --nodes=1 --ntasks=1 --nodelist="$head_node" \
    ray start --head --node-ip-address="$head_ip" --port="$PORT" --temp-dir="$FOLDER" --num-cpus="$SRUN_CPUS_PER_TASK" --block &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    for ((i = 0; i < 150; i++)); do # until the head listens
        if (: <"/dev/tcp/$head_ip/$PORT") 2>/dev/null; then break; fi
        sleep 2
    done
    others=$((SLURM_JOB_NUM_NODES - 1))
    "${NODE[@]}" --nodes="$others" --ntasks="$others" --exclude="$head_node" \
        ray start --address="$head_ip:$PORT" --num-cpus="$SRUN_CPUS_PER_TASK" --block &
fi
# A job that starts before its nodes would be refused its workers.
python - "$SLURM_JOB_NUM_NODES" <<'EOF'
import sys, time
from dfa.train.cluster import NoClusterError, join_cluster
import ray

deadline = time.monotonic() + 300
while True:
    try:
        if not ray.is_initialized():
            join_cluster()
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive >= int(sys.argv[1]):
            break
        reason = f"{alive} of {sys.argv[1]} nodes have joined"
    except NoClusterError as error:
        reason = str(error)
    if time.monotonic() > deadline:
        sys.exit(f"the cluster did not come up in 300 s: {reason}")
    time.sleep(2)
EOF

code=0
if [ -z "$stopping" ]; then
    python -m "$@" &
    driver=$!
    # A trapped signal ends `wait` early; the job's own end is what counts.
    while kill -0 "$driver" 2>/dev/null; do
        code=0
        wait "$driver" || code=$?
    done
else
    code=$STOPPED
fi
if [ -n "$stopping" ] && [ "$code" -eq "$STOPPED" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
