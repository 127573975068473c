#!/usr/bin/env bash
# Makes the draft for SmolLM2-135M-Instruct: the model, its own answers, a first draft, more answers to
# short prompts, and the draft that goes on from there with a chain and a vocabulary of its own.
#
#   recipes/smollm2_draft/make.sh PROMPTS.jsonl WORK_DIR [ANSWERS [MORE_ANSWERS]]
#
# PROMPTS.jsonl(.gz) has one {"messages": [...]} a line. The result is WORK_DIR/draft. A finished step is
# not repeated; an interrupted one continues.
set -euo pipefail
prompts=$1 work=$2 answers=${3:-1393} more=${4:-1901}
# A training step has large buffers: huge pages, and memory that is not returned, save page faults.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1
GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=100000000000
mkdir -p "$work"

[ -d "$work/model" ] || python -m benchmarks.smollm2 "$work/model" --dtype bfloat16
[ -f "$work/own.jsonl" ] || s3d distill --model "$work/model" --dtype float32 --prompts "$prompts" \
  --out "$work/own.jsonl" --limit "$answers" --max-new-tokens 192 --sampled-fraction 0.25 \
  --temperature 0.7 --batch-size 16

resumed() { if [ -f "$work/$1/options.json" ]; then echo --resume; fi; }
train() { s3d train --model "$work/model" --batch-size 8 --row-length 256 --save-every 50 \
  --valid-prompts 16 --valid-tokens 96 "$@"; }

[ -d "$work/model/drafts/first" ] || train $(resumed first) \
  --data "$work/own.jsonl" --run "$work/first" --name first \
  --skip 8-22 --gamma 4 --rank 32 --bridge-rank 64 \
  --steps 1400 --learning-rate 0.002 --warmup-steps 50 --anchors 16 --validate-every 350

[ -f "$work/short.jsonl" ] || s3d distill --model "$work/model" --dtype float32 --prompts "$prompts" \
  --out "$work/short.jsonl" --limit "$more" --longest-prompt 87 --seed 1 --max-new-tokens 160 \
  --sampled-fraction 0 --batch-size 32

[ -d "$work/model/drafts/trained" ] || train $(resumed run) \
  --data "$work/own.jsonl" --data "$work/short.jsonl" --run "$work/run" --name trained \
  --start first --chain-rank 256 --draft-vocab 16384 \
  --steps 300 --learning-rate 0.001 --warmup-steps 30 --anchors 48 --validate-every 0

[ -d "$work/draft" ] || s3d draft export trained "$work/draft" --model "$work/model"
