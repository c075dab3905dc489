"""One file from one http(s) address: resumed when the connection is cut, verified, and visible only once complete.

`torch.hub.download_url_to_file` neither resumes nor compares the length with what the server announced, so the
transfer is made here, with the same client (urllib, which honours the proxy variables).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EHOSTUNREACH, ENETUNREACH, ENOSPC
from pathlib import Path

from ..atomic import is_disk_full
from ..errors import WeightsError
from .files import foreign_content

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
ATTEMPTS_WITHOUT_PROGRESS = 5
RETRY_SECONDS = 1.0  # doubled after each attempt that brought nothing
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


def download(url: str, destination: Path, sha256: str | None = None) -> None:
    """Download `url` to `destination`, whose folder exists.

    The bytes gather in `destination` + ".partial", which a later call continues after a cut connection, provided
    that a hash or the server's ETag shows the file to be still the same. Two processes must not do this at
    once: hold a lock.

    Args:
        sha256: the file's SHA-256 or its first digits.

    Raises:
        WeightsError: no network, a refusal by the server, too many cuts in a row, other content than weights, the
            wrong hash, or a folder that is full or cannot be written.
    """
    transfer = _Transfer(url, destination)
    with _storage_errors(transfer):
        if sha256 is None and not transfer.etag.exists():
            transfer.discard()  # nothing would tell that the rest is of another version
        _receive_all(transfer)
        if sha256 is not None and not has_sha256(transfer.partial, sha256):
            transfer.discard()
            raise WeightsError(
                f"the file at {url} does not have the expected SHA-256 {sha256} and was removed: "
                "download it again; if it stays so, the published file is another one"
            )
        os.replace(transfer.partial, destination)
        transfer.discard()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def has_sha256(path: Path, expected: str) -> bool:
    """Whether the SHA-256 of a file begins with the digits `expected`."""
    return sha256_of(path).startswith(expected.lower())


@dataclass
class _Transfer:
    url: str
    destination: Path
    total: int | None = None
    resumable: bool = True

    @property
    def partial(self) -> Path:
        return self.destination.with_name(self.destination.name + ".partial")

    @property
    def etag(self) -> Path:
        """Names the version of the file on the server that the partial file is a part of."""
        return self.destination.with_name(self.destination.name + ".partial.etag")

    def received(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)


@contextlib.contextmanager
def _storage_errors(transfer: _Transfer) -> Iterator[None]:
    folder = transfer.destination.parent
    try:
        yield
    except OSError as error:  # those of the network do not come as far as this
        if is_disk_full(error):
            missing = "room" if transfer.total is None else f"{transfer.total} bytes"
            transfer.discard()
            raise WeightsError(
                f"cannot store {transfer.url}, the disk of {folder} is full or a quota reached ({error.strerror}): "
                f"free {missing} there, or set TORCH_HOME to another disk"
            ) from error
        raise WeightsError(
            f"cannot store {transfer.url} in {folder} ({error.strerror or error}): "
            "make the folder writable, or set TORCH_HOME to one that is"
        ) from error


def _receive_all(transfer: _Transfer) -> None:
    attempts, best, wait = 0, transfer.received(), RETRY_SECONDS
    while cut := _receive(transfer):
        if transfer.received() > best:  # a server that cannot resume has to get further than before
            attempts, best, wait = 0, transfer.received(), RETRY_SECONDS
        attempts += 1
        if attempts == ATTEMPTS_WITHOUT_PROGRESS:
            size = f"{transfer.received()} of {transfer.total or 'an unknown number of'} bytes"
            remedy = "repeat the command when the connection is better"
            if not transfer.resumable:
                remedy = "the server cannot resume, so use a steadier connection or fetch the file by other means"
            raise WeightsError(
                f"the download of {transfer.url} failed {attempts} times in a row ({cut}; {size}): {remedy}"
            )
        time.sleep(wait)
        wait *= 2


def _receive(transfer: _Transfer) -> str | None:
    """Append what the server sends to the partial file; None if it is complete, else what went wrong on the way."""
    offset = transfer.received()
    headers = {"User-Agent": "hvt_backbones", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if transfer.etag.exists():
            headers["If-Range"] = transfer.etag.read_text()
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(transfer.url, headers=headers), timeout=TIMEOUT_SECONDS
        )
    except (ValueError, http.client.InvalidURL) as error:
        raise WeightsError(f"{transfer.url} is not a valid address ({error}): correct it") from error
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the partial file is no part of what the server has now
            transfer.discard()
        elif error.code not in RETRIED_STATUS:
            raise WeightsError(_why_refused(transfer.url, error)) from error
        return f"HTTP {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if _is_network_missing(reason):
            raise WeightsError(
                f"no connection to the server of {transfer.url} ({reason}): check the network and the proxy, "
                f"or download it elsewhere and put it at {transfer.destination}"
            ) from error
        return str(reason) or type(reason).__name__

    with response:
        if response.status != 206:
            transfer.resumable = offset == 0
            offset = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            transfer.discard()
            return "the server sent another range than was asked for"
        length = response.headers.get("Content-Length")
        transfer.total = offset + int(length) if length else None
        return _write_body(transfer, response, offset)


def _write_body(transfer: _Transfer, response: http.client.HTTPResponse, offset: int) -> str | None:
    from tqdm import tqdm

    if transfer.total is not None and shutil.disk_usage(transfer.destination.parent).free < transfer.total - offset:
        raise OSError(ENOSPC, os.strerror(ENOSPC))
    bar = tqdm(
        desc=transfer.destination.name, initial=offset, total=transfer.total, unit="B", unit_scale=True, disable=None
    )
    with bar, transfer.partial.open("ab" if offset else "wb") as file:
        if offset == 0:
            transfer.etag.unlink(missing_ok=True)
            etag = response.headers.get("ETag", "")
            if etag.startswith('"'):  # a weak one (W/"...") does not promise the same bytes
                transfer.etag.write_text(etag)
        while True:
            try:
                chunk = response.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return str(error) or type(error).__name__
            if file.tell() == 0 and (reason := foreign_content(chunk)):
                transfer.discard()
                raise WeightsError(f"{transfer.url} {reason}")
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
        missing = (transfer.total or 0) - file.tell()
    return f"the connection was closed {missing} bytes early" if missing > 0 else None


def _is_network_missing(reason: object) -> bool:
    return isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)) or (
        isinstance(reason, OSError) and reason.errno in (ENETUNREACH, EHOSTUNREACH)
    )


def _why_refused(url: str, error: urllib.error.HTTPError) -> str:
    if error.code in (404, 410):
        return f"{url} does not exist on the server (HTTP {error.code}): check the address, the file may have moved"
    if error.code in (401, 403):
        return f"{url} needs a permission (HTTP {error.code}): download it with your account and pass the file's path"
    return f"the server refuses {url} (HTTP {error.code} {error.reason}): check the address"
