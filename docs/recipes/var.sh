#!/usr/bin/env bash
# Trains the small VAR of concepts and its tokenizer, under 7 MiB together, from the icon sets, on one to four GPUs:
#   bash docs/recipes/var.sh PACKAGES OUT [GPUS]
# PACKAGES, OUT and GPUS as in emoji.sh. OUT: gets data/, vae/, var/ and model/ (8 bits, what ships), which
#   unifiedar generate "red apple" --model OUT/model -o apple.png
# draws with, and quality/, of which `python -m bench card OUT` writes the model card. What ships took 5 minutes on two
# H100: the tokenizer on both, then VAR on one.
# VAE_STEPS and VAR_STEPS, in the environment, shorten a trial. A run that was killed goes on where it was.
set -euo pipefail
packages=$1 out=$2 gpus=${3:-1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

stage() { # stage NAME BATCH OPTIONS...: BATCH pictures a step, shared by the GPUs
  local name=$1 batch=$2
  shift 2
  [ -e "$out/$name/finished" ] && return
  local resume=()
  [ -e "$out/$name/last.pt" ] && resume=(--resume)
  torchrun --nproc-per-node "$gpus" -m unifiedar train "$name" --data "$out/data" --out "$out/$name" \
    --batch $((batch / gpus)) --save-every 1000 --sheet-every 1000 "${resume[@]}" "$@"
  touch "$out/$name/finished"
}

[ -e "$out/data/index.json" ] ||
  python3 -m unifiedar data emoji --from "$packages"/{noto,twemoji,fluent-emoji-flat} --out "$out/data"
stage vae 1024 --steps "${VAE_STEPS:-1213}" --lr 1.5e-3 --warmup 60 --augmentation 0.3 --ema 0.998
stage var 768 --steps "${VAR_STEPS:-2600}" --lr 6.667e-4 --ema 0.998 --vae "$out/vae/model"
python3 -m unifiedar train export --model "$out/var/model" --out "$out/model"
python3 -m unifiedar bench quality --data "$out/data" --model "$out/model" --exact "$out/var/model" --out "$out/quality"
