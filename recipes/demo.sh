#!/usr/bin/env bash
# The whole of nanoEdit in five minutes on one CPU core: train Edit Flows from scratch on the built-in toy task
# (arithmetic word problems with many right phrasings), answer all 304 held-out prompts in one batch, watch one answer
# being written. `make demo` runs this; a second run finds the trained model and goes straight to the answers.
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
OUT=${OUT:-out/demo}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -e "$OUT/checkpoint-final" ]; then
  $PYTHON train.py --method editflow --dataset_args toy --preset tiny --x0_sampler empty --schedule linear \
    --max_steps 8000 --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_ratio 0.05 --weight_decay 0.01 \
    --max_length 64 --logging_steps 100 --eval_steps 2000 --save_steps 2000 --output_dir "$OUT"
fi

echo
echo "All held-out prompts, 32 steps each:"
$PYTHON evaluate.py --path "$OUT" --task toy --tau 0.03125 --batch_size 304 --show_answers 12 --output_dir "$OUT/evaluation"

echo
echo "64 steps, each of which takes back a little of what was written (the corrector):"
$PYTHON evaluate.py --path "$OUT" --task toy --steps 64 --corrector 2 --batch_size 304 --output_dir "$OUT/corrected"

echo
$PYTHON sample.py --model_name_or_path "$OUT" --prompt "Cora has 4 apples, gets 9:" --steps 64 --corrector 2 --temperature 0 \
  --seed 1 --show --make_gif decode_trace.gif
