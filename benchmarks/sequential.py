"""Time and peak memory of one attention of a SwinV2 block with a large window, all at once and part by part.

python -m benchmarks.sequential --map 128 --window 64 --max-logits 16777216
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from hvt_backbones.device import select_device
from hvt_backbones.errors import ArgumentParser, exit_on_input_error
from hvt_backbones.layers.window_attention import CosineWindowAttention
from hvt_backbones.ops import use_attention

from . import measure


def step(attention: CosineWindowAttention, x: torch.Tensor, implementation: str | None) -> Callable[[], None]:
    """Forward and backward."""

    def work() -> None:
        with use_attention(implementation) if implementation else nullcontext():
            attention(x).square().sum().backward()

    return work


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.sequential", description=__doc__.partition("\n")[0])
    parser.add_argument("--map", type=int, default=128, help="side of the map in tokens")
    parser.add_argument("--window", type=int, default=64, help="side of the window in tokens")
    parser.add_argument("--dim", type=int, default=96, help="channels")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--max-logits", type=int, nargs="+", default=[2**24], help="logits at a time")
    parser.add_argument("--implementation", help="of window attention; by default as the device has it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    device = select_device(options.device)
    clock = measure.Clock(device, "process" if device.type == "cpu" else "wall")

    def build(limit: int | None) -> Callable[[], None]:
        window = (options.window,) * 2
        attention = CosineWindowAttention(
            options.dim,
            options.heads,
            window,
            shifted=True,
            small_map="pad",
            qkv_bias=True,
            pretrained_window_size=(0, 0),
        ).to(device)
        attention.max_logits = limit
        x = torch.randn(1, options.map, options.map, options.dim, device=device, requires_grad=True)
        return step(attention, x, options.implementation)

    limits = [None, *options.max_logits]
    memory = {str(limit): measure.peak_memory(lambda limit=limit: build(limit), device) for limit in limits}
    samples = measure.interleave({str(limit): build(limit) for limit in limits}, clock, rounds=options.rounds, warmup=1)
    lines = [("max_logits", "seconds", "GiB")]
    lines += [
        (name, f"{measure.quartiles(times)[1]:.2f}", f"{memory[name] / 2**30:.2f}") for name, times in samples.items()
    ]
    print(measure.aligned(lines, 1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
