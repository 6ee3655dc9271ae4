"""How many files a process may open: asked for in a process of its own, whose limits can be set."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from deus_merge.run.limits import allow_open_files
soft, hard, count = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(allow_open_files(count), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "count", "allowed"),
    [(256, 256, 100, True), (256, 256, 200, False), (256, 512, 200, True), (256, 512, 500, False)],
)
def test_the_limit_is_raised_as_far_as_it_may(soft, hard, count, allowed):
    """Other files are open too, so what is asked for is not all that is needed."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, (soft, hard, count))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == str(allowed)
    assert int(said[1]) == soft if count == 100 or not allowed else count < int(said[1]) <= hard
