"""The end of a job of several processes."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback

import torch


def leave_processes() -> None:
    """Part from the other processes of the job, without waiting for any that is gone. To be called when nothing uses
    the model any more, also while an exception is on its way.
    """
    if not torch.distributed.is_initialized():
        return
    # DistributedDataParallel has to go before the group: as the last one to hold it, it would wait for gloo's threads
    # with Python's lock, which they may want, or leave them running while Python shuts down, which aborts the process
    error = sys.exc_info()[1]
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    # what PyTorch would say of a process that ends without it is about itself, not about the run
    with contextlib.suppress(RuntimeError, ValueError):
        torch.distributed.destroy_process_group()
    # DTensor's caches keep the group of FSDP2, and with it the threads: they shall put away what they hold of Python
    # while there is Python
    time.sleep(0.1)
