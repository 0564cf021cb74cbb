"""Published weights are fetched by name: from a stand-in for the Hugging Face Hub on this machine."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tiny import tiny

import minisd
from minisd import __main__ as command_line
from minisd.weights import CheckpointError
from minisd.weights import download as downloads
from minisd.weights.download import MODELS, Published, download

COMMIT = "0123456789abcdef" * 2 + "01234567"
PUBLISHER, MIRROR, FILE = "publisher/model", "mirror/model", "tiny.safetensors"
HUB_ERRORS = {404: "RepoNotFound", 410: "EntryNotFound", 403: "GatedRepo"}


class Hub(ThreadingHTTPServer):
    """The hub's file API: `contents` of (repository, file), or a status to refuse with. Notes what it is asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.contents: dict[tuple[str, str], bytes | int] = {}
        self.asked: list[str] = []
        self.sent = 0  # bytes of files
        self.cut: int | None = None  # the byte before which the connection breaks, where it shall
        self.url = f"http://127.0.0.1:{self.server_port}"

    def gets(self):
        return [request for request in self.asked if request.startswith("GET")]


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        repository, file = re.fullmatch("/(.+?/.+?)/resolve/main/(.+)", self.path).groups()
        self.server.asked.append(f"{self.command} {repository}")
        content = self.server.contents.get((repository, file), 404)
        if isinstance(content, int):
            self.send_response(content)
            self.send_header("X-Error-Code", HUB_ERRORS[content])
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            piece = content[start : self.server.cut]
            self.wfile.write(piece)
            self.server.sent += len(piece)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A small model in a single file."""
    path = tmp_path_factory.mktemp("published") / FILE
    tiny().save(path, torch.float32)
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without a file, and an empty cache."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


@pytest.fixture
def model(content, monkeypatch):
    """The table of models: one small model, which its publisher has withdrawn."""
    digest = hashlib.sha256(content).hexdigest()
    model = Published(
        "tiny", "Tiny", "a licence", PUBLISHER, FILE, len(content), digest, (MIRROR,), "by its publisher in 2020"
    )
    monkeypatch.setattr(downloads, "MODELS", (model,))
    return model


def named(folder):
    """The files anywhere in a folder that are as large as weights, or have the name of them."""
    return [p for p in folder.rglob("*") if p.is_file() and (p.name == FILE or p.stat().st_size > 10_000)]


def refused(*arguments):
    with pytest.raises(CheckpointError) as error:
        download(*arguments)
    return str(error.value)


def test_every_model_of_the_table_says_all_there_is_to_know():
    assert len({model.key for model in MODELS}) == len({model.digest for model in MODELS}) == len(MODELS)
    for model in MODELS:
        assert re.fullmatch("[0-9a-f]{64}", model.digest) and model.size > 3e8
        assert all(re.fullmatch(r"[\w-]+/[\w.-]+", repository) for repository in model.repositories)
        assert model.mirrors or not model.withdrawn
        assert ("OpenRAIL-M" in model.licence) == (model.key.startswith("sd1"))
        assert ("RAIL++-M" in model.licence) == (model.key.startswith("sd2"))
        path = Path("models") / model.file
        told = model.by_hand(path)
        assert f"put it at {path}, " in told and all(mirror in told for mirror in model.mirrors)
        assert model.reader in told and ("was withdrawn by" in told) == bool(model.withdrawn)
        module, function = model.reader.rsplit(".", 1)
        assert callable(getattr(sys.modules[module], function))
        commands = list(command_line.app.commands)
        assert model.command is None or model.command.split()[1] in [*commands, '"a']


@pytest.mark.parametrize("folder", [None, "models"])
def test_a_model_is_fetched_from_the_mirror_and_loads(folder, hub, model, content, tmp_path):
    hub.contents[MIRROR, FILE] = content
    path = download("tiny", folder and tmp_path / folder)
    assert path.read_bytes() == content
    assert path.is_relative_to(tmp_path / (folder or "cache"))
    assert folder is None or path == tmp_path / folder / FILE
    assert hub.asked == [f"HEAD {PUBLISHER}", f"HEAD {MIRROR}", f"GET {MIRROR}"]
    loaded = minisd.load(path, dtype="float32")
    assert all(torch.equal(p, q) for p, q in zip(loaded.unet.parameters(), tiny().unet.parameters(), strict=True))


@pytest.mark.parametrize("folder", [None, "models"])
def test_what_is_there_is_not_asked_for_again(folder, hub, model, content, tmp_path):
    hub.contents[MIRROR, FILE] = content
    folder = folder and tmp_path / folder
    path = download("tiny", folder)
    hub.asked.clear()
    assert download("tiny", folder) == path
    assert hub.asked == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub, model, content, monkeypatch):
    hub.contents[PUBLISHER, FILE] = content
    hub.cut = len(content) // 2
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: setattr(hub, "cut", None))
    assert download("tiny").read_bytes() == content
    assert len(hub.gets()) == 2 and hub.sent == len(content)


def test_a_connection_that_stays_broken_leaves_nothing(hub, model, content, monkeypatch, tmp_path):
    hub.contents[PUBLISHER, FILE] = content
    hub.cut = len(content) // 2
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    for folder in (None, tmp_path / "models"):
        assert re.search(f"{PUBLISHER} failed with RemoteProtocolError.*{MIRROR} is not there", refused("tiny", folder))
    assert named(tmp_path) == []


@pytest.mark.parametrize("folder", [None, "models"])
def test_another_file_is_refused_and_not_kept(folder, hub, model, content, tmp_path):
    folder = folder and tmp_path / folder
    hub.contents[PUBLISHER, FILE] = content[:-1]
    hub.contents[MIRROR, FILE] = content[:-1] + bytes([content[-1] ^ 1])
    told = refused("tiny", folder)
    assert f"{PUBLISHER} has another file: it has {len(content) - 1:,} bytes instead of {len(content):,}" in told
    assert re.search(f"{MIRROR} has another file: its SHA-256 is [0-9a-f]{{64}} instead of {model.digest}", told)
    assert named(tmp_path) == []
    hub.contents[MIRROR, FILE] = content
    assert download("tiny", folder).read_bytes() == content


def test_a_file_damaged_in_the_cache_is_fetched_again(hub, model, content):
    hub.contents[PUBLISHER, FILE] = content
    path = download("tiny")
    path.resolve().write_bytes(content[:1000])
    assert download("tiny") == path and path.read_bytes() == content
    assert len(hub.gets()) == 2


@pytest.mark.parametrize("then", [404, "the same"])
def test_another_file_that_other_programs_have_put_into_the_cache_stays_there(then, hub, model, content):
    hub.contents[PUBLISHER, FILE] = other = content[:-1] + bytes([content[-1] ^ 1])
    theirs = Path(huggingface_hub.hf_hub_download(PUBLISHER, FILE))
    if then == 404:
        hub.contents[PUBLISHER, FILE] = 404
    assert f"{PUBLISHER} {'is not there' if then == 404 else 'has another file'}" in refused("tiny")
    assert theirs.read_bytes() == other
    hub.contents[MIRROR, FILE] = content
    assert download("tiny").read_bytes() == content and theirs.read_bytes() == other


def test_a_file_that_is_not_ours_is_left_alone(hub, model, content, tmp_path):
    hub.contents[PUBLISHER, FILE] = content
    (tmp_path / FILE).write_text("a diary")
    assert re.search(rf"{FILE} is not Tiny: it has 7 bytes .*move it away", refused("tiny", tmp_path))
    assert (tmp_path / FILE).read_text() == "a diary" and hub.asked == []


def assert_tells_by_hand(told, model, path):
    steps = (
        f"get {FILE} ({model.size / 1e9:.2f} GB) from {MIRROR} on the Hugging Face Hub "
        f"({PUBLISHER} was withdrawn by its publisher in 2020), put it at {path}, "
        f'then minisd.load({str(path)!r}), or minisd "a prompt" --model "{path}"'
    )
    assert told.endswith(steps) and "\n" not in told


def test_repositories_that_give_nothing_are_named_with_the_reason(hub, model, tmp_path):
    hub.contents[PUBLISHER, FILE], hub.contents[MIRROR, FILE] = 410, 403
    told = refused("tiny", tmp_path)
    assert f"{PUBLISHER} does not have the file; {MIRROR} wants its terms accepted" in told
    assert_tells_by_hand(told, model, tmp_path / FILE)
    del hub.contents[PUBLISHER, FILE]
    assert f"{PUBLISHER} is not there; " in refused("tiny", tmp_path)


def test_without_a_network_the_way_by_hand_is_told(hub, model, content, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    told = refused("tiny")
    assert f"{PUBLISHER} can't be reached (" in told and f"{MIRROR} is not in the cache" in told
    assert_tells_by_hand(told, model, tmp_path / FILE)
    (tmp_path / FILE).write_bytes(content)
    assert download("tiny", ".") == tmp_path / FILE  # put there by hand, it is checked


def test_without_huggingface_hub_both_ways_are_told(hub, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = refused("tiny", tmp_path)
    assert "pip install 'minisd[download]'" in told
    assert_tells_by_hand(told, model, tmp_path / FILE)


@pytest.mark.parametrize("key", ["sd99", "", None, ["sd15"], 15])
def test_an_unknown_model_is_refused(key):
    keys = "sd14, sd15, sd15-inpaint, sd21, sd21-base, sd2-depth, sd2-x4, vae-ft-mse"
    with pytest.raises(ValueError, match=rf"^model {re.escape(repr(key))} is unknown; choose one of: {keys}$"):
        download(key)


def test_the_command_names_the_licence_first_and_the_next_command_last(hub, model, content, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["minisd", "download", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        return (stopped.value.code, *capsys.readouterr())

    code, out, err = run("tiny")
    assert code == 2 and out == "" and err.startswith("Tiny, 0.00 GB, licence: a licence\nminisd: Tiny can't be")
    hub.contents[PUBLISHER, FILE] = content
    code, out, err = run("tiny")
    path = download("tiny")
    assert code == 0 and out == f"{path}\n"
    assert err.startswith("Tiny, 0.00 GB, licence: a licence\n")
    assert err.endswith(f'next: minisd.load({str(path)!r}), or minisd "a prompt" --model "{path}"\n')


def test_the_environment_names_server_and_cache(hub, tmp_path):
    """In a process of its own, as huggingface_hub reads its environment once; with the true table of models."""
    (sd15,) = (model for model in MODELS if model.key == "sd15")
    hub.contents |= {(repository, sd15.file): b"not the weights" for repository in sd15.repositories}
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "minisd", "download", "sd15"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | settings, cwd=Path(__file__).parents[1]
    )
    assert ran.returncode == 2 and ran.stdout == "" and "CreativeML OpenRAIL-M" in ran.stderr
    for repository in sd15.repositories:
        assert f"{repository} has another file: it has 15 bytes instead of 4,265,146,304" in ran.stderr
    assert len(hub.gets()) == 3
    assert not any("not the weights" in p.read_text() for p in (tmp_path / "cache").rglob("*") if p.is_file())
