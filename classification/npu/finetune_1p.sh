#!/usr/bin/env bash
set -eu

usage() {
    cat <<'END'
usage: finetune_1p.sh DATA_DIR [RECIPE] [--key value ...]

Fine-tune published weights on your own pictures on one NPU.
DATA_DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg; its class folders decide the number of classes.
RECIPE is finetune unless given; linear_probe trains the head alone. Options go to the trainer:
    finetune_1p.sh flowers --model.name swin_base --epochs 30 --output-dir outputs/flowers
END
}

default_recipe=finetune
# shellcheck source=environment.sh
. "$(dirname -- "$0")/environment.sh"
exec python -m classification.train "$recipe" --data-dir "$data_dir" --device npu "$@"
