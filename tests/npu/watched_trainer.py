"""`python -m classification.train` on the stand-in NPU, where every step is held to `OnlyOn("npu")`.

With `parallel.cpu_offload` what is kept lies on the CPU; the pictures do not, and no operation mixes the two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

from classification.data.loading import Batch
from classification.state import Outcome, TrainStep
from classification.train import main
from tests.npu.only_on import OnlyOn

step = TrainStep.__call__


def watched_step(self: TrainStep, group: Sequence[Batch], stop: bool = False) -> Outcome:
    offloaded = "--parallel.cpu_offload" in sys.argv
    home = "cpu" if offloaded else "npu"
    assert {batch.images.device.type for batch in group} == {"npu"}
    assert {tensor.device.type for tensor in (*self.model.parameters(), *self.model.buffers())} == {home}
    with nullcontext() if offloaded else OnlyOn("npu"):
        outcome = step(self, group, stop)
    states = [value for state in self.optimizer.state.values() for value in state.values() if value.dim()]
    assert states or not outcome.applied
    assert {value.device.type for value in states} <= {home}
    return outcome


def train(argv: Sequence[str]) -> int:
    with mock.patch.object(TrainStep, "__call__", watched_step):
        return main(argv)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
