"""Parting from the other processes of a job."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported while there is a group, its functions would keep that for ever
from torch.nn.parallel import DistributedDataParallel

from hvt_backbones.processes import leave_processes
from tests.gloo import gloo_threads, gloo_threads_are_gone


def _train_and_fail() -> None:
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.ring = [model]
    model(torch.ones(1, 2)).sum().backward()
    raise KeyError("of the run")


def _fail_with_a_message() -> None:
    try:
        _train_and_fail()
    except KeyError as error:
        raise ValueError("of the command") from error


def _job(folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    dist.barrier()
    assert gloo_threads()
    try:
        _fail_with_a_message()
    except ValueError:
        leave_processes()
    assert not dist.is_initialized()
    assert gloo_threads_are_gone()


def test_no_thread_is_left_though_a_failed_run_holds_its_model(tmp_path: Path) -> None:
    job = multiprocessing.get_context("spawn").Process(target=_job, args=(str(tmp_path),))
    job.start()
    job.join(600)
    assert job.exitcode == 0
    leave_processes()  # of no job: nothing to do
