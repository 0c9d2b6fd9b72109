#!/usr/bin/env bash
# The three stages of ME-DLM from scratch on GSM8K, then evaluation on its test split: the whole pipeline at a size
# that two CPU cores can carry. The published stages start from LLaDA-8B instead: see recipes/medlm_8b.sh.
#
#   recipes/gsm8k_medlm.sh DIR      DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl ({"question", "answer"} per line)
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
DIR=$(realpath "${1:?usage: recipes/gsm8k_medlm.sh DIR}")
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
OUT=${OUT:-out/gsm8k_medlm} STEPS=${STEPS:-450}
COMMON="--method medlm --max_len 2048 --per_device_train_batch_size 1 --bf16 --lr_scheduler_type cosine --warmup_ratio 0.05
  --weight_decay 0.01 --max_steps $STEPS --logging_steps 10 --eval_steps 0.5 --eval_samples 1 --loss_norm bound"

# stage 1: plain text (here the answers), next_token_head starting as a copy of lm_head
$PYTHON train.py $COMMON --train_file "$DIR/gsm8k_train.jsonl" --text_field answer --preset small --vocab_size 2048 \
  --copy_head --learning_rate 1e-3 --output_dir $OUT/stage1
# stage 2: question and answer, the answer padded to a multiple of pad_len
$PYTHON train.py $COMMON --train_file "$DIR/gsm8k_train.jsonl" --model_cfg $OUT/stage1 --pad_len 64 \
  --learning_rate 1e-3 --output_dir $OUT/stage2
# stage 3: half of the steps on the model's own drafts and edits
$PYTHON train.py $COMMON --train_file "$DIR/gsm8k_train.jsonl" --model_cfg $OUT/stage2 --pad_len 64 \
  --intermediate_ratio 0.5 --mask_diffusion_pred_per_step 8 16 32 --max_diffusion_steps 16 \
  --intermediate_min_t 0.1 --intermediate_max_t 0.7 --learning_rate 5e-4 --output_dir $OUT/stage3

$PYTHON evaluate.py --path $OUT/stage3 --task gsm8k --data gsm8k="$DIR/gsm8k_test.jsonl" --limit ${LIMIT:-200} \
  --system_prompt "" --init_num 192 --mask_diffusion_step 48 --edit_diffusion_step 16 --batch_size 20 \
  --show_answers 3 --output_dir $OUT/evaluation
