"""What each of two processes does on its own stand-in NPU: collectives, DDP, FSDP2 and accelerate, all over hccl."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported while there is a group, its functions would keep that for ever
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hvt_backbones.processes import leave_processes
from tests.npu.only_on import OnlyOn

STEPS = 3


def collectives(rank: int, device: torch.device) -> None:
    def here(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    for operation, expected in [(dist.ReduceOp.SUM, 3.0), (dist.ReduceOp.AVG, 1.5), (dist.ReduceOp.MAX, 2.0)]:
        for dtype in (torch.float32, torch.bfloat16):
            x = here(rank + 1, dtype=dtype)
            dist.all_reduce(x, op=operation)
            assert x.item() == expected
    work = dist.all_reduce(x := here(1.0), async_op=True)
    work.wait()
    assert x.item() == 2.0
    assert work.get_future().wait()[0].device == device
    gathered = torch.empty(4, device=device)
    dist.all_gather_into_tensor(gathered, here(rank, rank + 10))
    assert gathered.tolist() == [0, 10, 1, 11]
    scattered = torch.empty(1, device=device)
    for operation, factor in [(dist.ReduceOp.SUM, 2), (dist.ReduceOp.AVG, 1)]:
        dist.reduce_scatter_tensor(scattered, here(1, 2), op=operation)
        assert scattered.item() == factor * (rank + 1)
    part = torch.arange(6.0, device=device).view(3, 2)[1:] * (rank + 1)  # begins within its storage
    dist.broadcast(part, src=1)
    assert part.tolist() == [[4, 6], [8, 10]]
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": rank, "tensor": here(rank)})
    assert [entry["rank"] for entry in objects] == [0, 1]
    dist.gather_object(rank, objects if rank == 0 else None)
    assert rank == 1 or objects == [0, 1]
    dist.barrier()
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


def train(model: nn.Module, images: Tensor, **arguments: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **arguments)
    with OnlyOn("npu"):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(images).float().square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def data_parallel(rank: int, device: torch.device, images: Tensor, expected: nn.Module) -> None:
    for arguments in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        model = network().to(device)
        model[0].weight.data += rank  # DDP copies rank 0's
        model = DistributedDataParallel(model, device_ids=[device.index], **arguments)
        train(model, images[rank::2], fused=True)
        torch.testing.assert_close(model.module.state_dict(), expected.state_dict())


def sharded(rank: int, device: torch.device, images: Tensor, expected: nn.Module) -> None:
    mesh = init_device_mesh("npu", (2,))
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 0.05)]:
        model = network().to(device)
        for module in (model[0], model[3], model):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
        train(model, images[rank::2], fused=True)
        for name, value in model.state_dict().items():
            assert value.device == device
            torch.testing.assert_close(value.full_tensor(), expected.state_dict()[name], rtol=tolerance, atol=tolerance)


def accelerated(rank: int, device: torch.device, images: Tensor, expected: nn.Module) -> None:
    accelerator = Accelerator(mixed_precision="no")
    assert accelerator.distributed_type == DistributedType.MULTI_NPU
    assert accelerator.device == device
    assert accelerator.state.backend == "hccl"
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    for _ in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(model(images[rank::2]).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(accelerator.unwrap_model(model).state_dict(), expected.state_dict())
    assert accelerator.gather(torch.tensor([rank], device=device)).tolist() == [0, 1]


def main() -> None:
    dist.init_process_group("hccl")
    rank = dist.get_rank()
    device = torch.device("npu", rank)
    torch.npu.set_device(device)
    collectives(rank, device)
    images = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    expected = network().to(device)
    train(expected, images)
    data_parallel(rank, device, images, expected)
    sharded(rank, device, images, expected)
    accelerated(rank, device, images, expected)
    leave_processes()


if __name__ == "__main__":
    main()
