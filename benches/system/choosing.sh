#!/usr/bin/env bash
# Figures of docs/choosing.md on E2E: 1,000 rows, 2 epochs, 200 dev tables. prefix, prefix-mlp, full and lora with three
# seeds, top2 and adapter with one. Stop it at any time: the same command goes on where it stopped.
#
#   benches/system/choosing.sh MODEL E2E_FOLDER OUT [further flags of prefixfast compare, such as --dry-run]
set -eu
model=$1 data=$2 out=$3
shift 3
compare() {
  prefixfast compare "$data/e2e_train.jsonl.gz" --eval-data "$data/e2e_dev.jsonl.gz" --task e2e --model "$model" \
    -o "$out" --max-rows 1000 --num-train-epochs 2 --max-inputs 200 "$@"
}
compare --methods prefix,prefix-mlp,full,lora --seeds 3 "$@"
compare --methods top2,adapter --seeds 1 "$@"
