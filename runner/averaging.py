"""Test-time augmentation of segmentation in the memory of two maps of all classes, not of one for each view."""

from __future__ import annotations

from typing import Any

import torch
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample
from torch import Tensor

ROWS = 64  # of a map that are turned into probabilities at once


class AveragingTTAModel(SegTTAModel):
    """mmsegmentation's `SegTTAModel`, which keeps the logits of every view until the last is there, with a running sum.

    Its predictions are the same: the probabilities are added in the same order.
    """

    def test_step(self, data: dict[str, Any]) -> list[SegDataSample]:
        """Of each view, a list of as many pictures: `data` has lists over the views, as MMEngine's has it."""
        views = len(next(iter(data.values())))
        totals: list[Tensor] = []
        first: list[SegDataSample] = []
        for view in range(views):
            samples = self.module.test_step({key: value[view] for key, value in data.items()})
            for number, sample in enumerate(samples):
                logits = sample.seg_logits.data
                del sample.seg_logits
                if view == 0:
                    first.append(sample)
                    totals.append(torch.zeros_like(logits))
                for rows, total in zip(logits.split(ROWS, dim=1), totals[number].split(ROWS, dim=1), strict=True):
                    total += rows.softmax(dim=0) if self.module.out_channels > 1 else rows.sigmoid()
                del logits
            del samples, sample
        for sample, total in zip(first, totals, strict=True):
            total /= views
            if self.module.out_channels > 1:
                decided = total.argmax(dim=0, keepdim=True)
            else:
                decided = (total > self.module.decode_head.threshold).to(total)
            sample.pred_sem_seg.data = decided
        return first
