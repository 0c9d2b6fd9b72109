#!/usr/bin/env bash
# ME-DLM's claim, small: with few passes, drafting and then editing beats filling masks alone.
#
#   recipes/toy_medlm.sh SEED ...     e.g. `recipes/toy_medlm.sh 1 & recipes/toy_medlm.sh 2 & wait` on two cores
#   python recipes/toy_table.py       the table and the plot over all seeds that are there
#
# Per seed, about half an hour on one core:
#   stage2    masked diffusion from scratch on the toy task
#   stage3    trained on from stage2, half of the steps on its own drafts and edits
#   matched   trained on from stage2 as before, for as many seconds as stage3 took: the fair comparison
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
STEPS2=${STEPS2:-8000} STEPS3=${STEPS3:-4500}
COMMON="--method medlm --dataset_args toy --max_length 768 --per_device_train_batch_size 1 --pad_len 24
  --warmup_ratio 0.05 --weight_decay 0.01 --bf16 --loss_norm bound --logging_steps 50 --eval_steps 0.25 --save_steps 500"

RUNS=${OUT:-out/toy_medlm}

for SEED in "$@"; do
  OUT=$RUNS/seed$SEED
  $PYTHON train.py $COMMON --seed $SEED --preset tiny --max_steps $STEPS2 --learning_rate 1.2e-3 --output_dir $OUT/stage2

  $PYTHON train.py $COMMON --seed $SEED --model_name_or_path $OUT/stage2 --max_steps $STEPS3 --learning_rate 1e-3 \
    --intermediate_ratio 0.5 --mask_diffusion_pred_per_step 2 4 8 12 24 --max_diffusion_steps 8 --rollout_order confidence \
    --intermediate_min_t 0.1 --intermediate_max_t 0.7 --output_dir $OUT/stage3

  MATCHED=$($PYTHON - $OUT <<'PY'
import json, sys
from pathlib import Path
last = lambda stage: [r for r in map(json.loads, Path(sys.argv[1], stage, "metrics.jsonl").open()) if "seconds" in r][-1]
two, three = last("stage2"), last("stage3")
print(round(three["seconds"] * two["step"] / two["seconds"]))
PY
  )
  $PYTHON train.py $COMMON --seed $SEED --model_name_or_path $OUT/stage2 --max_steps $MATCHED --learning_rate 1e-3 \
    --output_dir $OUT/matched
done
