"""Lets one step of a run go wrong: every call that changes something on a disk is counted, and one of them fails.

Installed in a process that is about to run ``deus-merge``, by replacing functions of `os` and of the C library. An
audit hook sees to it that no change goes another way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

NEED_SPACE = {"open", "mkdir", "write", "pwrite", "copy_file_range", "fallocate"}
_AUDITED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Faults:
    """Counts the steps of this process.

    Args:
        root: The folder in which steps are looked for.
        how: What happens at step ``at``:
            kill: SIGKILL before it; half: SIGKILL after half a write; cut: the power fails before it, and what was not
            brought to the disk is gone or garbage; int: SIGINT; stop: SIGSTOP; enospc: no space from then on; eio: one
            input/output error, and a failed sync loses what it should have synced; fill: the disk is really filled up.
        at: The step, counted from 1; None for none.
        exchange: Whether the file system can exchange two names.
        seed: Of the random bytes that a power cut leaves.

    Attributes:
        log: Name and file of every step.
        unseen: Changes that went another way.
    """

    def __init__(self, root: str, how: str = "kill", at: int | None = None, exchange: bool = True, seed: int = 0):
        self.root, self.how, self.at, self.can_exchange = root, how, at, exchange
        self.log: list[str] = []
        self.unseen: list[str] = []
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._inside = threading.local()
        self._short = True
        self._unsynced: dict[int, tuple[str, list[tuple[int, int]]]] = {}  # inode -> a way to it, ranges

    def install(self) -> None:
        from deus_merge.checkpoint import system

        self._real = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace"):
            setattr(os, name, self._by_path(name))
        os.open, os.write, os.pwrite = self._open, self._write, self._pwrite
        os.copy_file_range, os.ftruncate = self._copy_file_range, self._ftruncate
        os.fsync, os.fdatasync = self._sync("fsync"), self._sync("fdatasync")
        call = system.libc_function
        calls = {name: call(name) for name in ("fallocate", "renameat2")}
        wrapped = {"fallocate": self._fallocate(calls), "renameat2": self._renameat2(calls)}
        system.libc_function = lambda name: wrapped[name] if name in wrapped else call(name)
        sys.addaudithook(self._audit)

    # the steps ---------------------------------------------------------------------------------------------------

    def _step(self, name: str, where: object, half=None) -> bool:
        """Count a step; whether it is to write no more than half."""
        with self._lock:
            self.log.append(f"{name} {Path(os.fsdecode(where)).name}")
            number = len(self.log)
            if self.at is None or number < self.at or (number > self.at and self.how != "enospc"):
                return False
            if self.how == "kill" or (self.how == "half" and half is None):
                self._die()
            elif self.how == "half":
                half()
                self._die()
            elif self.how == "cut":
                self._lose(self._unsynced)
                self._die()
            elif self.how == "int":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self.how == "fill":
                fd = self._call("open", f"{self.root}/ballast", os.O_WRONLY | os.O_CREAT)
                try:
                    while True:
                        self._real["write"](fd, bytes(1 << 12))
                except OSError:
                    self._real["close"](fd)
            elif self.how == "eio":
                raise OSError(errno.EIO, os.strerror(errno.EIO), os.fsdecode(where))
            elif self.how == "enospc" and name in NEED_SPACE:
                if self._short and half is not None:  # a full disk takes what still fits, and then no more
                    self._short = False
                    return True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(where))
        return False

    def _call(self, name: str, *args, **kwargs):
        self._inside.yes = True
        try:
            return self._real[name](*args, **kwargs)
        finally:
            self._inside.yes = False

    def _by_path(self, name: str):
        def call(path, *args, **kwargs):
            self._step(name, path)
            return self._call(name, path, *args, **kwargs)

        return call

    def _open(self, path, flags, *args, **kwargs):
        if flags & (os.O_CREAT | os.O_TRUNC):
            self._step("open", path)
        return self._call("open", path, flags, *args, **kwargs)

    def _write(self, fd, data):
        data = memoryview(data)
        half = len(data) // 2 or 1
        if self._step("write", self._name(fd), lambda: self._real["write"](fd, data[:half])):
            data = data[:half]
        at = os.fstat(fd).st_size
        count = self._real["write"](fd, data)
        self._dirty(fd, at, count)
        return count

    def _pwrite(self, fd, data, offset):
        half = len(data) // 2 or 1
        if self._step("pwrite", self._name(fd), lambda: self._real["pwrite"](fd, data[:half], offset)):
            data = data[:half]
        count = self._real["pwrite"](fd, data, offset)
        self._dirty(fd, offset, count)
        return count

    def _copy_file_range(self, source, target, count, source_offset, target_offset):
        def some(count):
            return self._real["copy_file_range"](source, target, count, source_offset, target_offset)

        if self._step("copy_file_range", self._name(target), lambda: some(count // 2 or 1)):
            count = count // 2 or 1
        done = some(count)
        self._dirty(target, target_offset, done)
        return done

    def _ftruncate(self, fd, size):
        self._step("ftruncate", self._name(fd))
        return self._call("ftruncate", fd, size)

    def _sync(self, name: str):
        def call(fd):
            inode = os.fstat(fd).st_ino
            _, before = self._unsynced.get(inode, ("", []))
            before = list(before)
            try:
                self._step(name, self._name(fd))
            except OSError:
                self._lose({inode: self._unsynced[inode]} if before else {})
                raise
            self._real[name](fd)
            with self._lock:
                for done in before:
                    self._unsynced[inode][1].remove(done)

        return call

    def _fallocate(self, calls):
        def call(fd, *args):
            try:
                self._step("fallocate", self._name(fd))
            except OSError as error:
                ctypes.set_errno(error.errno)
                return -1
            return calls["fallocate"](fd, *args)

        return call

    def _renameat2(self, calls):
        def call(*args):
            try:
                self._step("renameat2", args[1])
                if not self.can_exchange:
                    raise OSError(errno.EINVAL, "what file systems say that cannot")
            except OSError as error:
                ctypes.set_errno(error.errno)
                return -1
            return calls["renameat2"](*args)

        return call

    # losses ----------------------------------------------------------------------------------------------------

    def _dirty(self, fd: int, offset: int, count: int) -> None:
        with self._lock:
            inode = os.fstat(fd).st_ino
            if inode not in self._unsynced:
                own = self._real["open"](f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
                self._unsynced[inode] = (f"/proc/self/fd/{own}", [])
            self._unsynced[inode][1].append((offset, count))

    def _lose(self, files: dict[int, tuple[str, list[tuple[int, int]]]]) -> None:
        """Some of what was not synced is on the disk, some is not, some is what was there before."""
        for way, ranges in files.values():
            fd = self._real["open"](way, os.O_WRONLY)
            for offset, count in ranges:
                intact = self._random.randrange(count)
                if self._random.random() < 0.8:
                    noise = self._random.choice([bytes(count - intact), self._random.randbytes(count - intact)])
                    self._real["pwrite"](fd, noise, offset + intact)
            os.close(fd)
            ranges.clear()

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    @staticmethod
    def _name(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def _audit(self, event: str, args: tuple) -> None:
        if event in _AUDITED and not getattr(self._inside, "yes", False) and isinstance(args[0], str | bytes | Path):
            path = os.path.abspath(os.fsdecode(args[0]))
            changes = event != "open" or args[2] & (os.O_CREAT | os.O_TRUNC)
            if changes and path.startswith(self.root):
                self.unseen.append(f"{event} {path}")
