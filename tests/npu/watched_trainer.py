"""`python -m classification.train` on the stand-in NPU, where every step is held to `OnlyOn("npu")`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest import mock

from classification.data.loading import Batch
from classification.state import Outcome, TrainStep
from classification.train import main
from tests.npu.only_on import OnlyOn

step = TrainStep.__call__


def watched_step(self: TrainStep, group: Sequence[Batch], stop: bool = False) -> Outcome:
    tensors = [*self.model.parameters(), *self.model.buffers(), *(batch.images for batch in group)]
    assert {tensor.device.type for tensor in tensors} == {"npu"}
    with OnlyOn("npu"):
        outcome = step(self, group, stop)
    states = [value for state in self.optimizer.state.values() for value in state.values() if value.dim()]
    assert states or not outcome.applied
    assert {value.device.type for value in states} <= {"npu"}
    return outcome


def train(argv: Sequence[str]) -> int:
    with mock.patch.object(TrainStep, "__call__", watched_step):
        return main(argv)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
