#!/bin/bash
# A Ray cluster over the nodes of one SLURM job, and a training run on it. Submit from the repository, which all nodes
# see, with .venv set up in it:   sbatch --nodes=8 docs/cluster/slurm.sh experiment=paper_qwen2.5_32b
#SBATCH --job-name=vapo
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0                   # all that a node has
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@5400      # before the end: seconds for one step (scripts/plan.py) and a checkpoint
#SBATCH --requeue
#SBATCH --no-kill                 # the job outlives a lost node
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

source .venv/bin/activate
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
limit_s=${RAY_NODES_TIMEOUT_S:-600} # for all nodes to join
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(hostname --ip-address | awk '{print $1}') # this script runs on the first node
port=6379
address=$head_ip:$port
steps=()
count='
import logging, sys, ray
ray.init(sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))
'

# Ray on one node, with all of its CPUs; `--block` keeps the step alive as long as its Ray is.
start_ray() {
    srun --nodes=1 --ntasks=1 --nodelist="$1" --no-kill --mem=0 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
        ray start "${@:2}" --disable-usage-stats --block &
    steps+=($!)
}

# Until Ray has that many nodes. Ends the job when one of them has no Ray any more, or when it takes too long.
wait_for_nodes() {
    local alive step
    while true; do
        alive=$(timeout 60 python -c "$count" "$address") || alive=0
        if [ "$alive" -ge "$1" ]; then return; fi
        for step in "${steps[@]}"; do
            if ! kill -0 "$step" 2>/dev/null; then
                echo "error: Ray has ended on a node before all had joined; see above" >&2
                exit 1
            fi
        done
        if [ "$SECONDS" -ge "$limit_s" ]; then
            echo "error: $alive of ${#nodes[@]} nodes have joined within $limit_s s" >&2
            exit 1
        fi
        sleep 1
    done
}

start_ray "${nodes[0]}" --head --node-ip-address="$head_ip" --port=$port
wait_for_nodes 1 # the others would give up after some seconds without a head
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$address"
done
wait_for_nodes "${#nodes[@]}"

# resume=auto goes on from the newest checkpoint when the job was queued again.
export RAY_ADDRESS=$address
python scripts/train_async.py resume=auto "$@" &
run=$!
signals=0
trap 'signals=$((signals + 1)); kill -TERM $run 2>/dev/null || true' TERM
while true; do
    seen=$signals
    code=0
    wait $run || code=$?
    if [ "$signals" -eq "$seen" ]; then break; fi # otherwise the signal has ended the waiting, not the run
done
if [ "$signals" -gt 0 ] && [ "$code" -eq 130 ]; then # stopped for SLURM: there is more to do
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
