"""An output folder appears when it is complete, or not at all; a kill loses only what was not yet on the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import interrupted_child
import pytest

from deus_merge.checkpoint import OutputFolder, TensorEntry, plan_shards, staging
from deus_merge.core.errors import DeusMergeError, MachineError, PlanError

LAYOUTS = plan_shards([[TensorEntry("a", "U8", (3,)), TensorEntry("b", "U8", (3,))]], 100)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(out: Path, data: bytes = b"abcdef", *, stop: BaseException | None = None, **options) -> OutputFolder:
    """A run of two blocks; ``stop`` is raised when the first is recorded."""
    with OutputFolder(out, **({"plan_hash": "p", "identity": {"device": "cpu"}} | options)) as folder:
        shards = folder.shards(LAYOUTS)
        for name, part in (("a", data[:3]), ("b", data[3:])):
            if name in folder.finished:
                continue
            shards.write(name, part)
            folder.record(name, {"cost": 1.5})
            if stop is not None:
                raise stop
        (folder.folder / "config.json").write_text("{}")
        folder.finish()
    return folder


def interrupted(out: Path, data: bytes = b"abcdef", **options) -> Path:
    with pytest.raises(KeyboardInterrupt):
        write(out, data, stop=KeyboardInterrupt(), **options)
    return out.parent / f".{out.name}.deus-tmp"


def test_finishes_into_place_and_leaves_nothing_else(tmp_path):
    folder = write(tmp_path / "deep" / "out")
    assert set(content(folder.out)) == {"model.safetensors", "config.json"}
    assert content(folder.out)["model.safetensors"].endswith(b"abcdef")
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert folder.notes == [] and not folder.resumable and folder.resume_hint == f"{folder.out} is complete"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")  # an empty folder may be there
    assert len(content(tmp_path / "empty")) == 2


@pytest.mark.parametrize("stop", [None, ValueError("bug"), KeyboardInterrupt()])
def test_nothing_is_final_without_finish(stop, tmp_path):
    out = tmp_path / "out"
    if stop is None:
        with OutputFolder(out, plan_hash="p") as folder:
            folder.shards(LAYOUTS).write("a", b"abc")
    else:
        with pytest.raises(type(stop)), OutputFolder(out, plan_hash="p") as folder:
            folder.shards(LAYOUTS).write("a", b"abc")
            raise stop
    assert os.listdir(tmp_path) == []  # no block was finished: there is nothing to resume


@pytest.mark.parametrize("stop", [ValueError("bug"), KeyboardInterrupt()])
def test_a_finished_block_is_saved_and_resumed(stop, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(type(stop)):
        write(out, stop=stop)
    temporary = tmp_path / ".out.deus-tmp"
    assert os.listdir(tmp_path) == [temporary.name]
    lines = [json.loads(line) for line in (temporary / "journal.jsonl").read_text().splitlines()]
    assert lines == [
        {"format": 3, "plan_hash": "p", "identity": {"device": "cpu"}},
        {"block": "a", "diagnostics": {"cost": 1.5}},
    ]
    with OutputFolder(out, plan_hash="p", identity={"device": "cpu"}, resume=True) as folder:
        assert folder.finished == {"a": {"cost": 1.5}}
        assert "1 finished block is saved" in folder.resume_hint and "--resume" in folder.resume_hint
    write(out, b"...def", resume=True)
    assert content(out)["model.safetensors"].endswith(b"abcdef")
    assert os.listdir(tmp_path) == ["out"]


def test_unfinished_work_is_thrown_away_only_when_asked(tmp_path):
    interrupted(tmp_path / "out", b"zzzzzz")
    with pytest.raises(PlanError, match="an earlier run to this output was interrupted") as caught:
        write(tmp_path / "out", plan_hash="another")
    assert "--resume" in caught.value.hint and "--overwrite" in caught.value.hint
    folder = write(tmp_path / "out", plan_hash="another", overwrite=True)
    assert content(folder.out)["model.safetensors"].endswith(b"abcdef")


def test_resume_without_an_interrupted_run_is_a_fresh_one(tmp_path):
    assert "nothing to resume" in write(tmp_path / "out", resume=True).notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan_hash": "q"}, "another plan"),
        ({"identity": {"device": "cuda"}}, "other values for: device$"),
        ({"identity": {"device": "cpu", "threads": 2, "seed": 3}}, "other values for: seed, threads$"),
        ({"identity": {}}, "other values for: device$"),
    ],
)
def test_resume_of_another_run_is_refused(options, message, tmp_path):
    temporary = interrupted(tmp_path / "out")
    before = content(temporary)
    with pytest.raises(PlanError) as caught:
        write(tmp_path / "out", resume=True, **options)
    assert re.search(f"cannot resume: the interrupted run had {message}", caught.value.message)
    assert content(temporary) == before
    assert len(content(write(tmp_path / "out", resume=True).out)) == 2  # the right one still can


def test_identity_is_compared_as_json(tmp_path):
    interrupted(tmp_path / "out", identity={"sources": ("x", "y"), 3: None})
    write(tmp_path / "out", identity={"sources": ["x", "y"], "3": None}, resume=True)


@pytest.mark.parametrize("tail", [b'{"block": "b", "diag', b'{"block": "b", "diagnostics": {}}', b"\0" * 50, b"[1]\n"])
def test_a_torn_line_is_ignored(tail, tmp_path):
    temporary = interrupted(tmp_path / "out")
    with open(temporary / "journal.jsonl", "ab") as journal:
        journal.write(tail)
    with OutputFolder(tmp_path / "out", plan_hash="p", identity={"device": "cpu"}, resume=True) as folder:
        assert list(folder.finished) == ["a"]
    assert (temporary / "journal.jsonl").read_bytes().count(b"\n") == 2
    write(tmp_path / "out", b"...def", resume=True)
    assert content(tmp_path / "out")["model.safetensors"].endswith(b"abcdef")


def test_another_versions_journal_is_refused(tmp_path):
    journal = interrupted(tmp_path / "out") / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(PlanError, match="the journal has another format"):
        write(tmp_path / "out", resume=True)


@pytest.mark.parametrize("damage", ["missing", "shorter", "header", "link"])
def test_resume_on_damaged_shards_is_refused(damage, tmp_path):
    shard = interrupted(tmp_path / "out") / "new/model.safetensors"
    if damage == "missing":
        shard.unlink()
    elif damage == "shorter":
        os.truncate(shard, 30)
    elif damage == "header":
        shard.write_bytes(shard.read_bytes().replace(b"U8", b"I8"))
    else:
        shard.rename(tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlanError, match="cannot resume") as caught:
        write(tmp_path / "out", resume=True)
    assert caught.value.where == shard


class DiskCalls(list):
    """The calls that write, sync or rename, in their order, as (call, file name), while a test runs."""

    def __init__(self, monkeypatch):
        super().__init__()
        for name in ("write", "pwrite", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._by_descriptor(name, getattr(os, name)))
        for name in ("rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._by_path(name, getattr(os, name)))

    def _by_descriptor(self, name, call):
        def record(fd, *args):
            result = call(fd, *args)
            self.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
            return result

        return record

    def _by_path(self, name, call):
        def record(path, *args, **kwargs):
            result = call(path, *args, **kwargs)
            self.append((name, os.path.basename(path)))
            return result

        return record


def test_a_line_is_written_after_its_data_is_on_the_disk(tmp_path, monkeypatch):
    """For each block: data, sync of the data, line, sync of the line."""
    calls = DiskCalls(monkeypatch)
    with OutputFolder(tmp_path / "out", plan_hash="p", flush_bytes=1) as folder:
        shards = folder.shards(LAYOUTS)
        for name in ("a", "b"):
            del calls[:]
            shards.write(name, b"abc")
            folder.record(name, {})
            folder.flush()
            assert calls == [
                ("pwrite", "model.safetensors"),
                ("fdatasync", "model.safetensors"),
                ("write", "journal.jsonl"),
                ("fdatasync", "journal.jsonl"),
            ]


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    calls = DiskCalls(monkeypatch)
    with OutputFolder(tmp_path / "out", plan_hash="p") as folder:
        folder.shards(LAYOUTS).write("a", b"abc")
        folder.put("config.json", b"{}")
        (folder.folder / "code").mkdir()
        folder.put("code/model.py", b"")
        del calls[:]
        folder.finish()
    sealed = calls.index(("write", "journal.jsonl"))
    files = {("fsync", name) for name in ("model.safetensors", "config.json", "model.py", "code", "new")}
    assert set(calls[:sealed]) == files and calls[sealed - 1] == ("fsync", "new")
    assert calls[sealed + 1 : sealed + 5] == [
        ("fdatasync", "journal.jsonl"),
        ("rename", "new"),
        ("fsync", ".out.deus-tmp"),  # the new name, in the folder it came from and in the one it went to
        ("fsync", tmp_path.name),
    ]
    assert all(name in ("unlink", "rmdir") for name, _ in calls[sealed + 5 :])


def test_names_are_on_the_disk_before_any_data(tmp_path, monkeypatch):
    """The new folders, the journal's head, and the journal's own name, before a shard is created."""
    calls = DiskCalls(monkeypatch)
    with OutputFolder(tmp_path / "deep/er/out", plan_hash="p"):
        assert [c for c in calls if c[1] != ".out.deus-lock"] == [
            ("fsync", tmp_path.name),
            ("fsync", "deep"),
            ("write", "journal.jsonl"),
            ("fdatasync", "journal.jsonl"),
            ("fsync", ".out.deus-tmp"),
            ("fsync", "er"),
        ]


def test_the_journal_is_removed_last(tmp_path, monkeypatch):
    """Until then it says what the rest of the staging folder is."""
    interrupted(tmp_path / "out")
    rmtree, removed = shutil.rmtree, []
    monkeypatch.setattr(shutil, "rmtree", lambda path: (removed.append(path.name), rmtree(path)))
    with OutputFolder(tmp_path / "out", plan_hash="q", overwrite=True):
        assert removed == ["new", ".out.deus-tmp"]


def test_a_staging_folder_that_cannot_be_set_up_is_removed(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(MachineError, match="Input/output error"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_its_holder_has_just_removed_locks_nothing(tmp_path, monkeypatch):
    """The other run ends between our opening of the file and our lock: the next file is locked."""
    flock, removed = fcntl.flock, []

    def lock(fd, how):
        if not removed:
            removed.append(fd)
            os.unlink(tmp_path / ".out.deus-lock")
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with OutputFolder(tmp_path / "out", plan_hash="p"):
        assert (tmp_path / ".out.deus-lock").exists()
        with pytest.raises(PlanError, match="another run is writing"):
            write(tmp_path / "out")


def test_a_failed_flush_finishes_no_block(tmp_path, monkeypatch):
    def fail(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(MachineError, match="no space left"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_failed_flush_stays_failed(tmp_path, monkeypatch):
    """The kernel reports lost pages once: that a later sync succeeds says nothing about them."""
    real, failures = os.fdatasync, [OSError(errno.EIO, "Input/output error")]

    def fail_once(fd):
        if failures and os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            raise failures.pop()
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    with pytest.raises(MachineError), OutputFolder(tmp_path / "out", plan_hash="p") as folder:
        shards = folder.shards(LAYOUTS)
        for name in ("a", "b"):
            shards.write(name, b"abc")
            folder.record(name, {})
            with pytest.raises(MachineError, match="Input/output error"):
                folder.flush()
        folder.finish()
    assert not failures and not folder.resumable and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({}, [["a", "b"]]),
        ({"flush_bytes": 7}, [["a", "b"]]),
        ({"flush_bytes": 3}, [["a"], ["b"]]),
        ({"flush_bytes": 6}, [["a", "b"]]),
        ({"flush_seconds": 0}, [["a"], ["b"]]),
    ],
)
def test_flushes_are_batched(limits, batches, tmp_path, monkeypatch):
    """A flush is due after so many bytes or seconds, and at the end."""
    lines = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (lines.append(bytes(data)), real(fd, data))[1])
    write(tmp_path / "out", **limits)
    _, *blocks, _ = lines  # between the head and the folder's line
    assert [[json.loads(line)["block"] for line in batch.splitlines()] for batch in blocks] == batches


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("through_link", [True, False])
def test_overwrite_replaces_when_complete(atomic, through_link, tmp_path, monkeypatch):
    if not atomic:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    place = tmp_path / "real"
    place.mkdir()
    (place / "config.json").write_text("old")
    (place / "old.safetensors").write_text("old")
    before = content(place)
    out = place
    if through_link:
        out = tmp_path / "link"
        out.symlink_to(place)
    with pytest.raises(PlanError, match="not empty"):
        write(out)
    interrupted(place, overwrite=True)
    assert content(place) == before
    write(out, overwrite=True)
    assert set(content(place)) == {"model.safetensors", "config.json"}
    assert sorted(os.listdir(tmp_path)) == (["link", "real"] if through_link else ["real"])
    assert out.is_symlink() == through_link


@pytest.mark.parametrize("what", ["file", "no model", "more than a model", "mount point", "name taken"])
def test_never_overwritten(what, tmp_path):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "no model":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    elif what == "more than a model":
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "trained.pt").write_text("mine")
    elif what == "mount point":
        out = Path("/proc")
    else:
        (tmp_path / ".out.deus-tmp").write_text("mine")
    message = {"file": "not a folder", "no model": "holds no model", "name taken": "is taken"}.get(what, what)
    with pytest.raises(PlanError, match=message):
        write(out, overwrite=True)
    if what == "no model":
        assert content(out) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("where", ["file/out", "file/deep/out", "x" * 250, "x" * 300, "/proc/nothing/out", "loop"])
def test_paths_where_no_folder_can_be(where, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DeusMergeError, match="cannot be|No such file"):
        write(tmp_path / where)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="not empty"), OutputFolder(out, plan_hash="p") as folder:
        folder.shards(LAYOUTS).write("a", b"abc")
        folder.record("a", {})
        out.mkdir()
        (out / "theirs").touch()
        folder.finish()
    assert content(out) == {"theirs": b""}
    assert folder.resumable


def test_a_second_run_is_refused(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out, plan_hash="p") as first:
        before = os.listdir(first.folder)
        with pytest.raises(PlanError, match="another run") as caught:
            write(out)
        assert f"process {os.getpid()} " in caught.value.got
        code = (
            "import sys\nfrom deus_merge.checkpoint import OutputFolder\n"
            f"with OutputFolder({str(out)!r}, plan_hash='p', overwrite=True, resume=True): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another run is writing to this folder" in other.stderr
        assert os.listdir(first.folder) == before
        write(tmp_path / "other")  # elsewhere is free
    write(out)


@pytest.mark.parametrize("block", [0, 7, 39])
def test_kill_and_resume_give_the_same_bytes(block, model, tmp_path):
    assert interrupted_child.run(model, tmp_path / "undisturbed") == []
    command = [sys.executable, interrupted_child.__file__, str(model), str(tmp_path / "out"), str(block)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "half a block\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    resumed = interrupted_child.run(model, tmp_path / "out", resume=True)
    assert resumed == [str(i) for i in range(block // 3 * 3)]  # it flushes every third block
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "undisturbed"]


def test_an_interrupt_right_after_the_folder_was_made_leaves_nothing(tmp_path, monkeypatch):
    opened = OutputFolder._open

    def interrupted(self, resume):
        opened(self, resume)
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "_open", interrupted)
    output = OutputFolder(tmp_path / "out", plan_hash="0" * 64)
    with pytest.raises(KeyboardInterrupt), output:
        pass
    assert list(tmp_path.iterdir()) == []
    assert output.resume_hint is None
