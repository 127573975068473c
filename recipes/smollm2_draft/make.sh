#!/usr/bin/env bash
# Makes the draft for SmolLM2-135M-Instruct: the model, its own answers, a draft of 11 layers that is
# fitted to them and then trained on them, more training on the answers in answers.xz, a draft of 15
# layers that starts from it, and more training of that.
#
#   recipes/smollm2_draft/make.sh PROMPTS.jsonl WORK_DIR [ANSWERS [MORE_ANSWERS]]
#
# PROMPTS.jsonl(.gz) has one {"messages": [...]} a line. The result is WORK_DIR/draft. A finished step is
# not repeated; an interrupted one continues. answers.xz answers the prompts of the draft in the
# repository; with other prompts the later steps train on the answers that the first ones distilled.
set -euo pipefail
prompts=$1 work=$2 answers=${3:-1393} more=${4:-1901}
recipe=$(cd "$(dirname "$0")" && pwd)
# A training step has large buffers: huge pages, and memory that is not returned, save page faults.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1
GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=100000000000
mkdir -p "$work"

[ -d "$work/model" ] ||
  PYTHONPATH="$recipe/../.." python -m benchmarks.smollm2 "$work/model" --dtype bfloat16
later=(--data "$work/more.jsonl")
if [ ! -f "$work/more.jsonl" ]; then
  code=0
  python "$recipe/answers.py" "$work/model" "$prompts" "$work/more.part" || code=$?
  case $code in
    0) mv "$work/more.part" "$work/more.jsonl" ;;
    2) # other prompts
      echo "so the later steps train on the answers that are distilled here"
      later=(--data "$work/own.jsonl" --data "$work/short.jsonl") ;;
    *) exit "$code" ;;
  esac
fi
[ -f "$work/own.jsonl" ] || s3d distill --model "$work/model" --dtype float32 --prompts "$prompts" \
  --out "$work/own.jsonl" --limit "$answers" --max-new-tokens 192 --sampled-fraction 0.25 \
  --temperature 0.7 --batch-size 16
[ -f "$work/short.jsonl" ] || s3d distill --model "$work/model" --dtype float32 --prompts "$prompts" \
  --out "$work/short.jsonl" --limit "$more" --longest-prompt 87 --seed 1 --max-new-tokens 160 \
  --sampled-fraction 0 --batch-size 32

resume=
if [ -f "$work/run/options.json" ]; then resume=--resume; fi
[ -d "$work/model/drafts/trained" ] || s3d train $resume --model "$work/model" \
  --data "$work/own.jsonl" --data "$work/short.jsonl" --run "$work/run" --name trained \
  --skip 2-20 --gamma 4 --rank 32 --bridge-rank 512 --recall 8 --fit-rows 480 --chain-rank 256 \
  --draft-vocab 16384 --objective kl --steps 800 --learning-rate 0.001 --warmup-steps 30 --anchors 48 \
  --batch-size 8 --row-length 256 --seed 1 --save-every 50 --validate-every 0 \
  --valid-prompts 16 --valid-tokens 96

resume=
if [ -f "$work/more_run/options.json" ]; then resume=--resume; fi
[ -d "$work/model/drafts/continued" ] || s3d train $resume --model "$work/model" \
  "${later[@]}" --run "$work/more_run" --name continued --start trained \
  --objective kl --steps 700 --learning-rate 0.0004 --warmup-steps 30 --anchors 48 \
  --batch-size 8 --row-length 256 --seed 15 --save-every 50 --validate-every 0 \
  --valid-prompts 16 --valid-tokens 96

resume=
if [ -f "$work/deeper_run/options.json" ]; then resume=--resume; fi
[ -d "$work/model/drafts/deeper" ] || s3d train $resume --model "$work/model" --dtype float32 \
  "${later[@]}" --run "$work/deeper_run" --name deeper --start continued \
  --skip 2-16 --fit-rows 160 --objective kl --steps 420 --learning-rate 0.0007 --warmup-steps 20 \
  --anchors 64 --batch-size 6 --row-length 256 --seed 21 --save-every 50 --validate-every 0 \
  --valid-prompts 16 --valid-tokens 96

resume=
if [ -f "$work/last_run/options.json" ]; then resume=--resume; fi
[ -d "$work/model/drafts/last" ] || s3d train $resume --model "$work/model" --dtype float32 \
  "${later[@]}" --run "$work/last_run" --name last --start deeper \
  --objective kl --steps 400 --learning-rate 0.0005 --warmup-steps 20 \
  --anchors 64 --batch-size 6 --row-length 256 --seed 22 --save-every 25 --validate-every 0 \
  --valid-prompts 16 --valid-tokens 96

# Trained for γ = 4; 3 is fastest on CPUs.
[ "$work/draft" -nt "$work/model/drafts/last" ] || { # or it is the draft of an earlier recipe
  rm -rf "$work/draft"
  s3d draft export last "$work/draft" --model "$work/model" --gamma 3
}
