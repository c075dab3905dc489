"""`torch.npu` of the stand-in."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from torch_npu import _C

from . import amp as amp
from . import utils as utils

default_generators: tuple[torch.Generator, ...] = tuple(_C.default_generators())
BoolTensor, LongTensor = torch.BoolTensor, torch.LongTensor  # MMEngine names them when it is imported
_process = os.getpid()
_initialized = True  # activation checkpointing looks at it


def _index(device: Any = None) -> int:
    """The index of a device that is given as such, by name, by index, or not at all."""
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "npu":
        raise ValueError(f"Expected a npu device, but got: {device}")
    return current_device() if device.index is None else device.index


def init() -> None:
    """Nothing is left to do after the import."""


_lazy_init = init


def is_initialized() -> bool:
    return not _is_in_bad_fork()


def _is_in_bad_fork() -> bool:
    return os.getpid() != _process


# devices


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return len(default_generators)


def current_device() -> int:
    return torch._C._accelerator_getDeviceIndex()


def set_device(device: Any) -> None:
    torch._C._accelerator_setDeviceIndex(_index(device))


def synchronize(device: Any = None) -> None:
    torch.accelerator.synchronize(_index(device))


def _exchange_device(device: int) -> int:
    return torch._C._accelerator_exchangeDevice(device) if device >= 0 else -1


_maybe_exchange_device = _exchange_device


class device:
    """The current device inside a `with` block; None or a negative index changes nothing."""

    def __init__(self, device: Any) -> None:
        self.idx = -1 if device is None else _index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = _exchange_device(self.idx)

    def __exit__(self, *raised: object) -> None:
        if self.prev_idx >= 0:
            set_device(self.prev_idx)


def get_device_name(device_name: Any = None) -> str:
    return f"Stand-in NPU {_index(device_name)}"


def get_device_properties(device_name: Any = None) -> SimpleNamespace:
    free, total = mem_get_info(device_name)
    return SimpleNamespace(name=get_device_name(device_name), total_memory=total, free_memory=free)


def get_device_capability(device: Any = None) -> None:
    """None, as the real package answers unless it is told to imitate CUDA."""


def set_compile_mode(jit_compile: bool) -> None:
    """The stand-in compiles nothing."""


def is_bf16_supported(including_emulation: bool = False) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]


def is_autocast_enabled() -> bool:
    return torch.is_autocast_enabled("npu")


def set_autocast_enabled(enable: bool) -> None:
    torch.set_autocast_enabled("npu", enable)


def get_autocast_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("npu")


def set_autocast_dtype(dtype: torch.dtype) -> None:
    torch.set_autocast_dtype("npu", dtype)


# streams


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: int) -> Stream:
        if kwargs:  # those of a stream that exists
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, f"npu:{_index(device)}", priority=priority)


class Event:
    """Makes a `torch.Event`, whose `elapsed_time` takes no subclass."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:
        return torch.Event("npu", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)


def _as_stream(stream: torch.Stream) -> Stream:
    return Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def current_stream(device: Any = None) -> Stream:
    return _as_stream(torch._C._accelerator_getStream(_index(device)))


def default_stream(device: Any = None) -> Stream:
    return Stream(stream_id=0, device_index=_index(device), device_type=current_stream().device_type)


def set_stream(stream: Stream) -> None:
    torch._C._accelerator_setStream(stream)


class StreamContext:
    """The current stream inside a `with` block."""

    def __init__(self, stream_ctx: Stream | None) -> None:
        self.stream = stream_ctx

    def __enter__(self) -> None:
        if self.stream is not None:
            self.before = current_stream(self.stream.device_index)
            set_stream(self.stream)

    def __exit__(self, *raised: object) -> None:
        if self.stream is not None:
            set_stream(self.before)


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


# memory, in bytes


def memory_stats(device: Any = None) -> dict[str, Any]:
    return torch.accelerator.memory_stats(_index(device))


def memory_allocated(device: Any = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Any = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_reserved(device: Any = None) -> int:
    return torch.accelerator.memory_reserved(_index(device))


def max_memory_reserved(device: Any = None) -> int:
    return torch.accelerator.max_memory_reserved(_index(device))


def reset_peak_memory_stats(device: Any = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


reset_max_memory_allocated = reset_peak_memory_stats


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free, total."""
    return torch.accelerator.get_memory_info(_index(device))


def empty_cache() -> None:
    torch.accelerator.empty_cache()


# random numbers


def get_rng_state(device: int | str | torch.device = "npu") -> Tensor:
    return default_generators[_index(device)].get_state()


def get_rng_state_all() -> list[Tensor]:
    return [generator.get_state() for generator in default_generators]


def set_rng_state(new_state: Tensor, device: int | str | torch.device = "npu") -> None:
    default_generators[_index(device)].set_state(new_state)


def set_rng_state_all(new_states: list[Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(seed)


def seed() -> None:
    default_generators[current_device()].seed()


def seed_all() -> None:
    manual_seed_all(default_generators[0].seed())


def initial_seed() -> int:
    return default_generators[current_device()].initial_seed()
