#!/usr/bin/env bash
# Makes the embedded model: its texts, the model with a first draft, its own output, the final draft.
#
#   recipes/embedded_model/make.sh DATA_DIR WORK_DIR
#
# prepare.py reads DATA_DIR. The result is WORK_DIR/int8. A finished step is not repeated; an interrupted
# one continues.
set -euo pipefail
recipe=$(dirname "$0")
data=$1 work=$2
# A training step has large buffers: huge pages, and memory that is not returned, save page faults.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1
GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=100000000000
mkdir -p "$work"
texts=$work/texts

[ -d "$texts" ] || { python "$recipe/prepare.py" "$data" "$texts.new" && mv "$texts.new" "$texts"; }
# Held-out texts that the runs decode for their curves.
for kind in stories dialogues; do
  head -n 24 "$texts/${kind}_valid.jsonl" > "$texts/${kind}_check.jsonl"
done

resume() { [ -f "$1/options.json" ] && echo --resume || true; }

# Stories three times: they are fewer and harder than the dialogues.
[ -d "$work/model" ] || s3d pretrain $(resume "$work/pretrain") \
  --config "$recipe/model.json" --out "$work/model" --run "$work/pretrain" \
  --data "$texts/stories_train.jsonl" --data "$texts/stories_train.jsonl" \
  --data "$texts/stories_train.jsonl" --data "$texts/dialogues_train.jsonl" \
  --valid "$texts/stories_check.jsonl" --valid "$texts/dialogues_check.jsonl" \
  --valid-prompts 48 --valid-tokens 96 --validate-every 600 --save-every 100 \
  --steps 2400 --learning-rate 0.003 --warmup-steps 100 --weight-decay 0.1 --ema-decay 0.995 \
  --batch-size 12 --row-length 320 \
  --joint-draft --skip 2-6 --gamma 6 --anchors 12 --random-anchors --rank 16 --bridge-rank 64

# The model's own greedy output: stories from prompts of two lengths, and answers.
distill() {
  [ -f "$work/own_$2.jsonl" ] || s3d distill --model "$work/$1" --dtype float32 \
    --out "$work/own_$2.jsonl" --sampled-fraction 0 --batch-size 64 "${@:3}"
}
distill model stories --prompts "$texts/stories_train.jsonl" --limit 1280 --prompt-tokens 16 --max-new-tokens 200
distill model middles --prompts "$texts/stories_train.jsonl" --limit 1280 --prompt-tokens 80 --max-new-tokens 160 --seed 1
distill model answers --prompts "$texts/questions_train.jsonl" --limit 3840 --max-new-tokens 80

[ -f "$work/draft/done" ] || {
  s3d train $(resume "$work/draft") --model "$work/model" --dtype float32 --run "$work/draft" \
    --start default --overwrite \
    --data "$work/own_stories.jsonl" --data "$work/own_middles.jsonl" --data "$work/own_answers.jsonl" \
    --valid "$texts/stories_check.jsonl" --valid "$texts/dialogues_check.jsonl" \
    --valid-prompts 48 --valid-tokens 96 \
    --steps 800 --learning-rate 0.002 --batch-size 12 --row-length 256 --anchors 16
  touch "$work/draft/done"
}

# The shipped precision: int8 is the fastest on most CPUs, and so small a model has no outliers that a
# rotation would spread; what stays float32 is small.
[ -d "$work/int8" ] || s3d-convert "$work/model" "$work/int8" --quantize int8-plain --dtype float32

# The draft continues, with a higher rank and γ = 4, on the output of the int8 model.
distill int8 int8_stories --prompts "$texts/stories_train.jsonl" --limit 1792 --prompt-tokens 16 --max-new-tokens 200
distill int8 int8_answers --prompts "$texts/questions_train.jsonl" --limit 6400 --max-new-tokens 80
[ -f "$work/draft_int8/done" ] || {
  s3d train $(resume "$work/draft_int8") --model "$work/int8" --run "$work/draft_int8" \
    --start default --overwrite --rank 28 --gamma 4 \
    --data "$work/own_int8_stories.jsonl" --data "$work/own_int8_answers.jsonl" \
    --valid "$texts/stories_check.jsonl" --valid "$texts/dialogues_check.jsonl" \
    --valid-prompts 48 --valid-tokens 96 --validate-every 400 \
    --steps 1600 --learning-rate 0.002 --batch-size 12 --row-length 256 --anchors 16 --decay 0.8
  touch "$work/draft_int8/done"
}

# The last draft runs three layers instead of five; a chain tells its rows each other's tokens.
distill int8 more_stories --prompts "$texts/stories_train.jsonl" --limit 3584 --prompt-tokens 16 --max-new-tokens 200
distill int8 more_answers --prompts "$texts/questions_train.jsonl" --limit 9600 --max-new-tokens 80
[ -f "$work/draft_three/done" ] || {
  s3d train $(resume "$work/draft_three") --model "$work/int8" --run "$work/draft_three" \
    --start default --overwrite --skip 1-7 --fit-rows 256 --chain-rank 32 --recall 4 \
    --data "$work/own_more_stories.jsonl" --data "$work/own_more_answers.jsonl" \
    --valid "$texts/stories_check.jsonl" --valid "$texts/dialogues_check.jsonl" \
    --valid-prompts 48 --valid-tokens 96 --validate-every 400 --save-every 100 \
    --steps 1600 --learning-rate 0.001 --objective kl --batch-size 12 --row-length 256 --anchors 24
  touch "$work/draft_three/done"
}
