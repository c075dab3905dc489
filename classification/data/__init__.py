"""The pictures of a training: where they lie, how they are read and augmented, in which order, and the batches."""

from .loading import (
    Batch,
    Loader,
    batches,
    data_root,
    endless,
    eval_loader,
    open_data,
    open_pictures,
    preprocessing,
    train_loader,
    train_transform,
)
from .pictures import Pictures, Unreadable

__all__ = [
    "Batch",
    "Loader",
    "Pictures",
    "Unreadable",
    "batches",
    "data_root",
    "endless",
    "eval_loader",
    "open_data",
    "open_pictures",
    "preprocessing",
    "train_loader",
    "train_transform",
]
