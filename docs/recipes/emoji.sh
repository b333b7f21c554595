#!/usr/bin/env bash
# Trains the model "emoji", which ships, from the icon sets.
#   bash docs/recipes/emoji.sh PACKAGES OUT [GPUS]
# PACKAGES: folder with the unpacked npm packages @iconify-json/{noto,twemoji,fluent-emoji-flat}, e.g. node_modules/@iconify-json
# OUT: gets data/, tower/, unified/, model/ (8 bits, what ships) and quality/. GPUS: how many, 1 if absent.
# TOWER_STEPS and UNIFIED_STEPS, in the environment, shorten a trial; 8,000 of the tower rebuild about 1 dB better. A run
# that was killed goes on where it was.
set -euo pipefail
packages=$1 out=$2 gpus=${3:-1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

stage() { # stage NAME OPTIONS...: 1,024 and 1,280 pictures a step, shared by the GPUs
  local name=$1
  shift
  [ -e "$out/$name/finished" ] && return
  local resume=()
  [ -e "$out/$name/last.pt" ] && resume=(--resume)
  torchrun --nproc-per-node "$gpus" -m unifiedar train "$name" --data "$out/data" --out "$out/$name" --compile \
    --save-every 2500 --sheet-every 2500 "${resume[@]}" "$@"
  touch "$out/$name/finished"
}

[ -e "$out/data/index.json" ] ||
  python3 -m unifiedar data emoji --from "$packages"/{noto,twemoji,fluent-emoji-flat} --out "$out/data"
stage tower --batch $((1024 / gpus)) --steps "${TOWER_STEPS:-6200}"
stage unified --batch $((1280 / gpus)) --steps "${UNIFIED_STEPS:-10500}" --lr 1.2e-3 --tower "$out/tower/model"
python3 -m unifiedar train export --model "$out/unified/model" --out "$out/model"
python3 -m unifiedar bench quality --data "$out/data" --model "$out/model" --out "$out/quality"
