"""Runs ``deus-merge`` many times at the cost of one start: a process that has imported everything forks a child a run.

Reads one JSON request a line from stdin and answers each with one line::

    prime    arguments of a run in this very process, so that late imports happen once
    run      arguments of a run in a child; with it
      folder            where
      fault             what goes wrong: arguments of `Faults`
      seconds, signal   a signal that it gets after so many seconds
      user              who runs it
      closed            its stderr is a closed pipe
    pid      of a stopped child, and a ``signal`` for it

A run's answer has its exit code (or minus the signal; none when it is stopped), its output, and its steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from functools import partial

import scipy.optimize  # noqa: F401
import torch  # noqa: F401
from faults import Faults

from deus_merge.checkpoint import OutputFolder
from deus_merge.cli import merge as commands  # noqa: F401
from deus_merge.cli.main import run_command
from deus_merge.methods.registry import methods
from deus_merge.run import preflight


def child(request: dict, outputs: list[int], result: int) -> None:
    """One run; does not return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for fd, own in enumerate(outputs, 1):
        os.dup2(own, fd)
    if request.get("closed"):
        reader, closed = os.pipe()
        os.close(reader)
        os.dup2(closed, 2)
    os.chdir(request["folder"])
    if request.get("user"):
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    preflight.OutputFolder = partial(OutputFolder, flush_bytes=1)  # a line a block
    faults = Faults(request["folder"], **request.get("fault", {}))
    faults.install()
    began = time.monotonic()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        code = run_command(request["run"])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    except KeyboardInterrupt:  # the command had not begun, or had ended
        code = 130
    except BaseException:  # a bug: as Python itself would show it
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    answer = {"steps": faults.log, "unseen": faults.unseen, "seconds": time.monotonic() - began}
    with os.fdopen(result, "w") as file:
        json.dump(answer, file)
    os._exit(code)


def wait(pid: int, files: list) -> dict:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"code": None, "pid": pid}
    answer = {"code": os.waitstatus_to_exitcode(status), "steps": [], "unseen": []}
    for file in files:
        file.seek(0)
    answer["out"], answer["err"], rest = (file.read().decode() for file in files)
    return answer | json.loads(rest or "{}")


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # children take it when they are ready for it
    methods()
    stopped: dict[int, list] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
            pid = os.fork()
            if not pid:
                child(request, [files[0].fileno(), files[1].fileno()], files[2].fileno())
            if "seconds" in request:
                time.sleep(request["seconds"])
                os.kill(pid, getattr(signal, request["signal"]))
        elif "prime" in request:
            print(json.dumps({"code": run_command(request["prime"])}), flush=True)
            continue
        else:
            pid = request["pid"]
            files = stopped.pop(pid)
            os.kill(pid, getattr(signal, request["signal"]))
        answer = wait(pid, files)
        if answer["code"] is None:
            stopped[pid] = files
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
