#!/usr/bin/env bash
set -eu

usage() {
    cat <<'END'
usage: train_full_8p.sh DATA_DIR [RECIPE] [--key value ...]

Train a recipe to its end on the 8 NPUs of one machine and evaluate it after every epoch.
DATA_DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg. RECIPE is swin_tiny unless given.
Options go to the trainer. With `--resume auto` the same command goes on where the last one was stopped:
    train_full_8p.sh imagenet swin_base --output-dir outputs/swin_base --resume auto
END
}

default_recipe=swin_tiny
# shellcheck source=environment.sh
. "$(dirname -- "$0")/environment.sh"
exec torchrun --nproc_per_node 8 -m classification.train "$recipe" --data-dir "$data_dir" --device npu "$@"
