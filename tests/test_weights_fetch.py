"""Downloads through the real clients from a loopback server: what arrives, and for each failure its own message."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import file_download

from hvt_backbones.errors import WeightsError
from hvt_backbones.weights import download as download_module
from hvt_backbones.weights.files import read_weights, save_state_dict
from hvt_backbones.weights.sources import fetch
from tests.full_disk import file_size_limit
from tests.weight_server import COMMIT, Served, WeightServer

REPOSITORY = "someone/swin_small"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("made") / "model.safetensors"
    return save_state_dict({"weight": torch.randn(50_000, generator=generator)}, path).read_bytes()


@pytest.fixture
def server() -> Iterator[WeightServer]:
    with WeightServer() as server:
        yield server


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download_module, "RETRY_SECONDS", 0.0)


@pytest.fixture
def hub(server: WeightServer, monkeypatch: pytest.MonkeyPatch) -> WeightServer:
    """The loopback server as `huggingface_hub`'s endpoint, which it reads from the environment only at import."""
    point_hub_at(server.address, monkeypatch)
    return server


def point_hub_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (hub_constants, file_download):  # before version 1 the latter keeps a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between its retries


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Taken, so that nobody else listens there, who would answer."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def hashed_name(body: bytes) -> str:
    return f"swin-{hashlib.sha256(body).hexdigest()[:8]}.safetensors"


def url_cache(tmp_path: Path) -> Path:
    return tmp_path / "torch" / "hub" / "checkpoints"


def left_in(folder: Path) -> set[str]:
    """Files under a folder, without the locks, which stay."""
    return {path.name for path in folder.rglob("*") if not path.is_dir() and path.suffix != ".lock"}


@contextlib.contextmanager
def fails(pattern: str) -> Iterator[None]:
    with pytest.raises(WeightsError, match=pattern) as raised:
        yield
    assert "\n" not in str(raised.value)


# ---- local files


def test_local_paths_pass_through(tmp_path: Path, checkpoint: bytes) -> None:
    path = tmp_path / "my weights.safetensors"
    path.write_bytes(checkpoint)
    assert fetch(path) == fetch(str(path)) == fetch(path.as_uri()) == path


def test_missing_path_and_unknown_scheme(tmp_path: Path) -> None:
    with fails(r"nothing\.pth does not exist: check the path, or pass a URL or hf-hub:org/name"):
        fetch(tmp_path / "nothing.pth")
    with fails(r"cannot fetch s3://bucket/x\.pth: pass a path, an http"):
        fetch("s3://bucket/x.pth")


# ---- URLs


def test_download_is_kept_in_the_cache_of_torch_hub(server: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    name = hashed_name(checkpoint)
    server.pages[f"/{name}"] = Served(checkpoint)
    path = fetch(f"{server.address}/{name}")
    assert path == url_cache(tmp_path) / name
    assert list(read_weights(path).tensors) == ["weight"]
    assert left_in(url_cache(tmp_path)) == {name}
    assert fetch(f"{server.address}/{name}") == path
    assert len(server.requests) == 1


def test_equal_names_at_different_addresses_are_different_files(server: WeightServer, checkpoint: bytes) -> None:
    server.pages |= {"/v1/swin.pth": Served(checkpoint), "/v2/swin.pth": Served(checkpoint + b"\0")}
    paths = [fetch(f"{server.address}/{version}/swin.pth") for version in ("v1", "v2")]
    assert [path.read_bytes() for path in paths] == [checkpoint, checkpoint + b"\0"]
    assert all(path.name.startswith("swin.") and path.suffix == ".pth" for path in paths)


def test_a_date_in_the_name_is_no_hash(server: WeightServer, checkpoint: bytes) -> None:
    server.pages["/swin-20220112.pth"] = Served(checkpoint)
    assert fetch(f"{server.address}/swin-20220112.pth").read_bytes() == checkpoint


REFUSALS = {
    404: r"swin\.pth does not exist on the server \(HTTP 404\): check the address",
    401: r"needs a permission \(HTTP 401\): download it with your account",
    403: r"needs a permission \(HTTP 403\)",
    400: r"the server refuses .* \(HTTP 400 Bad Request\)",
    503: r"failed 5 times in a row \(HTTP 503 Service Unavailable; 0 of an unknown number of bytes\)",
}


@pytest.mark.parametrize(("status", "message"), REFUSALS.items())
def test_refusals_of_the_server(server: WeightServer, tmp_path: Path, status: int, message: str) -> None:
    server.pages["/swin.pth"] = Served(b"sorry", status=status)
    with fails(message):
        fetch(f"{server.address}/swin.pth")
    assert len(server.requests) == (5 if status == 503 else 1)
    assert not left_in(url_cache(tmp_path))


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_is_resumed(server: WeightServer, checkpoint: bytes, reset: bool) -> None:
    server.pages["/swin.pth"] = Served(checkpoint, cuts=[70_000, 50_000], etag='"v1"', reset=reset)
    path = fetch(f"{server.address}/swin.pth")
    assert path.read_bytes() == checkpoint
    assert left_in(path.parent) == {path.name}
    first, second, third = server.gets("/swin.pth")
    assert first.range is None
    if not reset:  # an RST may take bytes with it that were sent
        assert (second.range, third.range) == ("bytes=70000-", "bytes=120000-")
        assert third.sent == len(checkpoint) - 120_000
    else:
        assert second.range is None or second.sent < len(checkpoint)


def test_a_later_call_goes_on_where_the_last_one_gave_up(server: WeightServer, checkpoint: bytes) -> None:
    page = server.pages["/swin.pth"] = Served(checkpoint, cuts=[70_000, 0, 0, 0, 0, 0], etag='"v1"')
    with fails(rf"failed 5 times in a row \(.* early; 70000 of {len(checkpoint)} bytes\): repeat the command"):
        fetch(f"{server.address}/swin.pth")
    page.cuts.clear()
    server.requests.clear()
    assert fetch(f"{server.address}/swin.pth").read_bytes() == checkpoint
    assert [(request.range, request.sent) for request in server.requests] == [
        ("bytes=70000-", len(checkpoint) - 70_000)
    ]


def test_without_etag_and_hash_a_later_call_starts_over(server: WeightServer, checkpoint: bytes) -> None:
    page = server.pages["/swin.pth"] = Served(checkpoint, cuts=[70_000, 0, 0, 0, 0, 0])
    with fails("in a row"):
        fetch(f"{server.address}/swin.pth")
    page.body, page.cuts = checkpoint[::-1], []
    assert fetch(f"{server.address}/swin.pth").read_bytes() == checkpoint[::-1]


def test_a_file_that_changed_meanwhile_starts_over(server: WeightServer, checkpoint: bytes) -> None:
    page = server.pages["/swin.pth"] = Served(checkpoint, cuts=[70_000, 0, 0, 0, 0, 0], etag='"v1"')
    with fails("in a row"):
        fetch(f"{server.address}/swin.pth")
    page.body, page.etag, page.cuts = checkpoint[::-1], '"v2"', []
    assert fetch(f"{server.address}/swin.pth").read_bytes() == checkpoint[::-1]


def test_a_partial_file_longer_than_the_file_starts_over(
    server: WeightServer, tmp_path: Path, checkpoint: bytes
) -> None:
    name = hashed_name(checkpoint)
    server.pages[f"/{name}"] = Served(checkpoint)
    url_cache(tmp_path).mkdir(parents=True)
    (url_cache(tmp_path) / f"{name}.partial").write_bytes(checkpoint + b"more")
    assert fetch(f"{server.address}/{name}").read_bytes() == checkpoint


def test_a_server_that_cannot_resume(server: WeightServer, checkpoint: bytes) -> None:
    page = server.pages["/swin.pth"] = Served(checkpoint, cuts=[70_000, 100_000], ranges=False)
    assert fetch(f"{server.address}/swin.pth").read_bytes() == checkpoint
    page = server.pages["/other.pth"] = Served(checkpoint, cuts=[70_000] * 9, ranges=False)
    with fails(rf"70000 of {len(checkpoint)} bytes\): the server cannot resume, so use a steadier connection"):
        fetch(f"{server.address}/other.pth")
    assert len(page.cuts) == 4  # five attempts, none of which got further than the first


def test_a_wrong_hash_leaves_nothing(server: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    server.pages["/swin-01234567.pth"] = Served(checkpoint)
    with fails(r"does not have the expected SHA-256 01234567 and was removed: download it again"):
        fetch(f"{server.address}/swin-01234567.pth")
    assert not left_in(url_cache(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_full_disk(server: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    name = hashed_name(checkpoint)
    server.pages[f"/{name}"] = Served(checkpoint)
    url_cache(tmp_path).mkdir(parents=True)
    (url_cache(tmp_path) / f"{name}.partial").symlink_to("/dev/full")
    with fails(rf"the disk of .*checkpoints is full .*\(No space left on device\): free {len(checkpoint)} bytes there"):
        fetch(f"{server.address}/{name}")
    assert not left_in(url_cache(tmp_path))


def test_a_quota_reached_midway(server: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    server.pages["/swin.pth"] = Served(checkpoint)
    with file_size_limit(60_000), fails(rf"full or a quota reached \(File too large\): free {len(checkpoint)} bytes"):
        fetch(f"{server.address}/swin.pth")
    assert not left_in(url_cache(tmp_path))


def test_too_little_room_is_seen_before_the_transfer(
    server: WeightServer, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/swin.pth"] = Served(checkpoint)
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with fails(rf"disk of .* is full .*free {len(checkpoint)} bytes there, or set TORCH_HOME"):
        fetch(f"{server.address}/swin.pth")


def test_no_network(closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fails(r"no connection to the server of .* \(.*Connection refused\): check the network.*put it at .*swin\."):
        fetch(f"http://127.0.0.1:{closed_port}/swin.pth")

    def unresolved(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with fails(r"no connection to the server of http://weights\.invalid/.*Name or service not known"):
        fetch("http://weights.invalid/swin.pth")
    assert not left_in(url_cache(tmp_path))


def test_offline(server: WeightServer, tmp_path: Path, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    name = hashed_name(checkpoint)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with fails(rf"is not in the cache and HF_HUB_OFFLINE forbids the network: .* put it at .*checkpoints/{name}"):
        fetch(f"{server.address}/{name}")
    url_cache(tmp_path).mkdir(parents=True)
    (url_cache(tmp_path) / name).write_bytes(checkpoint)
    assert fetch(f"{server.address}/{name}").read_bytes() == checkpoint
    assert not server.requests


FOREIGN = {
    "web_page": (b"<!doctype html><title>Sign in</title>", r"is a web page, not weights.*the file itself"),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", r"is a git-lfs pointer"),
    "json": (b'{"error": "rate limit"}', r"is text, not weights \(it starts with '\{\"error"),
    "nothing": (b"", r"is empty \(zero bytes\)"),
}


@pytest.mark.parametrize(("body", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_other_content_than_weights(server: WeightServer, tmp_path: Path, body: bytes, message: str) -> None:
    server.pages["/swin.pth"] = Served(body)
    with fails(message):
        fetch(f"{server.address}/swin.pth")
    assert not left_in(url_cache(tmp_path))


def test_a_cache_that_cannot_be_written(server: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    server.pages["/swin.pth"] = Served(checkpoint)
    (tmp_path / "torch").touch()
    with fails(r"cannot write to the cache .* \(Not a directory\): make the folder writable, or set TORCH_HOME"):
        fetch(f"{server.address}/swin.pth")


def test_addresses_that_are_none() -> None:
    with fails(r"names no file: pass the address of the weights file itself"):
        fetch("https://example.org/")
    with fails(r"is not a valid address .*: correct it"):
        fetch("http://127.0.0.1:port/swin.pth")


# ---- the Hugging Face Hub


def test_hub_prefers_safetensors_and_then_its_cache(hub: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "pytorch_model.bin", b"other")
    hub.add_hub_file(REPOSITORY, "model.safetensors", checkpoint)
    path = fetch(f"hf-hub:{REPOSITORY}")
    assert path.name == "model.safetensors"
    assert path.is_relative_to(tmp_path / "hub")
    assert list(read_weights(path).tensors) == ["weight"]
    hub.requests.clear()
    assert fetch(f"hf-hub:{REPOSITORY}@{COMMIT}") == fetch(f"hf-hub:{REPOSITORY}@main") == path
    assert not hub.requests


def test_hub_falls_back_to_the_older_name(hub: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "pytorch_model.bin", checkpoint)
    hub.add_hub_file(REPOSITORY, "swin/large.bin", checkpoint + b"\0")
    assert fetch(f"hf-hub:{REPOSITORY}").is_relative_to(tmp_path / "hub")
    assert fetch(f"hf-hub:{REPOSITORY}", filename="swin/large.bin").read_bytes() == checkpoint + b"\0"


def test_hub_names_that_lead_nowhere(hub: WeightServer, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "README.md", b"about")
    with fails(r"someone/swin_small has no model\.safetensors or pytorch_model\.bin: pass filename="):
        fetch(f"hf-hub:{REPOSITORY}")
    with fails(r"someone/unknown is not on http://127\S+, or is private: check the name"):
        fetch("hf-hub:someone/unknown")
    with fails(r"someone/swin_small@v9 has no such revision: check what follows the @"):
        fetch(f"hf-hub:{REPOSITORY}@v9")
    with fails(r"'a/b/c' is not the name of a repository .*: write hf-hub:org/name"):
        fetch("hf-hub:a/b/c")


HUB_REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, r"is gated: accept its terms on its page at http\S+, then run"),
    "forbidden": (403, {}, r"refuses someone/swin_small \(HTTP 403\)"),
    "broken": (503, {}, r"refuses someone/swin_small \(HTTP 503\): try later"),
    "not_a_hub": (200, {}, r"does not answer as a Hugging Face Hub: check HF_ENDPOINT, the proxy"),
}


@pytest.mark.parametrize(("status", "headers", "message"), HUB_REFUSALS.values(), ids=HUB_REFUSALS.keys())
def test_hub_refusals(hub: WeightServer, status: int, headers: dict[str, str], message: str) -> None:
    hub.pages[f"/{REPOSITORY}/resolve/main/model.safetensors"] = Served(b"", status=status, headers=headers)
    with fails(message):
        fetch(f"hf-hub:{REPOSITORY}")


def test_hub_resumes_a_cut_connection(hub: WeightServer, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # it goes on after the last whole chunk
    hub.add_hub_file(REPOSITORY, "model.safetensors", checkpoint).cuts = [70_000]
    assert fetch(f"hf-hub:{REPOSITORY}").read_bytes() == checkpoint
    first, second = hub.gets(f"/{REPOSITORY}/resolve/main/model.safetensors")
    assert (first.range, first.sent) == (None, 70_000)
    assert (second.range, second.sent) == ("bytes=70000-", len(checkpoint) - 70_000)


def test_hub_connection_cut_for_good(hub: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "model.safetensors", checkpoint).cuts = [70_000] + [0] * 20
    with fails(r"the download of someone/swin_small was cut \(.*\): repeat the command"):
        fetch(f"hf-hub:{REPOSITORY}")
    assert "model.safetensors" not in left_in(tmp_path / "hub")


def test_hub_file_with_another_hash_than_on_record(hub: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "model.safetensors", checkpoint, sha256="0" * 64)
    with fails(r"model\.safetensors of someone/swin_small does not have the SHA-256 that the Hub has on record"):
        fetch(f"hf-hub:{REPOSITORY}")
    assert not left_in(tmp_path / "hub") & {"model.safetensors", "0" * 64}


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_hub_disk_full(hub: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "model.safetensors", checkpoint)
    with (
        file_size_limit(60_000),
        fails(r"the disk of .*hub is full or a quota reached: free room there, or set HF_HOME"),
    ):
        fetch(f"hf-hub:{REPOSITORY}")
    assert "model.safetensors" not in left_in(tmp_path / "hub")


def test_hub_disk_full_without_a_word_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `hf_xet` has it: an error of no type of its own."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("data processing error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    (tmp_path / "hub").mkdir()
    with fails(r"the download of someone/swin_small was cut \(data processing error\): repeat the command"):
        fetch(f"hf-hub:{REPOSITORY}")
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with fails(r"the disk of .*hub is full or a quota reached: free room there, or set HF_HOME"):
        fetch(f"hf-hub:{REPOSITORY}")


def test_hub_without_network(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    point_hub_at(f"http://127.0.0.1:{closed_port}", monkeypatch)
    with fails(r"no connection to http://127\S+ \(.*refused.*\) and \S+ is not in the cache .*hub: check"):
        fetch(f"hf-hub:{REPOSITORY}")


def test_hub_offline(hub: WeightServer, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_hub_file(REPOSITORY, "pytorch_model.bin", checkpoint)
    path = fetch(f"hf-hub:{REPOSITORY}")
    hub.requests.clear()
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert fetch(f"hf-hub:{REPOSITORY}") == path
    with fails(
        r"are not in the cache .*hub and HF_HUB_OFFLINE forbids.*`hf download someone/other model\.safetensors`"
    ):
        fetch("hf-hub:someone/other")
    assert not hub.requests


def test_hub_cache_that_cannot_be_written(hub: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    hub.add_hub_file(REPOSITORY, "model.safetensors", checkpoint)
    (tmp_path / "hub").touch()
    with fails(
        r"cannot store someone/swin_small in .*hub \((Not a directory|File exists)\): make the folder writable, or set"
    ):
        fetch(f"hf-hub:{REPOSITORY}")


# ---- several processes, and the settings of the environment

FETCH_BOTH = """
import sys
from hvt_backbones.weights.sources import fetch
import huggingface_hub.file_download, torch
print("ready", flush=True)
sys.stdin.readline()
for source in sys.argv[1:]:
    print(fetch(source), flush=True)
"""


def test_two_processes_at_once_download_once(server: WeightServer, tmp_path: Path, checkpoint: bytes) -> None:
    server.pages["/swin.pth"] = Served(checkpoint, delay=0.5)
    server.add_hub_file(REPOSITORY, "model.safetensors", checkpoint).delay = 0.5
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_HUB_CACHE", None)
    root = Path(sys.modules["hvt_backbones"].__file__).parents[1]
    command = [sys.executable, "-c", FETCH_BOTH, f"{server.address}/swin.pth", f"hf-hub:{REPOSITORY}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root, "env": environment}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(2)]
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        outputs = [worker.communicate(timeout=300)[0].split("\n") for worker in workers]
    assert outputs[0] == outputs[1]
    from_url, from_hub, _ = outputs[0]
    assert Path(from_url).read_bytes() == Path(from_hub).read_bytes() == checkpoint
    assert Path(from_hub).is_relative_to(tmp_path / "home" / "hub")
    assert [request.sent for request in server.gets("/swin.pth")] == [len(checkpoint)]
    assert len(server.gets(f"/{REPOSITORY}/resolve/main/model.safetensors")) == 1
