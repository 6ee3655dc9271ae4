"""The limits of this machine on a process: memory and open files."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

_OTHER_FILES = 128  # open files that are not counted: libraries, pipes, the terminal


def memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Memory in bytes, from Linux's own accounts; None where there are none.

    Args:
        root: The folder that ``proc`` and ``sys`` are in.

    Returns:
        The bytes available without swapping, and the total with swap; both within the limits of the control
        groups (containers, batch jobs) that this process is in.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        available, total, swap = fields["MemAvailable"], fields["MemTotal"], fields["SwapTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for limit, used in _control_groups(root):
        available, total = min(available, max(0, limit - used)), min(total, limit)
    return available, total + swap


def open_files() -> tuple[int, int]:
    """How many files this process may open: its own limit, and the highest that it may set."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def allow_open_files(count: int) -> bool:
    """Let this process open ``count`` more files, if need be by raising its own limit; False where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return True
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return False
    return True


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use (file cache left out) of each limited control group that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "file", "shmem")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                parts = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield limit, used - int(parts[names[2]]) + int(parts[names[3]])
            except (OSError, ValueError, KeyError):  # no limit ("max"), or a group that this container does not see
                pass
            if folder == top:
                break
