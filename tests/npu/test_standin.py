"""The stand-in NPU itself: what the tests that run on it rely on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from hvt_backbones.device import select_device
from hvt_backbones.errors import InputError
from tests.npu.only_on import OnlyOn
from tests.npu.standin_environment import ROOT, standin_environment

NPU = "npu"  # the process that collects the tests knows no such device


def on_npu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(NPU, dtype)


# devices


def test_select_device() -> None:
    assert [str(select_device(name)) for name in ("auto", "npu", "npu:1", "cpu")] == ["npu", "npu", "npu:1", "cpu"]
    with pytest.raises(InputError, match="npu:0 to npu:1"):
        select_device("npu:2")


def test_machine_without_npus() -> None:
    program = "from hvt_backbones.device import select_device as s; print(s('auto')); s('npu')"
    result = subprocess.run(
        [sys.executable, "-c", program], env=standin_environment(devices=0), capture_output=True, text=True, check=False
    )
    assert result.stdout == "cpu\n"
    assert "InputError: device 'npu' is not on this machine" in result.stderr


def test_current_device() -> None:
    with torch.npu.device(1):
        assert torch.empty(1, device="npu").device == torch.device("npu:1")
        assert torch.npu.current_device() == 1
    assert torch.empty(1, device="npu").device == torch.device("npu:0")
    with pytest.raises(RuntimeError, match="Invalid NPU device 2"):
        torch.empty(1, device="npu:2")


def test_streams_and_events() -> None:
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    side = torch.npu.Stream()
    start.record()
    with torch.npu.stream(side):
        assert torch.npu.current_stream() == side
        on_npu(200, 200) @ on_npu(200, 200)
        end.record(side)
    assert torch.npu.current_stream() == torch.npu.default_stream() != side
    torch.npu.current_stream().wait_stream(side)
    torch.npu.synchronize()
    assert start.elapsed_time(end) > 0


# operations that mix devices

MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "mm": lambda npu, cpu: npu @ cpu,
    "add_to_cpu": lambda npu, cpu: cpu.add_(npu),
    "add_to_cpu_number": lambda npu, cpu: cpu.sum().add_(npu.sum()),
    "cat": lambda npu, cpu: torch.cat([npu, cpu]),
    "index_cpu_by_npu": lambda npu, cpu: cpu[npu[0].long()],
    "index_put": lambda npu, cpu: npu.index_put_((torch.tensor([0], device=NPU),), cpu[0]),
    "conv_weight": lambda npu, cpu: F.conv1d(npu[None], cpu[..., None]),
    "two_npus": lambda npu, cpu: npu + cpu.to("npu:1"),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED.keys())
def test_mixing_devices_raises(operation: Callable[[Tensor, Tensor], object]) -> None:
    npu, cpu = torch.full((4, 4), 0.5, device=NPU), torch.full((4, 4), 0.5)
    with pytest.raises(RuntimeError, match="same device|indices should be either on cpu or on the same device"):
        operation(npu, cpu)
    assert torch.equal(npu.cpu(), torch.full((4, 4), 0.5))
    assert torch.equal(cpu, torch.full((4, 4), 0.5))


def test_what_accelerators_allow() -> None:
    x = on_npu(4, 4)
    number, rows = torch.tensor(2.0), torch.tensor([0, 2])
    assert torch.equal((x * number).cpu(), x.cpu() * 2)
    assert torch.equal((number - x).cpu(), 2 - x.cpu())
    assert torch.equal(x[rows].cpu(), x.cpu()[rows])
    x[rows] = number
    assert x[2, 3].item() == 2.0
    x.copy_(torch.ones(4, dtype=torch.int64))  # another device, another type, broadcast
    assert x.sum().item() == 16.0
    assert x.to("npu:1").to("cpu").sum() == 16.0


# values

OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + x.exp()) / 3,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "conv2d": lambda x: F.conv2d(x[None], torch.ones(2, 2, 3, 3, device=x.device), stride=2, padding=1, groups=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x[None], torch.ones(4, 3, 2, 2, device=x.device), stride=2),
    "several_results": lambda x: x.sort(dim=1),
    "size_from_values": lambda x: x[x > 0],
    "list_of_results": lambda x: x.split([1, 3], dim=0),
    "as_strided": lambda x: x.as_strided((2, 2), (3, 1), 1),
    "view_as_other_type": lambda x: x.contiguous().view(torch.int32),
    "new": lambda x: (x.new_zeros(2), torch.arange(3, device=x.device), torch.eye(2, device=x.device)),
    "numbers": lambda x: torch.tensor([x.max().item(), float(x.mean()), len(x)]),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_same_results_as_the_cpu(operation: Callable[[Tensor], object], layout: Callable[[Tensor], Tensor]) -> None:
    cpu = layout(torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0)))
    npu = layout(cpu.to(NPU))
    assert npu.stride() == layout(cpu).stride()
    expected, actual = operation(cpu), operation(npu)
    expected, actual = ([r] if isinstance(r, Tensor) else list(r) for r in (expected, actual))
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a.cpu(), e)
        assert a.stride() == e.stride()


def test_views_share_memory_and_versions() -> None:
    x = torch.zeros(4, 6, device=NPU)
    version = x._version
    x[1:3].T[0].add_(1)
    x.unfold(0, 2, 2)[0, 1].mul_(0).sub_(3)
    x.view(-1)[-1:].fill_(7)
    assert x[1:3, 0].tolist() == [1.0, 1.0]
    assert (x[0, 1].item(), x[1, 1].item(), x[3, 5].item()) == (-3.0, -3.0, 7.0)
    assert x._version > version
    assert x.T.is_contiguous() is False
    root = torch.ones(2, device=NPU, requires_grad=True).exp()
    root.view(-1).add_(1)  # exp needs its result for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        root.sum().backward()


def test_results_are_resized() -> None:
    x, out = on_npu(3, 5), torch.empty(0, device=NPU)
    assert torch.mm(x, x.T, out=out) is out
    assert out.shape == (3, 3)
    torch.testing.assert_close(out.cpu(), x.cpu() @ x.cpu().T)
    values, indices = torch.empty(0, device=NPU), torch.empty(0, dtype=torch.long, device=NPU)
    torch.topk(x, 2, out=(values, indices))
    assert torch.equal(values.cpu(), x.cpu().topk(2).values)
    kept = x.flatten()[:2].clone()
    x.resize_(50)
    assert torch.equal(x[:2], kept)
    x.set_()
    assert x.numel() == 0
    storage = kept.untyped_storage()
    storage.resize_(0)
    assert storage.nbytes() == 0


# random numbers


def test_random_numbers_are_the_devices_own() -> None:
    torch.manual_seed(0)
    host, first = torch.get_rng_state(), torch.npu.get_rng_state()
    drawn = [torch.randn(3, device=NPU), F.dropout(torch.ones(9, device=NPU), 0.5), torch.randperm(9, device=NPU)]
    assert torch.equal(torch.get_rng_state(), host)
    assert not torch.equal(torch.npu.get_rng_state(), first)
    torch.rand(3)
    torch.npu.set_rng_state(first)
    again = [torch.randn(3, device=NPU), F.dropout(torch.ones(9, device=NPU), 0.5), torch.randperm(9, device=NPU)]
    assert all(map(torch.equal, drawn, again))
    torch.manual_seed(0)  # seeds all devices
    assert torch.equal(torch.npu.get_rng_state(), first)
    assert torch.npu.initial_seed() == 0


def test_generators_of_two_devices() -> None:
    torch.npu.manual_seed_all(3)
    states = torch.npu.get_rng_state_all()
    torch.rand(5, device="npu:1")
    assert torch.equal(torch.npu.get_rng_state(0), states[0])
    assert not torch.equal(torch.npu.get_rng_state(1), states[1])
    torch.npu.set_rng_state_all(states)
    assert torch.equal(torch.npu.get_rng_state("npu:1"), states[1])


def test_generator_argument() -> None:
    generators = [torch.Generator(device="npu").manual_seed(5) for _ in range(2)]
    default = torch.npu.get_rng_state()
    assert torch.equal(*(torch.rand(4, device=NPU, generator=generator) for generator in generators))
    assert torch.equal(torch.npu.get_rng_state(), default)
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator"):
        torch.rand(4, device=NPU, generator=torch.Generator())


def test_checkpointing_draws_the_same_again() -> None:
    x = on_npu(50).requires_grad_()
    y = checkpoint(lambda x: F.dropout(x, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


# autocast

CAST: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "matmul": (lambda x: x @ x, torch.bfloat16),
    "add": (lambda x: x + x, torch.float32),
    "sum_of_types": (lambda x: F.linear(x, x) + x, torch.float32),
    "softmax": (lambda x: F.linear(x, x).softmax(-1), torch.float32),
    "layer_norm": (lambda x: F.layer_norm(F.linear(x, x), (4,)), torch.float32),
    "norm": (lambda x: F.linear(x, x).norm(), torch.float32),
    "float64": (lambda x: x.double() @ x.double(), torch.float64),
}


@pytest.mark.parametrize(("function", "dtype"), CAST.values(), ids=CAST.keys())
def test_autocast(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = on_npu(4, 4)
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert function(x).dtype == dtype
        with torch.autocast("npu", enabled=False):
            assert (x @ x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.float32
        torch.testing.assert_close(F.linear(x, x), x @ x.T)


def test_autocast_of_torch_npu() -> None:
    with torch.npu.amp.autocast():
        assert (on_npu(2, 2) @ on_npu(2, 2)).dtype == torch.float16


# optimisers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("package", ["torch", "torch_npu"])
def test_grad_scaler(package: str, fused: bool) -> None:
    parameter = nn.Parameter(torch.ones(3, device=NPU))
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    own = package == "torch_npu"
    scaler = torch.npu.amp.GradScaler(init_scale=8.0) if own else torch.amp.GradScaler("npu", init_scale=8.0)
    scaler.scale((parameter * float("inf")).sum()).backward()
    if own and fused:
        with pytest.raises(TypeError, match="grad_scaler"):
            scaler.step(optimizer)
        return
    scaler.step(optimizer)
    scaler.update()
    if fused:  # the kernel writes what overflowed
        assert not parameter.detach().cpu().isfinite().any()
        return
    assert torch.equal(parameter.detach().cpu(), torch.ones(3))  # skipped
    assert scaler.get_scale() == 4.0
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(parameter.grad.cpu(), torch.ones(3))
    scaler.step(optimizer)
    scaler.update()
    assert (parameter.detach().cpu() < 1).all()


# memory


def test_memory_is_counted() -> None:
    gc.collect()  # of tests before
    before, on_other = torch.npu.memory_allocated(), torch.npu.memory_allocated(1)
    torch.npu.reset_peak_memory_stats()
    x = torch.empty(1000, device=NPU)
    y = x.exp().T  # made by a kernel, and a view of it
    assert torch.npu.memory_allocated() - before == 8000
    del x
    assert torch.npu.memory_allocated() - before == 4000
    assert torch.npu.max_memory_allocated() - before == 8000
    y.cpu()
    del y
    assert torch.npu.memory_allocated() == before
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == before
    assert torch.npu.memory_allocated(1) == on_other
    free, total = torch.npu.mem_get_info()
    assert total - free == before
    assert torch.npu.get_device_properties(0).total_memory == total


def test_training_step_leaks_no_memory() -> None:
    def train() -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(2)).to(NPU)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if not nn.parameter.is_lazy(p)])
        model(on_npu(2, 3, 8, 8)).sum().backward()
        optimizer.step()

    train()
    gc.collect()
    before = torch.npu.memory_allocated()
    train()
    assert torch.npu.memory_allocated() == before


# data and files


def test_pinned_memory() -> None:
    data = TensorDataset(torch.arange(32.0).view(16, 2), torch.arange(16))
    seen = []
    for images, targets in DataLoader(data, batch_size=4, num_workers=2, pin_memory=True):
        assert images.is_pinned()
        assert targets.is_pinned()
        seen.append(images.to(NPU, non_blocking=True)[:, 0])
    assert torch.equal(torch.cat(seen).cpu(), data.tensors[0][:, 0])
    assert not torch.ones(2).is_pinned()
    assert torch.ones(2).pin_memory().is_pinned()


def test_forked_process_cannot_use_the_device() -> None:
    on_npu(1)
    child = os.fork()
    if child == 0:  # as a worker of a DataLoader
        try:
            torch.ones(1, device=NPU)
        except RuntimeError as error:
            os._exit("Cannot re-initialize NPU in forked subprocess" not in str(error))
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_files(tmp_path: Path) -> None:
    tensor = on_npu(3, 4).T
    torch.save({"x": tensor}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["x"].device == torch.device("npu:0")
    assert torch.load(tmp_path / "x.pt", map_location="npu:1")["x"].device == torch.device("npu:1")
    assert torch.equal(torch.load(tmp_path / "x.pt", map_location="cpu")["x"], tensor.cpu())
    save_file({"x": tensor.contiguous()}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor.cpu())


# the check that nothing is on the host


def test_only_on_notices() -> None:
    host, device = torch.ones(8), on_npu(8)
    for operation in (lambda: host + 1, device.cpu, lambda: host.to(NPU), lambda: torch.zeros(8)):
        with pytest.raises(AssertionError, match="on cpu, not on npu"), OnlyOn("npu"):
            operation()
    leaf = device.requires_grad_()
    product = leaf * 2
    product.register_hook(lambda gradient: gradient.cpu().to(NPU))
    with pytest.raises(AssertionError, match="on cpu, not on npu"), OnlyOn("npu"):
        product.sum().backward()
    with OnlyOn("npu"):
        assert (leaf.detach() * torch.tensor(2.0)).sum().item() != 0


# several processes


@pytest.mark.slow
def test_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("two_processes.py"))],
        cwd=ROOT, env=standin_environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
