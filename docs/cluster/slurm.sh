#!/bin/bash
# A Ray cluster over the nodes of one SLURM job, and a training run on it. Submit from the repository, which all nodes
# see, with .venv set up in it:   sbatch --nodes=8 docs/cluster/slurm.sh experiment=paper_qwen2.5_32b
#SBATCH --job-name=vapo
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@600       # ten minutes before the end: the run writes a checkpoint and stops
#SBATCH --requeue
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail

source .venv/bin/activate
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
port=6379
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# One Ray per node. `--block` keeps each step alive as long as its Ray is.
srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$head_ip" --port=$port --disable-usage-stats --block &
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" \
        ray start --address="$head_ip:$port" --disable-usage-stats --block &
done

export RAY_ADDRESS=$head_ip:$port
until [ "$(ray list nodes --filter state=ALIVE --format json 2>/dev/null | grep -c node_id)" -ge "${#nodes[@]}" ]; do
    sleep 2
done

# resume=auto goes on from the newest checkpoint when SLURM has requeued the job.
python scripts/train_async.py resume=auto "$@" &
run=$!
trap 'kill -TERM $run' TERM
wait $run || code=$?
if kill -0 $run 2>/dev/null; then wait $run || code=$?; fi # it was interrupted, and writes its checkpoint
if [ "${code:-0}" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "${code:-0}"
