#!/usr/bin/env bash
# Train under SLURM, on as many nodes as you ask for:
#
#   sbatch --nodes 8 recipes/slurm.sh train.py's flags ...
#
# Five minutes before the time is up SLURM sends SIGTERM: the run saves and ends, and the job puts itself back into the
# queue, where the same command goes on. A job on a node that fails is put back by SLURM itself (--requeue). Adapt the
# lines below to your cluster; we had none to run this on, only recipes/multinode.sh, which it starts on every node.
#
#SBATCH --job-name=nanoedit
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
export PROCESSES=${SLURM_GPUS_ON_NODE:-1} JOB=$SLURM_JOB_ID SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER=$(srun --nodes 1 --ntasks 1 --nodelist "$FIRST" hostname -I | cut -d" " -f1)

srun --kill-on-bad-exit=1 bash -c \
  'recipes/multinode.sh "$SLURM_NNODES" "$0" "$(hostname -I | cut -d" " -f1)" "$@"' "$MASTER" "$@" &
# srun itself would turn SIGTERM into SIGKILL; scancel hands it to the processes
trap 'scancel --signal=TERM "$SLURM_JOB_ID"; wait $!; scontrol requeue "$SLURM_JOB_ID"' TERM
wait $!
