"""References are resolved to folders: local ones as they are, hub ones through a local server in place of the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from deus_merge.checkpoint import resolve
from deus_merge.core.errors import CheckpointError

OLD, NEW = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"revision": "old"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00001.safetensors": b"weights of old",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"gguf",
    "consolidated.safetensors": b"a second copy",
    "1_Pooling/config.json": b"{}",
    "2_Dense/model.safetensors": b"weights of a module",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "modules.json": b"[]",
    "LICENSE": b"free",
    "adapters/adapter_model.safetensors": b"an adapter",
    "2025/model.safetensors": b"an older model",
    "onnx/model.onnx": b"onnx",
    "onnx/model.safetensors": b"another model",
    "README.md": b"# readme",
    "modeling.py": b"print()",
}
WANTED = [
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "modeling.py",
    "modules.json",
    "tokenizer.json",
]
REVISIONS = {
    OLD: FILES,
    NEW: FILES | {"config.json": b'{"revision": "new"}', "model-00001-of-00001.safetensors": b"weights of new"},
}
REFS = {"main": NEW, "v1": OLD, "refs/pr/1": OLD}


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of the hub that a snapshot download makes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {'/'.join(path)}")
        api = path[:2] == ["api", "models"]
        org, name, *rest = path[2:] if api else path
        if org == "broken":
            return self.answer(503, b"")
        if name == "missing":
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = REFS.get(revision, revision)
        if commit not in REVISIONS:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = REVISIONS[commit]
        if api and (not rest or rest[0] == "revision"):
            info = {"_id": "0", "id": f"{org}/{name}", "modelId": f"{org}/{name}", "sha": commit, "private": False}
            info |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, json.dumps(info).encode())
        if api:
            tree = [
                {"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for f, data in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if name == "gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        data = files["/".join(rest[2:])]
        return self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def answer(self, status, data, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CHILD = """
import json, sys
from deus_merge.checkpoint import resolve
from deus_merge.core.errors import CheckpointError
answers = []
for ref, options in json.loads(sys.argv[1]):
    try:
        answers.append({"folder": str(resolve(ref, **options))})
    except CheckpointError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


def resolve_in_child(home: Path, port: int, *refs, **environment) -> list[dict]:
    """What `resolve` says in a fresh process: huggingface_hub reads its environment once, when imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    inherited |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    home.mkdir(exist_ok=True)
    refs = [ref if isinstance(ref, tuple) else (ref, {}) for ref in refs]
    command = [sys.executable, "-c", CHILD, json.dumps(refs)]
    root = Path(__file__).parents[2]
    inherited["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [inherited.get("PYTHONPATH")])])
    done = subprocess.run(command, env=inherited | environment, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def content(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_downloads_what_is_needed_of_each_revision_then_works_offline(hub, tmp_path):
    home, port = tmp_path / "home", hub.server_address[1]
    refs = ["org/model", "org/model@v1", "org/model@refs/pr/1", f"org/model@{OLD}"]
    online = resolve_in_child(home, port, *refs)
    new, *old = [content(answer["folder"]) for answer in online]
    assert sorted(new) == sorted(WANTED)
    assert new["config.json"] == b'{"revision": "new"}'
    assert new["model-00001-of-00001.safetensors"] == b"weights of new"
    assert old[0] == {name: FILES[name] for name in WANTED} == old[1] == old[2]
    assert not [r for r in hub.requests if ".bin" in r or "onnx" in r or "consolidated" in r]

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        closed = unused.getsockname()[1]
        assert resolve_in_child(home, closed, *refs) == online  # no connection: the cache serves
    before = len(hub.requests)
    assert resolve_in_child(home, port, *refs, HF_HUB_OFFLINE="1") == online
    forced = resolve_in_child(home, port, *[(ref, {"offline": True}) for ref in refs], ("org/other", {"offline": True}))
    assert forced[:-1] == online
    assert "not in the hub's cache" in forced[-1]["error"]
    assert len(hub.requests) == before


def test_another_cache(hub, tmp_path):
    (answer,) = resolve_in_child(
        tmp_path / "home", hub.server_address[1], ("org/model", {"cache_dir": str(tmp_path / "cache")})
    )
    assert Path(answer["folder"]).is_relative_to(tmp_path / "cache")


def test_refusals_of_the_hub(hub, tmp_path):
    port = hub.server_address[1]
    cases = {
        "org/missing": ["no such folder, and no such repository", "hf auth login"],
        "org/model@v9": ["no such revision", "got:      v9"],
        "org/gated": ["gated", f"http://127.0.0.1:{port}/org/gated"],
        "broken/model": ["cannot be reached", "503"],
    }
    for (ref, expected), answer in zip(cases.items(), resolve_in_child(tmp_path / "h", port, *cases), strict=True):
        assert answer["error"].startswith(f"{ref}: ")
        assert all(text in answer["error"] for text in expected), answer["error"]


def test_no_connection(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (answer,) = resolve_in_child(tmp_path / "home", unused.getsockname()[1], "org/model")
    assert "cannot be reached" in answer["error"] and "ConnectError" in answer["error"]


def test_a_local_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ["org/model", "org/model@v1", "plain"]:
        Path(name).mkdir(parents=True)
        for ref in [name, f"./{name}", str(tmp_path / name), f"~/{name}"]:
            assert resolve(ref).samefile(name)
            assert resolve(ref).is_absolute()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("./models/llama", "no such folder"),
        ("../llama", "no such folder"),
        ("/models/llama", "no such folder"),
        ("~/llama", "no such folder"),
        ("~nobody-of-this-name/llama", "no such folder"),
        ("llama", "no such folder"),
        ("", "no such folder"),
        ("a/b/c", "no such folder"),
        ("org/", "no such folder"),
        ("org/..", "no such folder"),
        ("org/na me", "no such folder"),
        ("org/na\0me", "no such folder"),
        ("org/" + "x" * 5000, "no such folder"),
        ("https://example.org/org/name", "no such folder"),
        ("org/name@", "not a revision"),
        ("org/name@../../x", "not a revision"),
        ("org/name@a b", "not a revision"),
        ("here@v1", "no revisions"),
        ("here/file", "not a folder"),
    ],
)
def test_bad_references_never_reach_the_hub(ref, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here/file").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(ref)
    assert caught.value.where == ref


def test_importing_needs_no_torch():
    code = (
        "import sys, deus_merge.checkpoint as c, deus_merge.checkpoint.hub\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_repository_in_the_cache(tmp_path):
    """The folder of a repository stands for its only snapshot; of several, one has to be named."""
    repository = tmp_path / "models--org--name"
    one, two = (repository / "snapshots" / commit for commit in (OLD, NEW))
    (repository / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError) as error:
        resolve(str(repository))
    assert "a repository without a snapshot" in str(error.value) and "org/name" in str(error.value)
    one.mkdir()
    assert resolve(str(repository)) == one and resolve(str(one)) == one
    two.mkdir()
    with pytest.raises(CheckpointError) as error:
        resolve(str(repository))
    assert "several snapshots" in str(error.value) and f"name one of them: {one}" in str(error.value)
    (tmp_path / "snapshots").mkdir()
    assert resolve(str(tmp_path)) == tmp_path
