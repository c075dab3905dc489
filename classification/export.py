"""One file of weights from a checkpoint: `python -m classification.export RUN/checkpoints/step_00001234 OUT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hvt_backbones import InputError
from hvt_backbones.errors import ArgumentParser, exit_on_input_error
from hvt_backbones.weights.files import save_state_dict

from .checkpoint import files
from .validate import checkpoint_weights


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m classification.export",
        description="Write the weights of a checkpoint of the trainer, whole or in shards, into one file that says its "
        "model; of the average where there is one. A run leaves such files after each epoch.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder checkpoints/step_*")
    parser.add_argument("output", type=Path, metavar="OUT", help="a .safetensors file")
    args = parser.parse_args(argv)
    if args.output.suffix != ".safetensors":
        raise InputError(f"{args.output}: end the name in .safetensors")
    if reason := files.damage(args.checkpoint):
        raise InputError(f"checkpoint {args.checkpoint} is damaged ({reason}); give another.")
    state = files.load_state(args.checkpoint)
    weights = checkpoint_weights(args.checkpoint, state)
    save_state_dict(weights, args.output, state["description"])
    print(f"wrote {args.output}: {len(weights)} tensors of step {state['step']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
