#!/usr/bin/env bash
# Train on several machines. Run this on each of them, with the same arguments after the first three:
#
#   recipes/multinode.sh NODES MASTER ADDRESS train.py's flags ...
#
#   NODES     how many machines
#   MASTER    address of one of them, written as that one does; there they meet (port 29400, or PORT)
#   ADDRESS   address of this one, in the network they share
#
# --output_dir must be on a disk that all of them see: the first process writes the checkpoints, all read them. When the
# processes of a machine die the others end within a minute (when the machine vanishes from the network without a word,
# after five minutes); run the same command again, and training goes on from the newest checkpoint, on as many machines
# as there are then (keep nodes x processes x --gradient_accumulation_steps as it was, and the losses are the same).
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
NODES=${1:?usage: recipes/multinode.sh NODES MASTER ADDRESS FLAGS...} MASTER=${2:?MASTER is missing} ADDRESS=${3:?ADDRESS is missing}
shift 3
[ -x "$(dirname "$0")/../.venv/bin/python" ] && PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python} || PYTHON=${PYTHON:-python}
# the interface that holds ADDRESS; where gloo and NCCL guess wrong, nothing connects
INTERFACE=${INTERFACE:-$(ip -o -4 address 2>/dev/null | awk -v a="$ADDRESS" '$4 ~ "^" a "/" {print $2}' | tail -n 1 || true)}
[ -z "$INTERFACE" ] || export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
GPUS=$(nvidia-smi -L 2>/dev/null | wc -l || true)
PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
# torchrun passes SIGTERM on and kills what is still there so many seconds later: time to write a checkpoint
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}
[ "$ADDRESS" = "$MASTER" ] && HOST=1 || HOST=0
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$PROCESSES" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER:${PORT:-29400}" --rdzv-id "${JOB:-nanoedit}" --rdzv-conf "is_host=$HOST" --local-addr "$ADDRESS" \
  "$(dirname "$0")/../train.py" "$@"
