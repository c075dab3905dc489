"""From a name, a tag, a path or a URL to a file on this disk, and to the weights in it.

Downloads are verified where a hash is known, and made once when several processes ask at the same time. What the
cache holds is used without asking the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import is_disk_full
from ..errors import InputError, WeightsError
from ..variants import Variant, find_variant
from .download import CHUNK_BYTES, download, has_sha256
from .files import FoundWeights, find_weights, read_weights
from .published import HUB_PREFIX, PublishedWeights
from .report import shown

Source = Mapping[str, Any] | str | os.PathLike

CHECKPOINT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")
HUB_FILENAMES = ("model.safetensors", "pytorch_model.bin")

# torchvision, timm and OpenMMLab end a file's name with the first digits of its SHA-256; eight digits that read as a
# date are none.
HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8,64})\.")


def is_file_or_url(source: str | Path) -> bool:
    """Whether `source` leads to a file, here or elsewhere, rather than being a model's name or a weight tag."""
    path = Path(source)
    there = isinstance(source, Path) or source.startswith(HUB_PREFIX) or "://" in source
    return there or path.is_file() or len(path.parts) > 1 or path.suffix in CHECKPOINT_SUFFIXES


def published_weights(variant: Variant, tag: str | None) -> PublishedWeights:
    """The weights of a tag (None for the first), or of an image model's name where `variant` is its video model.

    Raises:
        InputError, WeightsError: neither is known.
    """
    if variant.family == "video_swin" and tag is not None and tag not in variant.tags:
        try:
            images, tag = find_variant(tag)
        except InputError as error:
            known = f"{variant.name} has no weights {tag!r}; it has {', '.join(variant.tags)}"
            raise WeightsError(f"{known}, and is inflated from a 2-D Swin, such as swin_tiny") from error
        if images.family != "swin":
            raise InputError(f"{variant.name} is inflated from a 2-D Swin, such as swin_tiny, not from {images.name}")
        return images.published(tag)
    return variant.published(tag)


def pretrained_file(variant: Variant, tag: str | None, pretrained: bool | str | Path) -> Path:
    """The file that `pretrained` of `create_backbone` means for a model whose name speaks of the weights `tag`.

    Raises:
        InputError, WeightsError: it leads nowhere.
    """
    if not isinstance(pretrained, bool):
        if is_file_or_url(pretrained):
            return fetch(pretrained)
        tag = str(pretrained)
    published = published_weights(variant, tag)
    return fetch(published.source, filename=published.filename)


def read_source(source: Source, weights_key: str | None = None) -> FoundWeights:
    """The weights of a state dict, a path, a URL or "hf-hub:org/name".

    Raises:
        InputError: it is none of these.
        WeightsError: they cannot be found or read.
    """
    if isinstance(source, Mapping):
        return find_weights(source, weights_key)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"source is {shown(source)}: give a state dict, a path, a URL or hf-hub:org/name")
    return read_weights(fetch(source), weights_key)


def fetch(source: str | os.PathLike, *, filename: str | None = None) -> Path:
    """Return the path of a weights file, downloaded into the cache if it is not there yet.

    A URL whose file name carries the first digits of its SHA-256 ("swin_t-704ceda3.pth") is verified against those, a
    file of the Hub against the Hub's own record. The caches are those of `torch.hub` and of `huggingface_hub`.

    Args:
        source: a local path (or file:// URL), an http(s) URL, or "hf-hub:org/name" with an optional "@revision".
        filename: the name in the Hub's repository; by default model.safetensors, else pytorch_model.bin.

    Raises:
        WeightsError: the file cannot be found, downloaded, verified or stored.
    """
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        return _fetch_url(name)
    if name.startswith(HUB_PREFIX):
        return _fetch_from_hub(name.removeprefix(HUB_PREFIX), (filename,) if filename else HUB_FILENAMES)
    if name.startswith("file://"):
        path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(name).path))
    elif "://" in name:
        raise WeightsError(f"cannot fetch {name}: pass a path, an http(s) URL or {HUB_PREFIX}org/name")
    else:
        path = Path(name).expanduser()
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or pass a URL or {HUB_PREFIX}org/name")
    return path


def _fetch_url(url: str) -> Path:
    import torch
    from filelock import FileLock

    filename = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    if not filename:
        raise WeightsError(f"{url} names no file: pass the address of the weights file itself")
    hash_in_name = HASH_IN_NAME.search(filename)
    if hash_in_name is None:  # such a name may belong to many files: the address tells them apart
        stem, suffix = os.path.splitext(filename)
        filename = f"{stem}.{hashlib.sha256(url.encode()).hexdigest()[:8]}{suffix}"
    destination = Path(torch.hub.get_dir()) / "checkpoints" / filename
    if destination.is_file():
        return destination
    if _is_offline():
        raise WeightsError(
            f"{url} is not in the cache and HF_HUB_OFFLINE forbids the network: "
            f"download it elsewhere and put it at {destination}"
        )
    with contextlib.ExitStack() as stack:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{destination}.lock"))
        except OSError as error:
            raise WeightsError(
                f"cannot write to the cache {destination.parent} ({error.strerror or error}): "
                "make the folder writable, or set TORCH_HOME to one that is"
            ) from error
        if not destination.is_file():  # another process may have brought it while this one waited
            download(url, destination, hash_in_name and hash_in_name[1])
    return destination


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _fetch_from_hub(name: str, filenames: tuple[str, ...]) -> Path:
    """Let `huggingface_hub` do it: cache, lock, retries and resume are its own. Errors become ours."""
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    repository, _, revision = name.partition("@")
    cache = constants.HF_HUB_CACHE
    try:
        for candidate in filenames:
            cached = try_to_load_from_cache(repository, candidate, cache_dir=cache, revision=revision or None)
            if isinstance(cached, str):
                return Path(cached)
        if _is_offline():
            raise WeightsError(
                f"{' and '.join(filenames)} of {repository} are not in the cache {cache} and "
                f"HF_HUB_OFFLINE forbids the network: run `hf download {repository} {filenames[0]}` elsewhere and copy "
                f"the folder models--{repository.replace('/', '--')} there, or pass the file's path"
            )
        for candidate in filenames:
            try:
                path = Path(hf_hub_download(repository, candidate, cache_dir=cache, revision=revision or None))
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                continue
            _verify_blob(path, repository)
            return path
        raise WeightsError(f"{repository} has no {' or '.join(filenames)}: pass filename= or another repository")
    except WeightsError:
        raise
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(_why_hub_failed(name, cache, error)) from error


def _verify_blob(path: Path, repository: str) -> None:
    """The Hub's record of a large file is its SHA-256, and `huggingface_hub` names the stored file by it."""
    if not path.is_symlink():
        return
    blob = path.parent / os.readlink(path)  # one link only: what lies behind may be named by another kind of hash
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and not has_sha256(blob, blob.name):
        path.unlink()
        blob.unlink()
        raise WeightsError(
            f"{path.name} of {repository} does not have the SHA-256 that the Hub has on record and was removed: "
            "download it again"
        )


def _why_hub_failed(name: str, cache: str, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError):  # the Hub could not be asked: the cause says why
        error = error.__cause__ or error
        if isinstance(error, errors.FileMetadataError):
            return f"{hub} does not answer as a Hugging Face Hub: check HF_ENDPOINT, the proxy and the firewall"
        if not isinstance(error, errors.HfHubHTTPError):
            return (
                f"no connection to {hub} ({_first_line(error)}) and {name} is not in the cache "
                f"{cache}: check the network and the proxy, or pass the path of a downloaded file"
            )
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms on its page at {hub}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no such revision: check what follows the @"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is not on {hub}, or is private: check the name, or run `hf auth login`"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{hub} refuses {name} (HTTP {error.response.status_code}): try later, or pass the path of a file"
    if isinstance(error, (errors.HFValidationError, ValueError)):
        return f"{name!r} is not the name of a repository ({_first_line(error)}): write {HUB_PREFIX}org/name"
    if is_disk_full(error) or _has_no_room(cache):
        return (
            f"cannot store {name}, the disk of {cache} is full or a quota reached: "
            "free room there, or set HF_HOME to another disk"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"cannot store {name} in {cache} ({error.strerror}): "
            "make the folder writable, or set HF_HOME to one that is"
        )
    return f"the download of {name} was cut ({_first_line(error)}): repeat the command"


def _has_no_room(folder: str) -> bool:
    """Asked of the disk: `hf_xet` reports whatever stops it as a RuntimeError."""
    try:
        return shutil.disk_usage(folder).free < CHUNK_BYTES
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
