"""The journal validates itself: every complete line is typed, everything else is refused or ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deus_merge.checkpoint.journal import (
    FILENAME,
    FORMAT,
    FinishedBlock,
    FinishedFolder,
    Journal,
    JournalContents,
    JournalHead,
    check_journal,
    parse_line,
    read_journal,
)
from deus_merge.core.errors import PlanError

HEAD = {"format": FORMAT, "plan_hash": "p", "identity": {"seed": 0}}
BLOCK = {"block": "0", "diagnostics": {"cost": 0.5}}
SPECIFICATION = Path(__file__).parents[2] / "docs/journal.md"


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def test_the_specification_shows_a_real_journal(tmp_path):
    text = SPECIFICATION.read_text()
    assert f"**format {FORMAT}**" in text
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / FILENAME).write_text(example)
    found = read_journal(tmp_path)
    assert found.length == len(example.encode()) and found.head is not None
    assert found.head.format == FORMAT and list(found.finished) == ["0", "1"] and found.folder_inode == 1835021
    (folder := tmp_path / "again").mkdir()
    journal = Journal.create(folder, found.head.plan_hash, found.head.identity)
    journal.append(FinishedBlock(name, diagnostics) for name, diagnostics in found.finished.items())
    journal.finish(found.folder_inode)
    journal.close()
    assert (folder / FILENAME).read_text() == example


@pytest.mark.parametrize(
    ("value", "first", "parsed"),
    [
        (HEAD, True, JournalHead(FORMAT, "p", {"seed": 0})),
        ({"format": 2, "anything": 1}, True, JournalHead(2)),  # of another version only the number is read
        (BLOCK, False, FinishedBlock("0", {"cost": 0.5})),
        ({"folder_inode": 7}, False, FinishedFolder(7)),
    ],
)
def test_lines(value, first, parsed):
    assert parse_line(line(value), first) == parsed
    with pytest.raises(ValueError, match="incomplete"):
        parse_line(line(value)[:-1], first)
    with pytest.raises(ValueError):
        parse_line(line(value), not first)


WRONG = {
    "no format": {"plan_hash": "p", "identity": {}},
    "format as text": HEAD | {"format": str(FORMAT)},
    "format a bool": HEAD | {"format": True},
    "plan_hash a number": HEAD | {"plan_hash": 1},
    "identity a list": HEAD | {"identity": []},
    "head with more": HEAD | {"more": 1},
    "head with less": {"format": FORMAT, "plan_hash": "p"},
    "block a number": BLOCK | {"block": 0},
    "diagnostics a list": BLOCK | {"diagnostics": []},
    "block with more": BLOCK | {"more": 1},
    "block with less": {"block": "0"},
    "inode as text": {"folder_inode": "7"},
    "inode a bool": {"folder_inode": True},
    "inode negative": {"folder_inode": -1},
    "inode with more": {"folder_inode": 7, "block": "0"},
    "unknown": {"whole": 7},
    "a list": [1],
    "a number": 1,
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lines(case, tmp_path):
    """Such a line, and everything after it, is as if it were not there."""
    for first in (True, False):
        with pytest.raises(ValueError):
            parse_line(line(WRONG[case]), first)
    (tmp_path / FILENAME).write_bytes(line(HEAD) + line(BLOCK) + line(WRONG[case]) + line(BLOCK | {"block": "1"}))
    found = read_journal(tmp_path)
    assert list(found.finished) == ["0"] and found.folder_inode is None
    assert found.length == len(line(HEAD) + line(BLOCK))
    (tmp_path / FILENAME).write_bytes(line(WRONG[case]) + line(BLOCK))
    assert read_journal(tmp_path) == JournalContents()


@pytest.mark.parametrize("raw", [b"", b"\0" * 40, b"\n", b"[" * 100_000 + b"\n", b"\xff\n", line(HEAD)[:-1]])
def test_without_a_complete_head_nothing_is_read(raw, tmp_path):
    (tmp_path / FILENAME).write_bytes(raw)
    assert read_journal(tmp_path) == JournalContents()
    with pytest.raises(PlanError, match="the journal has another format") as caught:
        check_journal(tmp_path, "p", {})
    assert caught.value.where == tmp_path and caught.value.got == "no complete head"


def test_the_last_of_two_lines_counts(tmp_path):
    again = BLOCK | {"diagnostics": {"cost": 1}}
    (tmp_path / FILENAME).write_bytes(
        b"".join(map(line, [HEAD, BLOCK, again, {"folder_inode": 1}, {"folder_inode": 2}]))
    )
    found = read_journal(tmp_path)
    assert found.finished == {"0": {"cost": 1}} and found.folder_inode == 2


def test_reopening_cuts_an_incomplete_line_off(tmp_path):
    (tmp_path / FILENAME).write_bytes(line(HEAD) + line(BLOCK) + b'{"block": "1", "diag')
    journal = Journal.reopen(tmp_path)
    assert journal.finished == {"0": {"cost": 0.5}}
    journal.append([FinishedBlock("1", {})])
    journal.close()
    journal.close()  # twice is not an error
    assert list(read_journal(tmp_path).finished) == ["0", "1"] == list(journal.finished)


@pytest.mark.parametrize(
    ("plan_hash", "identity", "message", "expected", "got"),
    [
        ("p", {"seed": 1}, "other values for: seed", {"seed": 0}, {"seed": 1}),
        ("q", {"seed": 1, "threads": 4}, "other values for: seed, threads", {"seed": 0, "threads": None},
         {"seed": 1, "threads": 4}),
        ("q", {"seed": 0}, "another plan", "p", "q"),
    ],
)  # fmt: skip
def test_another_run(plan_hash, identity, message, expected, got, tmp_path):
    (tmp_path / FILENAME).write_bytes(line(HEAD))
    check_journal(tmp_path, "p", {"seed": 0})
    with pytest.raises(PlanError) as caught:
        check_journal(tmp_path, plan_hash, identity)
    assert caught.value.message == f"cannot resume: the interrupted run had {message}"
    assert (caught.value.expected, caught.value.got) == (expected, got)


def test_another_format(tmp_path):
    """Finished blocks of another version still count, so that they are not removed without being asked."""
    (tmp_path / FILENAME).write_bytes(line(HEAD | {"format": 2}) + line(BLOCK))
    assert list(read_journal(tmp_path).finished) == ["0"]
    with pytest.raises(PlanError, match="another format") as caught:
        check_journal(tmp_path, "p", {"seed": 0})
    assert (caught.value.expected, caught.value.got) == (f"format {FORMAT}", "format 2")
