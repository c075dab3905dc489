"""Files of `torch.save`, read without running code.

They go through PyTorch's restricted reader (`weights_only=True`), in which the few harmless classes that published
checkpoints carry beside their weights (settings, logged numbers) are replaced by inert placeholders.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import WeightsError

LEGACY_PICKLES = 5  # in a file of `torch.save` before its zip format: the content is the fourth
GETATTR = "builtins.getattr"
# the classes and functions that PyTorch's restricted reader knows itself
OF_TENSORS = re.compile(
    r"torch\.(\w+|(_utils|_tensor|storage|nn\.parameter)\.\w+|serialization\._get_layout|(\w+\.)+\w+(Storage|Tensor))"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|complex|set)"
)


class _Placeholder:
    """Stands for an object whose content is not needed: takes any arguments and state, keeps none, runs nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PlaceholderMapping:
    """The same for classes derived from dict: PyTorch's reader fills an OrderedDict, but no other subclass of dict."""

    def __new__(cls, *args: object) -> OrderedDict:  # type: ignore[misc]  # another class is the point of it
        return OrderedDict()


class _HistoryBuffer(_Placeholder):
    """MMEngine's log of a number."""


def _history_method(owner: object, name: object) -> None:
    """For the `getattr` with which MMEngine's logs name their statistics, and for no other: it reaches anything."""
    if owner is not _HistoryBuffer or name not in ("mean", "max", "min", "current"):
        raise pickle.UnpicklingError(f"{GETATTR} of {owner!r}, {name!r}")


_PLACEHOLDERS: dict[Callable[..., Any], tuple[str, ...]] = {
    _Placeholder: (
        "argparse.Namespace",  # PVT, Twins, timm
        "pathlib.PosixPath",  # a value in such a namespace
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "numpy.dtype",  # numbers among the metrics
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "builtins.dict",  # factories of a defaultdict
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "builtins.slice",
    ),
    _HistoryBuffer: ("mmengine.logging.history_buffer.HistoryBuffer",),
    _history_method: (GETATTR,),
    _PlaceholderMapping: (
        "yacs.config.CfgNode",  # Swin
        "collections.defaultdict",
        "addict.addict.Dict",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
    ),
}
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (stand_in, name) for stand_in, names in _PLACEHOLDERS.items() for name in names
]


def check_zip(path: Path) -> None:
    """`torch.save` writes a zip archive; its table of contents comes last, so a truncated file has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise damaged(path, "the end of the archive is missing") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript program, not weights: in the project that made it, "
            "save the model's state_dict() with torch.save"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(f"{path} is a zip archive without weights of torch.save: unpack it and pass the file inside")


def load_pickle(path: Path, *, mmap: bool) -> Any:
    """What `torch.save` wrote.

    Raises:
        WeightsError: it is damaged, or needs code to be read.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what cannot be read is an error all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if needed := _first_foreign_global(path):
            raise WeightsError(
                f"{path} needs the code of {needed!r} to be read, which is refused because a pickle can run any "
                "program: in the project that wrote it, save only the tensors, "
                "torch.save(model.state_dict(), 'weights.pth'), and pass that file"
            ) from error
        raise WeightsError(
            f"{path} is a pickle of a kind that cannot be read without running code: in the project that wrote it, "
            "save it again by torch.save(model.state_dict(), 'weights.pth') with its default protocol"
        ) from error
    except Exception as error:  # damaged bytes raise nearly any type, from UnicodeDecodeError to RuntimeError
        raise damaged(path, re.split(r"\. |\n", str(error))[0].strip() or type(error).__name__) from error


def _first_foreign_global(path: Path) -> str | None:
    """The first class or function that a pickle names and that weights do not need."""
    names = [name for name in _globals(path) if not OF_TENSORS.fullmatch(name)]
    known = {name for names in _PLACEHOLDERS.values() for name in names}
    # one of those that are known is refused, too, where it is used for another end
    return next((name for name in names if name not in known), GETATTR if GETATTR in names else None)


def _globals(path: Path) -> list[str]:
    """The classes and functions that the pickles in a file name. Nothing is run: their opcodes are only listed."""
    names: list[str] = []
    with contextlib.ExitStack() as stack, contextlib.suppress(Exception):  # damaged: what was found until then counts
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if zipfile.is_zipfile(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
            file = stack.enter_context(archive.open(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))
        else:
            file.seek(0)
        for _ in range(LEGACY_PICKLES):
            pushed: list[Any] = []  # what each opcode puts on the stack, where it is a constant
            memo: list[Any] = []
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    name = argument.replace(" ", ".") if argument else ".".join(map(str, pushed[-2:]))
                    names.append(name.replace("__builtin__.", "builtins."))  # the name of Python 2
                if opcode.name == "MEMOIZE":  # of protocol 4, as STACK_GLOBAL; older ones name globals in one opcode
                    memo.append(pushed[-1])
                elif isinstance(argument, int) and "BINGET" in opcode.name and memo:
                    pushed.append(memo[argument])
                else:
                    pushed.append(argument)
    return names


def damaged(path: Path, reason: str) -> WeightsError:
    size = path.stat().st_size
    return WeightsError(f"{path} is truncated or damaged ({size} bytes; {reason}): copy or download it again")
