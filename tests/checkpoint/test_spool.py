"""The spool: what was not fetched is never read, the bound holds, and nothing in use gives way."""

from __future__ import annotations

import errno
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from range_server import serving

from deus_merge.checkpoint.storage import _spool
from deus_merge.checkpoint.storage._spool import RemoteFile, Spool
from deus_merge.checkpoint.storage._transfer import Remote
from deus_merge.core.errors import CheckpointError, MachineError

pytest.importorskip("obstore")

CELL, CELLS = 4096, 40
DATA = os.urandom(CELL * CELLS - 100)  # the last cell is not whole


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(_spool, "CELL", CELL)
    monkeypatch.setattr(_spool, "PART", 4 * CELL)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(DATA)
    with serving(tmp_path / "served") as server:
        yield server


def opened(server, folder, cells: int) -> RemoteFile:
    remote = Remote(server.url, server.url, "http", patience=2)
    _, identity = remote.begin("file", 10)
    return RemoteFile(Spool(folder, cells * CELL), remote, "file", identity)


def disk(folder) -> int:
    """The blocks of the files without a name that this process has open there."""
    blocks = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(str(folder)):
                status = os.fstat(int(name))
                blocks[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return sum(blocks.values())


def test_every_byte_is_the_source_s(served, tmp_path):
    file = opened(served, tmp_path / "spool", CELLS)
    for begin, end in ((0, 5), (3 * CELL, 9 * CELL + 7), (8 * CELL, 12 * CELL), (38 * CELL, len(DATA))):
        assert bytes(file.spool.view(file, begin, end)) == DATA[begin:end]
    with file.stream(100, len(DATA) - 3) as pieces:
        assert b"".join(pieces) == DATA[100 : len(DATA) - 3]
    assert not list((tmp_path / "spool").iterdir())  # its files have no name


def test_a_cell_is_fetched_once_until_it_gave_way(served, tmp_path):
    file = opened(served, tmp_path, 8)
    served.requests.clear()
    file.spool.view(file, 0, 4 * CELL)
    file.spool.view(file, 0, 2 * CELL)
    assert [(asked.begin, asked.end) for asked in served.requests] == [(0, 4 * CELL)]
    file.spool.view(file, 8 * CELL, 16 * CELL)
    assert bytes(file.spool.view(file, 0, CELL)) == DATA[:CELL]  # a hole by now: fetched again
    assert [asked.begin for asked in served.requests].count(0) == 2


@pytest.mark.parametrize("fault", [403, 503, "truncated", "reset"])
def test_what_could_not_be_fetched_is_not_read(served, tmp_path, fault):
    file = opened(served, tmp_path, CELLS)
    served.fault = lambda asked: fault if asked.begin and 4 * CELL <= asked.begin < 8 * CELL else None
    with pytest.raises((CheckpointError, MachineError)):
        file.spool.view(file, 0, 12 * CELL)
    file.spool.prefetch(file, 4 * CELL, 8 * CELL)
    served.fault = lambda asked: None
    assert bytes(file.spool.view(file, 0, 12 * CELL)) == DATA[: 12 * CELL]


def test_the_bound_holds_and_views_stay(served, tmp_path):
    """Random reads through a spool of a fifth of the file, with some views alive at all times."""
    folder = tmp_path / "spool"
    file = opened(served, folder, 8)
    kept = []
    for step in range(60):
        begin = (step * 7919) % (CELLS - 2)
        kept.append((begin, file.spool.view(file, begin * CELL, (begin + 2) * CELL)))
        del kept[:-3]
        file.spool.prefetch(file, ((step * 31) % (CELLS - 1)) * CELL, ((step * 31) % (CELLS - 1) + 1) * CELL)
        assert file.spool.size <= 8 * CELL
        for at, view in kept:
            wanted = DATA[at * CELL : (at + 2) * CELL]
            assert bytes(view)[: len(wanted)] == wanted
        assert disk(folder) <= 8 * CELL + 4096


def test_more_in_use_than_the_bound_is_an_error(served, tmp_path):
    file = opened(served, tmp_path, 4)
    view = file.spool.view(file, 0, 3 * CELL)
    with pytest.raises(MachineError, match="--cache-size"):
        file.spool.view(file, 8 * CELL, 10 * CELL)
    assert bytes(view) == DATA[: 3 * CELL]
    del view
    gc.collect()
    assert bytes(file.spool.view(file, 8 * CELL, 10 * CELL)) == DATA[8 * CELL : 10 * CELL]


def test_reading_ahead_frees_only_what_was_used(served, tmp_path):
    file = opened(served, tmp_path, 8)
    file.spool.prefetch(file, 0, 8 * CELL)
    file.spool.prefetch(file, 8 * CELL, 12 * CELL)  # there is no room but that of what nobody has read yet
    assert bytes(file.spool.view(file, 0, 8 * CELL)) == DATA[: 8 * CELL]
    assert not [asked for asked in served.requests if asked.begin and asked.begin >= 8 * CELL]


def test_many_threads(served, tmp_path):
    """They read overlapping parts, and no part is asked for twice while it is there."""
    file = opened(served, tmp_path, CELLS)
    served.fault = lambda asked: "slow"
    served.requests.clear()
    barrier = threading.Barrier(6)

    def read(number):
        barrier.wait()
        begin = number * 2 * CELL
        return bytes(file.spool.view(file, begin, begin + 8 * CELL)) == DATA[begin : begin + 8 * CELL]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))
    cells = [i for asked in served.requests for i in range(asked.begin // CELL, asked.end // CELL)]
    assert len(cells) == len(set(cells))


def test_a_file_system_without_holes(served, tmp_path, monkeypatch):
    import ctypes

    def unsupported(*_):
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(_spool, "libc_function", lambda name: unsupported)
    file = opened(served, tmp_path, 4)
    file.spool.view(file, 0, 4 * CELL)
    with pytest.raises(MachineError, match="cannot free a part of a file"):
        file.spool.view(file, 8 * CELL, 12 * CELL)
