#!/usr/bin/env bash
# Short runs that differ from the reference draft in one thing each. Results are in
# docs/log/2026-11-25-draft-ablation.md.
#
#   recipes/embedded_model/ablation.sh WORK_DIR [STEPS]
#
# WORK_DIR is the one of make.sh. The drafts go into a copy of the model, WORK_DIR/ablation/model.
set -euo pipefail
work=$1 steps=${2:-150}
place=$work/ablation
texts=$work/texts
[ -d "$place/model" ] || { mkdir -p "$place" && cp -r "$work/model" "$place/model" && rm -r "$place/model/drafts"; }

# train NAME OPTION... ; OPTIONs come last, so they override the ones below
train() {
  name=$1; shift
  [ -f "$place/$name.done" ] || {
    resume=$([ -f "$place/runs/$name/options.json" ] && echo --resume || true)
    s3d train $resume --model "$place/model" --dtype float32 --run "$place/runs/$name" --name "$name" --overwrite \
      --data "$work/own_stories.jsonl" --data "$work/own_middles.jsonl" --data "$work/own_answers.jsonl" \
      --valid "$texts/stories_check.jsonl" --valid "$texts/dialogues_check.jsonl" \
      --valid-prompts 4 --valid-tokens 16 --validate-every 0 --save-every 0 \
      --steps "$steps" --learning-rate 0.003 --batch-size 8 --row-length 256 --anchors 16 \
      --skip 2-6 --gamma 4 "$@"
    touch "$place/$name.done"
  }
}

train reference --rank 16 --bridge-rank 64
train mask --mode mask
train full --mode full --out "$place/full" --learning-rate 0.001
train bidirectional --rank 16 --bridge-rank 64 --block-attention bidirectional
train random-anchors --rank 16 --bridge-rank 64 --random-anchors
train kl --rank 16 --bridge-rank 64 --objective kl
train tv --rank 16 --bridge-rank 64 --objective tv
train rank-4 --rank 4 --bridge-rank 16
train rank-32 --rank 32 --bridge-rank 128
train no-bridge --rank 16 --bridge-rank 0
train keep-7 --rank 16 --bridge-rank 64 --skip 3-5
train keep-3 --rank 16 --bridge-rank 64 --skip 1-7
train early-exit --rank 16 --bridge-rank 64 --skip 5-9
