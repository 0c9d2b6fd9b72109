#!/usr/bin/env bash
# Does a pretrained encoder help? all-MiniLM-L6-v2 (22M parameters, BERT architecture) fine-tuned on GSM8K with both
# methods, against the same model from random weights. About half an hour on two CPU cores.
#
#   recipes/minilm.sh MODEL GSM8K_TRAIN.jsonl      MODEL: sentence-transformers/all-MiniLM-L6-v2, or its folder
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
MODEL=${1:?usage: recipes/minilm.sh MODEL GSM8K_TRAIN.jsonl} DATA=$(realpath "$2")
[ -d "$MODEL" ] && MODEL=$(realpath "$MODEL")
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
OUT=${OUT:-out/minilm} STEPS=${STEPS:-250}

train() {  # method, pretrained or random, more flags
  $PYTHON train.py --method "$1" --model_name_or_path "$OUT/$1-$2-start" --dataset_args "$DATA[test:200]" --bf16 \
    --max_steps "$STEPS" --learning_rate 3e-4 --warmup_ratio 0.05 --weight_decay 0.01 --logging_steps 20 \
    --eval_steps 0.1 --eval_samples 1 --output_dir "$OUT/$1-$2" "${@:3}"
}

for METHOD in ${METHODS:-editflow medlm}; do
  $PYTHON convert.py --to $METHOD -i "$MODEL" -o "$OUT/$METHOD-pretrained-start" --overwrite
  $PYTHON - "$OUT/$METHOD" <<'PY'
import sys
import torch
from plumbing import checkpoints, tokenizer

start, out = f"{sys.argv[1]}-pretrained-start", f"{sys.argv[1]}-random-start"
model = checkpoints.load(start)
checkpoints.init_weights(model, torch.Generator().manual_seed(0))
checkpoints.save(model, out)
tokenizer.load_tokenizer(start).save(out)
PY
  for START in pretrained random; do
    if [ $METHOD = editflow ]; then
      train editflow $START --x0_sampler "masks[length:64]" --schedule linear --max_length 256 --per_device_train_batch_size 8
    else
      train medlm $START --loss_norm bound --pad_len 32 --max_length 512 --per_device_train_batch_size 4
    fi
  done
  $PYTHON recipes/plot.py "$OUT/$METHOD-pretrained" "$OUT/$METHOD-random" -o "$OUT/$METHOD.png"
done
