"""Files and folders that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InputError


@contextlib.contextmanager
def whole_file(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A path to write to, beside `path` and with its suffix, that becomes `path` when all is written.

    Until then, and if an exception ends it, `path` is what it was before. Its folder is made. A process that is killed
    leaves what `leftovers` finds.

    Args:
        needed: bytes that there must be room for, where that is known.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if needed is not None and shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _not_written(path, error, needed) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def leftovers(path: Path) -> Iterable[Path]:
    """What `whole_file` of `path` left beside it in processes that were killed."""
    return path.parent.glob(f".{glob.escape(path.stem)}.????????.partial{glob.escape(path.suffix)}")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: the disk, the user's quota or the largest file size allowed."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path | None]:
    """A folder to write into that becomes `folder` when all is written; None where `folder` holds something already.

    Where another process was first, `folder` is what that one wrote.

    Raises:
        InputError: it cannot be written.
    """
    try:
        there = folder.exists() and any(folder.iterdir())
        if not there:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _not_written(folder, error) from error
    if there:
        yield None
        return
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's own are for this user alone
        os.replace(staging, folder)
    except OSError as error:
        if not (folder.is_dir() and any(folder.iterdir())):  # else another process was first
            raise _not_written(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _not_written(path: Path, error: OSError, needed: int | None = None) -> InputError:
    # Pillow's and NumPy's own errors have no number, and so no text for it
    reason = error.strerror or error
    remedy = "free room or choose another folder"
    if needed is not None:
        full = is_disk_full(error) or error.errno is None  # safetensors and torch.save tell no number
        remedy = f"free {needed} bytes there or choose another folder" if full else "choose a folder you can write to"
    return InputError(f"{path} was not written ({reason}): {remedy}")
