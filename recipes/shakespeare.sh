#!/usr/bin/env bash
# Edit Flows on your own text, from scratch: tokenizer, training, one sample with its GIF. About 40 minutes on one core.
#
#   recipes/shakespeare.sh tinyshakespeare.txt
#
# The file is the 1.1 MB "tiny shakespeare" corpus (on the hub as Trelis/tiny-shakespeare); any .txt will do.
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
TEXT=${1:?usage: recipes/shakespeare.sh FILE.txt}
TEXT=$(realpath "$TEXT")
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
OUT=${OUT:-out/shakespeare}

$PYTHON train.py --method editflow --dataset_args "$TEXT" --max_length 128 --x0_sampler "masks[length:64]" \
  --schedule linear --preset small --vocab_size ${VOCAB:-4096} --bf16 --per_device_train_batch_size 16 --learning_rate 6e-4 \
  --warmup_ratio 0.05 --weight_decay 0.05 --max_steps ${STEPS:-5000} --eval_steps 500 --logging_steps 50 --output_dir "$OUT"

$PYTHON sample.py --model_name_or_path "$OUT" --tau 0.01 --mask_length 64 --seed 42 --top_p 0.9 --make_gif "$OUT/decode_trace.gif"
$PYTHON recipes/plot.py "$OUT" -o "$OUT/loss.png"
