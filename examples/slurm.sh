#!/usr/bin/env bash
# Train on several nodes under Slurm: one torchrun a node, which starts a rank for each of its GPUs.
#
#   sbatch --nodes 4 examples/slurm.sh --config run.yaml --out /shared/runs/big --parallel.tp 4
#
# Everything after the script's name is for `python -m train`. OUT and the cache (--data.cache) lie where all nodes see
# them. Two minutes before the time is up the run saves itself; submitted again, it goes on. Jobs of one name can be
# queued ahead, and follow each other: sbatch --dependency=singleton ...
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

[ $# -gt 0 ] || { echo "usage: sbatch [--nodes N] examples/slurm.sh OPTIONS of python -m train" >&2; exit 2; }
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# What stops the run is known before the nodes are busy.
"$python" -m train --check --ranks $((gpus * SLURM_JOB_NUM_NODES)) "$@"

# A lost rank: all of them begin again from the last checkpoint, three times at most.
exec srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" \
    --max-restarts 3 --shutdown-timeout 100 \
    -m train --continue "$@"
