#!/usr/bin/env bash
set -eu

usage() {
    cat <<'END'
usage: eval.sh DATA_DIR [CHECKPOINT] [--key value ...]

Top-1, top-5 and loss of a checkpoint on one NPU.
DATA_DIR holds val/CLASS/*.jpg, or the class folders themselves.
CHECKPOINT is a file in any layout (the trainer's model_best.safetensors, timm's, the authors'), or a model's name
for its published weights; swin_tiny unless given. Options go to `python -m classification.validate`:
    eval.sh imagenet outputs/swin_tiny/model_best.safetensors --batch-size 256 --amp bf16 --json result.json
END
}

default_recipe=swin_tiny
# shellcheck source=environment.sh
. "$(dirname -- "$0")/environment.sh"
exec python -m classification.validate "$recipe" --data-dir "$data_dir" --device npu "$@"
