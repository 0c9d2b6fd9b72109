#!/usr/bin/env bash
# The published ME-DLM pipeline on LLaDA-8B, with the published settings, on one node of 8 GPUs: rows per step 2048 in stage
# 1 and 128 in stages 2 and 3 (published on 8 nodes), learning rate 5e-5, in stage 3 1e-5. RESULTS.md says what --published sets.
#
#   recipes/medlm_8b.sh TEXT.jsonl DIALOGUES.jsonl       {"text"} lines; {"history", "response"} lines
#
# Not run by us at this size. RESULTS.md has the arithmetic: a step takes up to 57 GiB per GPU with --parallel fsdp (computed), and
# does not fit into 80 with ddp or with fsdp --reshard_after_forward False.
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n "2,/^set/s/^#//p" "$0"
TEXT=$(realpath "${1:?usage: recipes/medlm_8b.sh TEXT.jsonl DIALOGUES.jsonl}") TALK=$(realpath "${2:?usage: recipes/medlm_8b.sh TEXT.jsonl DIALOGUES.jsonl}")
cd "$(dirname "$0")/.."
COMMON="--method medlm --seed 3407 --max_len 2048 --warmup_steps 100 --logging_steps 1 --lr_scheduler_type cosine --bf16
  --gradient_checkpointing --published --num_train_epochs 1 --per_device_train_batch_size 1 --min_t 0.0 --max_t 1.0"
RUN="torchrun --nproc_per_node 8 train.py --parallel fsdp $COMMON"

python convert.py --to medlm -i GSAI-ML/LLaDA-8B-Base -o out/LLaDA-8B-Base
$RUN --model_cfg out/LLaDA-8B-Base --train_file "$TEXT" --weight_decay 0.01 --gradient_accumulation_steps 256 --learning_rate 5e-5 \
  --copy_head --save_steps 5000 --output_dir out/medlm-stage1
$RUN --model_cfg out/medlm-stage1 --train_file "$TALK" --gradient_accumulation_steps 16 --pad_len 128 \
  --learning_rate 5e-5 --save_steps 1000 --output_dir out/medlm-stage2
$RUN --model_cfg out/medlm-stage2 --train_file "$TALK" --gradient_accumulation_steps 16 --pad_len 128 \
  --learning_rate 1e-5 --intermediate_ratio 0.5 --mask_diffusion_pred_per_step 2 4 8 16 --max_diffusion_steps 32 \
  --intermediate_min_t 0.0 --intermediate_max_t 1.0 --save_steps 1000 --output_dir out/medlm-stage3
python evaluate.py --path out/medlm-stage3 --task humaneval mbpp gsm8k math500 \
  --mask_diffusion_step 48 --edit_diffusion_step 16 --allow_code_execution
