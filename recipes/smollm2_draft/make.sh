#!/usr/bin/env bash
# Makes the draft for SmolLM2-135M-Instruct: the model, its own answers, the draft.
#
#   recipes/smollm2_draft/make.sh PROMPTS.jsonl WORK_DIR [ANSWERS]
#
# PROMPTS.jsonl(.gz) has one {"messages": [...]} a line. The result is WORK_DIR/draft. A finished step is
# not repeated; an interrupted one continues.
set -euo pipefail
prompts=$1 work=$2 answers=${3:-1178}
# A training step has large buffers: huge pages, and memory that is not returned, save page faults.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1
GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=100000000000
mkdir -p "$work"

[ -d "$work/model" ] || python -m benchmarks.smollm2 "$work/model" --dtype bfloat16
[ -f "$work/own.jsonl" ] || s3d distill --model "$work/model" --dtype float32 --prompts "$prompts" \
  --out "$work/own.jsonl" --limit "$answers" --max-new-tokens 192 --sampled-fraction 0.25 \
  --temperature 0.7 --batch-size 16

resume=
[ -f "$work/run/options.json" ] && resume=--resume
[ -d "$work/model/drafts/trained" ] || s3d train $resume \
  --model "$work/model" --data "$work/own.jsonl" --run "$work/run" --name trained \
  --skip 8-22 --gamma 4 --rank 32 --bridge-rank 64 \
  --steps 1400 --learning-rate 0.002 --warmup-steps 50 --batch-size 8 --row-length 256 --anchors 16 \
  --save-every 50 --validate-every 350 --valid-prompts 16 --valid-tokens 96

[ -d "$work/draft" ] || s3d draft export trained "$work/draft" --model "$work/model"
