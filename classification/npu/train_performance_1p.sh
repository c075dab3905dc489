#!/usr/bin/env bash
set -eu

usage() {
    cat <<'END'
usage: train_performance_1p.sh DATA_DIR [RECIPE] [--key value ...]

Measure ms per step and images per second of training on one NPU; nothing is saved.
DATA_DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg; the word `synthetic` needs no data and leaves decoding out.
RECIPE is swin_tiny unless given. Options go to the trainer: --benchmark-steps 200 --batch-size 256 --train.amp fp16
END
}

default_recipe=swin_tiny
# shellcheck source=environment.sh
. "$(dirname -- "$0")/environment.sh"
if [ "$data_dir" = synthetic ]; then
    data=(--data.kind synthetic)
else
    data=(--data-dir "$data_dir")
fi
exec python -m classification.train "$recipe" "${data[@]}" --device npu --benchmark-steps 100 "$@"
