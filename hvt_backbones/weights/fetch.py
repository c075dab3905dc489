"""From a name of weights to a file on this disk: local paths, URLs, and repositories of the Hugging Face Hub.

Downloads are verified where a hash is known, and made once when several processes ask at the same time. What the
cache holds is used without asking the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

from ..errors import InputError, WeightsError
from .download import download, has_sha256
from .files import FoundWeights, is_disk_full, read_weights
from .report import shown

HUB_PREFIX = "hf-hub:"
HUB_FILENAMES = ("model.safetensors", "pytorch_model.bin")

# torchvision, timm and OpenMMLab end a file's name with the first digits of its SHA-256; eight digits that read as a
# date are none.
HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8,64})\.")


def fetch(
    source: str | os.PathLike,
    *,
    sha256: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    filename: str | None = None,
) -> Path:
    """Return the path of a weights file, downloaded into the cache if it is not there yet.

    Args:
        source: a local path (or file:// URL), an http(s) URL, or "hf-hub:org/name" with an optional "@revision".
        sha256: the file's SHA-256 or its first digits. Without it, a URL whose file name carries them
            ("swin_t-704ceda3.pth") is verified against those, and a file of the Hub against the Hub's own record.
        cache_dir: where downloads go. Default: `torch.hub`'s folder for URLs, `huggingface_hub`'s for the Hub.
        filename: the name in the cache (URLs) or in the repository (Hub; by default model.safetensors, else
            pytorch_model.bin).

    Raises:
        WeightsError: the file cannot be found, downloaded, verified or stored.
    """
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        return _fetch_url(name, sha256, cache_dir, filename)
    if name.startswith(HUB_PREFIX):
        path = _fetch_from_hub(name.removeprefix(HUB_PREFIX), cache_dir, filename)
    elif name.startswith("file://"):
        path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(name).path))
    elif "://" in name:
        raise WeightsError(f"cannot fetch {name}: pass a path, an http(s) URL or {HUB_PREFIX}org/name")
    else:
        path = Path(name).expanduser()
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or pass a URL or {HUB_PREFIX}org/name")
    if sha256 is not None and not has_sha256(path, sha256):
        raise WeightsError(f"{path} does not have the expected SHA-256 {sha256}: check where the file comes from")
    return path


def read_source(source: str | os.PathLike, weights_key: str | None = None) -> FoundWeights:
    """The weights of a path, a URL or "hf-hub:org/name".

    Raises:
        WeightsError: they cannot be found or read.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"source is {shown(source)}: give a state dict, a path, a URL or hf-hub:org/name")
    return read_weights(fetch(source), weights_key)


def _fetch_url(url: str, sha256: str | None, cache_dir: str | os.PathLike | None, filename: str | None) -> Path:
    from filelock import FileLock

    url_name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    if not url_name:
        raise WeightsError(f"{url} names no file: pass the address of the weights file itself")
    hash_in_name = HASH_IN_NAME.search(url_name)
    if filename is None:
        # A name without a hash may belong to many files: the address tells them apart.
        stem, suffix = os.path.splitext(url_name)
        filename = url_name if hash_in_name else f"{stem}.{hashlib.sha256(url.encode()).hexdigest()[:8]}{suffix}"
    destination = _url_cache(cache_dir) / filename

    def is_cached() -> bool:
        return destination.is_file() and (sha256 is None or has_sha256(destination, sha256))

    if is_cached():
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
        if not is_cached():  # another process may have brought it while this one waited
            download(url, destination, sha256 or (hash_in_name[1] if hash_in_name else None))
    return destination


def _url_cache(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _fetch_from_hub(name: str, cache_dir: str | os.PathLike | None, filename: str | None) -> Path:
    """Let `huggingface_hub` do it: cache, lock, retries and resume are its own. Errors become ours."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    repository, _, revision = name.partition("@")
    wanted = {"repo_id": repository, "revision": revision or None, "cache_dir": cache_dir}
    filenames = (filename,) if filename else HUB_FILENAMES
    try:
        for candidate in filenames:
            if isinstance(cached := try_to_load_from_cache(filename=candidate, **wanted), str):
                return Path(cached)
        if _is_offline():
            raise WeightsError(
                f"{' and '.join(filenames)} of {repository} are not in the cache {_hub_cache(cache_dir)} and "
                f"HF_HUB_OFFLINE forbids the network: run `hf download {repository} {filenames[0]}` elsewhere and copy "
                f"the folder models--{repository.replace('/', '--')} there, or pass the file's path"
            )
        for candidate in filenames:
            try:
                path = Path(hf_hub_download(filename=candidate, **wanted))
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
        raise WeightsError(_why_hub_failed(name, cache_dir, error)) from error


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


def _hub_cache(cache_dir: str | os.PathLike | None) -> str:
    from huggingface_hub import constants

    return os.fspath(cache_dir or constants.HF_HUB_CACHE)


def _why_hub_failed(name: str, cache_dir: str | os.PathLike | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(
        error, errors.LocalEntryNotFoundError
    ):  # says only that the Hub could not be asked: the cause says why
        error = error.__cause__ or error
        if isinstance(error, errors.FileMetadataError):
            return f"{hub} does not answer as a Hugging Face Hub: check HF_ENDPOINT, the proxy and the firewall"
        if not isinstance(error, errors.HfHubHTTPError):
            return (
                f"no connection to {hub} ({_first_line(error)}) and {name} is not in the cache "
                f"{_hub_cache(cache_dir)}: check the network and the proxy, or pass the path of a downloaded file"
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
    if is_disk_full(error) or "os error 28" in str(error):
        return (
            f"cannot store {name}, the disk of {_hub_cache(cache_dir)} is full or a quota reached: "
            "free room there, or set HF_HOME to another disk"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"cannot store {name} in {_hub_cache(cache_dir)} ({error.strerror}): "
            "make the folder writable, or set HF_HOME to one that is"
        )
    return f"the download of {name} was cut ({_first_line(error)}): repeat the command"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
