#!/usr/bin/env bash
# Trains the small model of food and drink on two processor cores, in under an hour:
#   bash docs/recipes/food.sh PACKAGES OUT
# PACKAGES and OUT as in emoji.sh.
set -euo pipefail
packages=$1 out=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
sources=("$packages"/{noto,twemoji,fluent-emoji-flat})

# The tokenizer knows the words of all pictures, not of food alone.
[ -e "$out/all/tokenizer.json" ] || {
  python3 -m unifiedar data emoji --from "${sources[@]}" --out "$out/all"
  python3 - "$out/all" <<'PYTHON'
import sys
from unifiedar.data import emoji
from unifiedar.tokenizer import train_tokenizer
pictures = emoji.load(sys.argv[1])
train_tokenizer(sorted({*pictures.captions, *pictures.concepts})).save(f"{sys.argv[1]}/tokenizer.json")
PYTHON
}
python3 -m unifiedar data emoji --from "${sources[@]}" --category "Food & Drink" --out "$out/data"
cp "$out/all/tokenizer.json" "$out/data/"

stage() {
  local name=$1
  shift
  torchrun --nproc-per-node 2 -m unifiedar train "$name" --data "$out/data" --out "$out/$name" --device cpu "$@"
}
stage tower --config emoji-tiny --steps 1800 --batch 10 --align 0 --warmup 100 --lr 1.5e-3 --ema 0.99 \
  --augmentation 0.3 --contrastive 0.3
stage unified --tower "$out/tower/model" --steps 2400 --batch 16 --warmup 100 --lr 2e-3 --ema 0.99 --augmentation 0.3
python3 -m unifiedar train export --model "$out/unified/model" --out "$out/model"
python3 -m unifiedar bench quality --data "$out/data" --model "$out/model" --out "$out/quality" --device cpu
