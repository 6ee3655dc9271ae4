"""After a crash: which folder is under which name, and what the next run makes of it."""

from __future__ import annotations

import json
import os

import pytest

from deus_merge.checkpoint.journal import FORMAT
from deus_merge.checkpoint.staging import StagingArea
from deus_merge.core.errors import PlanError


def build(folder, *names: str, inode: str | None = None) -> StagingArea:
    """A staging area with these folders, each with a file of its name, and the inode of one of them in the journal."""
    area = StagingArea(folder / "out")
    area.staging.mkdir()
    paths = {"out": area.out, "new": area.new, "old": area.old}
    for name in names:
        paths[name].mkdir()
        (paths[name] / "config.json").write_text(name)
    lines: list[dict] = [{"format": FORMAT, "plan_hash": "p", "identity": {}}, {"block": "0", "diagnostics": {}}]
    if inode is not None:
        lines.append({"folder_inode": os.stat(paths[inode]).st_ino if inode in paths else 1})
    (area.staging / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return area


@pytest.mark.parametrize(
    ("names", "inode", "committed", "out"),
    [
        (("new",), None, False, None),  # unfinished
        (("new",), "new", False, None),  # finished, not renamed
        (("out", "new"), None, False, "out"),  # unfinished, to replace OUT
        (("out", "new"), "new", False, "out"),  # finished, to replace OUT
        (("out", "new"), "out", True, "out"),  # exchanged: the old folder is under the name new
        (("out",), "out", True, "out"),  # renamed
        (("out",), "another", True, "out"),  # renamed; the file system has given it another inode number
        (("out", "old"), "out", True, "out"),  # renamed in two steps
        (("old", "new"), "new", False, "old"),  # between the two steps
        (("old", "new"), None, False, "old"),
    ],
)
def test_states(names, inode, committed, out, tmp_path):
    area = build(tmp_path, *names, inode=inode)
    assert area.committed == committed and area.resumable_blocks == (0 if committed else 1)
    area.recover()
    assert area.staging.exists() != committed  # what can be resumed stays
    assert not area.old.exists()
    if out is None:
        assert not area.out.exists()
    else:
        assert (area.out / "config.json").read_text() == out
    before = sorted(tmp_path.rglob("*"))
    area.recover()  # a second time changes nothing
    assert sorted(tmp_path.rglob("*")) == before


def test_the_only_copy_is_not_discarded(tmp_path):
    area = build(tmp_path, "old", "new", inode="new")
    area.discard()
    assert (area.old / "config.json").read_text() == "old"
    area.recover()
    area.discard()
    assert (area.out / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_two_earlier_outputs_are_both_left(tmp_path):
    area = build(tmp_path, "out", "old", "new", inode="new")
    with pytest.raises(PlanError, match="moved the earlier output away") as caught:
        area.check(overwrite=True)
    assert str(area.old) in caught.value.got


@pytest.mark.parametrize(("names", "inode"), [(("old", "new"), "new"), (("out", "old"), "out")])
def test_names_are_on_the_disk_before_anything_else(names, inode, tmp_path, monkeypatch):
    """Both folders that a name moved between are synced, before the rest is removed."""
    area = build(tmp_path, *names, inode=inode)
    fsync, synced = os.fsync, []

    def record(fd):
        assert area.out.exists() and area.staging.exists()
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    area.recover()
    assert synced == [str(area.staging), str(tmp_path)]
