"""Models by their id on the hub; a server on this machine stands in for the hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ml_dtypes
import pytest

import convert
from s3d_jax.drafters.portable import export_draft
from s3d_jax.drafters.stored import read_draft, save_draft
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.tokenizer import tokenizer_files
from tests.conftest import need
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

ROOT = Path(__file__).resolve().parent.parent.parent
Files = dict[str, bytes]


class Hub:
    """Repositories, each with the files of its revisions; and the requests so far.

    Attributes:
        gated: repositories whose files nobody may read.
        failure: if set, called with the handler and the file's bytes instead of sending a file.
        downloaded: the files that were read.
        num_requests: requests of all kinds.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.gated: set[str] = set()
        self.failure: Callable[[BaseHTTPRequestHandler, bytes], None] | None = None
        self.downloaded: list[str] = []
        self.num_requests = 0

    def add(self, name: str, revision: str, folder: Path, **extra: bytes) -> None:
        files = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.repos.setdefault(name, {})[revision] = files | extra


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that downloads need."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.num_requests += 1
        path = urllib.parse.urlsplit(self.path).path.removeprefix("/api/models").split("/")
        _, owner, name, kind, revision, *rest = [*path, *[""] * 5]
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None:  # the hub does not tell strangers which private models there are
            return self.refuse(401, "RepoNotFound")
        commits = {commit_of(r): files for r, files in repo.items()}
        files = repo.get(revision) or commits.get(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if kind == "revision":
            return self.send(json.dumps({"id": name, "sha": commit_of(revision)}).encode())
        if kind == "tree":
            entries = [
                {
                    "type": "file",
                    "path": p,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for p, data in files.items()
            ]
            return self.send(json.dumps(entries).encode())
        if f"{owner}/{name}" in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        file = "/".join(rest).rstrip("/")
        data = files[file]
        facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": revision}
        if kind == "resolve" and file.endswith((".safetensors", ".bin")):
            # Large files lie elsewhere; the first answer has all facts on them.
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": facts["ETag"]}
            place = {
                "Location": f"{os.environ['HF_ENDPOINT']}/{owner}/{name}/cdn/{revision}/{file}"
            }
            return self.send(b"", 302, facts | linked | place)
        if self.command == "GET":
            self.hub.downloaded.append(file)
            if self.hub.failure is not None:
                return self.hub.failure(self, data)
        self.send(data, 200, facts)

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", status, {"X-Error-Code": code, "X-Error-Message": "no"})

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    """The command, in a process of its own: huggingface_hub reads the environment once."""
    return subprocess.run(
        [sys.executable, "-m", "convert", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=100,
    )  # fmt: skip


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return command(*arguments, "--no-parity")


def converted(*arguments: str | Path) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr


def refused(tmp_path: Path, *arguments: str) -> str:
    """The one line that says why nothing was written."""
    done = run(*arguments, tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    # Progress bars of the download come first, and end in \r.
    message = done.stderr.rpartition("error: ")[2]
    assert "Traceback" not in done.stderr and "error: " in done.stderr
    assert not list(tmp_path.glob("out*"))
    return message


def assert_same_model(a: Path, b: Path) -> None:
    first, second = checkpoint.read_header(a), checkpoint.read_header(b)
    assert first.arrays == second.arrays and first.config == second.config
    assert first.source["config"] == second.source["config"]


def test_an_id_gives_what_the_folder_gives_and_only_what_is_needed(hub, data_dir, tmp_path):
    source = data_dir / "checkpoints" / "babyllama-1m"
    unneeded = (
        "README.md",
        "consolidated.00.pth",
        "pytorch_model.bin",
        "baby.gguf",
        ".gitattributes",
    )
    nested = ("original/config.json", "onnx/model.safetensors")
    template = "additional_chat_templates/rag.jinja"
    extra = dict.fromkeys((*unneeded, *nested, template), b"x")
    hub.add("owner/baby", "main", source, **extra)
    converted("owner/baby", tmp_path / "online")
    assert sorted(hub.downloaded) == sorted([template, *(p.name for p in source.iterdir())])
    assert (tmp_path / "online" / template).read_bytes() == b"x"
    convert.convert(source, tmp_path / "local", parity=False, progress=False)
    assert_same_model(tmp_path / "online", tmp_path / "local")
    header = checkpoint.read_header(tmp_path / "online")
    assert header.has_tokenizer and header.source["name"] == "owner/baby"
    assert "tokenizer.json" in {p.name for p in tokenizer_files(tmp_path / "online")}


def test_an_adapter_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    folder = write_folder(tmp_path / "hf")
    hub.add("owner/both", "main", folder, **{"adapter_config.json": b"{}"})
    assert refused(tmp_path, "owner/both").startswith("owner/both holds an adapter (LORA")
    assert sorted(hub.downloaded) == ["adapter_config.json", "config.json"]
    (folder / "config.json").unlink()
    hub.add("owner/lora", "main", folder, **{"adapter_config.json": b"{}"})
    assert "and no model. Merge" in refused(tmp_path, "--dry-run", "owner/lora")


def test_a_second_conversion_needs_no_hub(hub, tmp_path, monkeypatch):
    hub.add("owner/tiny", "main", write_folder(tmp_path / "hf", shards=3))
    converted("owner/tiny", tmp_path / "first")
    before = hub.num_requests
    assert len(hub.downloaded) == 5  # config.json, the index, three shards
    converted("owner/tiny", tmp_path / "again")
    assert len(hub.downloaded) == 5
    before = hub.num_requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    converted("owner/tiny", tmp_path / "offline")
    done = command("--dry-run", "owner/tiny", tmp_path / "planned")
    assert done.returncode == 0 and "to be downloaded" not in done.stdout, done.stderr
    assert hub.num_requests == before
    for name in ("again", "offline"):
        assert_same_model(tmp_path / "first", tmp_path / name)


def test_a_revision(hub, tmp_path):
    tensors = random_tensors(dtype=ml_dtypes.bfloat16)
    folders = [write_folder(tmp_path / "new"), write_folder(tmp_path / "old", tensors)]
    for revision, folder in zip(("main", "v1"), folders, strict=True):
        hub.add("owner/tiny", revision, folder)
    converted("owner/tiny", tmp_path / "out", "--revision", "v1")
    assert checkpoint.read_header(tmp_path / "out").config.dtype == "bfloat16"
    assert "it has no revision 'v2'" in refused(tmp_path / "x", "owner/tiny", "--revision", "v2")


@pytest.mark.parametrize("kind", ["one file", "shards", "torch"])
def test_outlines_download_no_weights(hub, tmp_path, kind):
    folder = write_folder(tmp_path / "hf", shards=1 if kind == "one file" else 2)
    if kind == "torch":
        for file in folder.glob("*.safetensors"):
            file.rename(folder / f"pytorch_{file.stem}.bin")
        index = folder / "model.safetensors.index.json"
        text = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
        index.unlink()
        (folder / "pytorch_model.bin.index.json").write_text(text)
    hub.add("owner/tiny", "main", folder)
    done = command("--dry-run", "owner/tiny", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    weights = [f for f in folder.iterdir() if f.suffix in (".bin", ".safetensors")]
    assert done.stdout.count("to be downloaded") == len(weights) == (1 if kind == "one file" else 2)
    for file in weights:
        assert f"{file.name}: {file.stat().st_size / 1e6:.2f} MB" in done.stdout
    assert all(name.endswith(".json") for name in hub.downloaded)
    if kind == "shards":
        done = command("inspect", "owner/tiny", "--json")
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["tensors"]) == len(random_tensors())
        assert all(name.endswith(".json") for name in hub.downloaded)
        converted("owner/tiny", tmp_path / "native")  # files in the cache are no obstacle
    assert not (tmp_path / "out").exists()


def test_torch_files_where_there_is_nothing_else(hub, tmp_path):
    torch = need("torch")
    tensors = random_tensors()
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin")
    hub.add("owner/old", "main", folder, **{"training_args.bin": b"x", "optimizer.pt": b"x"})
    converted("owner/old", tmp_path / "torch")
    assert sorted(hub.downloaded) == ["config.json", "pytorch_model.bin"]
    converted(write_folder(tmp_path / "safe", tensors), tmp_path / "safetensors")
    assert_same_model(tmp_path / "torch", tmp_path / "safetensors")


def test_models_that_cannot_be_had(hub, tmp_path, monkeypatch):
    hub.add("owner/gated", "main", write_folder(tmp_path / "hf"))
    hub.gated.add("owner/gated")
    message = refused(tmp_path, "owner/gated")
    assert "owner/gated: its owner wants to be asked" in message and "HF_TOKEN" in message
    message = refused(tmp_path, "owner/unknown")
    assert "owner/unknown: no such folder here, nor such a model on the hub" in message
    for name in ("owner/double--dash", "../tiny"):
        assert "nor a valid id of the hub" in refused(tmp_path, name)
    # The hub is not asked for what looks like a path.
    before = hub.num_requests
    for name in ("./owner/tiny", "owner/tiny/", "a/b/c", "a b"):
        assert f"{name}: there is no such folder" in refused(tmp_path, name)
    assert hub.num_requests == before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "the hub cannot be reached" in refused(tmp_path, "owner/gated")


def test_no_hub_there(hub, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port  # free again: nobody listens there
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert "the hub cannot be reached" in refused(tmp_path, "owner/tiny")


@pytest.mark.parametrize("how", ["cut", "500", "hangs up", "no hub"])
def test_downloads_that_fail(hub, tmp_path, monkeypatch, how):
    hub.add("owner/tiny", "main", write_folder(tmp_path / "hf"))
    if how == "cut":
        hub.failure = lambda handler, data: handler.send(data[:-7])
    elif how == "500":
        hub.failure = lambda handler, data: handler.send(b"", 500)
    elif how == "hangs up":  # the HTTP library's own kind of error
        monkeypatch.setattr(Handler, "do_GET", lambda self: setattr(self, "close_connection", True))
    else:
        monkeypatch.setattr(Handler, "do_GET", lambda self: self.send(b"<html>Log in</html>"))
    message = refused(tmp_path, "owner/tiny")
    assert message.startswith("owner/tiny: the download failed (")
    assert message.count("\n") == 1


def test_a_draft_comes_from_the_hub(hub, tmp_path):
    config = tiny_config()
    params = tiny_params(config)
    draft = DraftConfig((False, True, True, False), 3)
    for name in ("trained", "fresh"):
        checkpoint.save(tmp_path / name, config, params)
    save_draft(tmp_path / "trained", "default", draft, noisy_draft(config, params, draft), {})
    export_draft(tmp_path / "trained", "default", tmp_path / "alone")
    hub.add("owner/draft", "main", tmp_path / "alone", **{"README.md": b"x"})

    def add(source: str) -> subprocess.CompletedProcess:
        arguments = ["draft", "add", source, "--model", str(tmp_path / "fresh")]
        return subprocess.run(
            [sys.executable, "-m", "s3d_jax", *arguments],
            capture_output=True, text=True, cwd=ROOT, timeout=100,
        )  # fmt: skip

    done = add("owner/draft")
    assert done.returncode == 0 and "draft 'default' is in" in done.stdout, done.stderr
    assert sorted(hub.downloaded) == ["config.json", "draft.safetensors"]
    given, added = (read_draft(tmp_path / n, "default", config) for n in ("trained", "fresh"))
    assert given.config == added.config and given.num_params == added.num_params
    done = add("owner/nothing")
    assert done.returncode == 2 and "no such folder here, nor such a model" in done.stderr
