"""What commands print: rows of equal layers, plurals, widths, progress with and without a terminal, colours."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from support import make_model, write_recipe

import deus_merge

PROGRAM = [sys.executable, "-m", "deus_merge"]
RED = "\x1b[31m\x1b[1merror:\x1b[0m "


def on_terminal(*arguments, columns: int = 80, **variables: str) -> str:
    """The output of ``deus-merge`` on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    root = os.path.dirname(os.path.dirname(deus_merge.__file__))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    env = {**plain, "TERM": "xterm-256color", "PYTHONPATH": root, **variables}
    with subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    ) as process:
        os.close(theirs)
        content = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            content += part
        process.wait(timeout=60)
    os.close(ours)
    return content.decode().replace("\r\n", "\n")


def rows(text: str) -> list[list[str]]:
    """The rows of the first table: cells."""
    lines = text.split("\n\n")[1].splitlines()
    return [re.split(r"  +", line) for line in lines[1:]]


# plans ----------------------------------------------------------------------------------------------------------------


def test_plan_puts_equal_neighbours_into_one_row(run, tmp_path):
    base, other = make_model(tmp_path / "base", layers=6), make_model(tmp_path / "other", layers=6, seed=1)
    text = f"""
base_model: {base}
slices:
  - {{merge_method: passthrough, sources: [{{model: {base}, layer_range: [0, 2]}}]}}
  - {{merge_method: passthrough, sources: [{{model: {base}, layer_range: [3, 5]}}]}}
  - merge_method: linear
    sources: [{{model: {base}, layer_range: [3, 6]}}, {{model: {other}, layer_range: [0, 3]}}]
    parameters: {{weight: 0.5}}
  - {{merge_method: passthrough, sources: [{{model: {base}, layer_range: [5, 6]}}]}}
"""
    found = rows(run("plan", write_recipe(tmp_path / "recipe.yml", text)).out)
    assert [row[:2] for row in found if row[0].startswith("layer")] == [
        ["layers 0-1", "A 0-1"],
        ["layers 2-3", "A 3-4"],  # the numbers do not go on where a layer is left out
        ["layers 4-6", "A 3-5 + B 0-2"],
        ["layer 7", "A 5"],
    ]


def test_plan_keeps_new_layers_apart(run, tiny):
    """The second time that solar has a layer, it is a new one."""
    found = rows(run("plan", "solar", "--model", tiny, "--set", "upscale.insert={count: 2}").out)
    layers = [row for row in found if row[0].startswith("layer")]
    assert [(row[0], row[-1] == "new") for row in layers] == [
        ("layers 0-3", False),
        ("layers 4-5", True),
        ("layers 6-7", False),
    ]


def test_one_of_anything_is_no_plural(run, tmp_path):
    base = make_model(tmp_path / "base", layers=1)
    recipe = write_recipe(tmp_path / "recipe.yml", f"merge_method: passthrough\nmodels: [{{model: {base}}}]\n")
    texts = [run("plan", recipe), run("merge", recipe, tmp_path / "out"), run("verify", tmp_path / "out")]
    texts += [run("inspect", tmp_path / "out", *more) for more in ((), ("--similarity",))]
    slices = f"slices: [{{sources: [{{model: {base}, layer_range: [0, 2]}}]}}]"
    wrong = write_recipe(tmp_path / "wrong.yml", f"merge_method: passthrough\n{slices}\n")
    texts.append(run("plan", wrong, expect=2))
    assert "beyond the 1 layer of" in texts[-1].err
    assert "1 layer, base]" in texts[0].out and "1 -> 1 layer, 0 new" in texts[0].out
    assert "1 -> 1 layer in" in texts[1].err and "1 layer of 1 kind" in texts[2].out
    for done in texts:
        assert not re.search(r"\b1 [a-z]*(layers|files|tensors|blocks|checks|sources|tokens)\b", done.out + done.err)


# widths ---------------------------------------------------------------------------------------------------------------


LONG = """
name: a-very-long-name-of-a-document-that-nobody-would-ever-give
merge_method: linear
models: [{model: tiny, parameters: {weight: 0.5}}, {model: tiny, parameters: {weight: 0.5}}]
---
base_model: a-very-long-name-of-a-document-that-nobody-would-ever-give
upscale: {preset: copy_next}
calibrate: {text: a text with a long name for the calibration.txt}
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "opt_deus", "--model", "tiny"),
        ("plan", "long.yml"),
        ("inspect", "tiny", "--similarity"),
        ("recipes",),
        ("methods",),
        ("methods", "ot_fuse"),
        ("env",),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_everything_fits_80_columns(run, tiny, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "long.yml").write_text(LONG)
    (tmp_path / "a text with a long name for the calibration.txt").write_text("words " * 9999)
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*arguments).out.splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    monkeypatch.delenv("COLUMNS")
    assert len(run(*arguments).out.splitlines()) <= len(lines)  # in a pipe there is more space


# progress -------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_short_run_prints_its_result_only(run, tiny, tmp_path):
    assert re.fullmatch(
        r"\S+: 6 -> 9 layers in [\d.]+ s, 7 checks passed\nread .*: \w+ bounds this run\nnext:\n(  [a-z]+ .*\n){4}",
        run("upscale", tiny, tmp_path / "out").err,
    )
    done = run("verify", tmp_path / "out", "--quick")
    assert done.err == "" and run("inspect", tiny, "--similarity", "--json").err == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_have_the_blocks_own_time_and_its_fraction(run, tiny, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("deus_merge.cli.progress.INTERVAL", 0)
    lines = run("upscale", tiny, tmp_path / "out", "--workers", workers).err.splitlines()
    ended = [re.fullmatch(r"\[(\d+)/11\] (.+): ([a-z +]+) in ([\d.]+) s \(([\d.]+) s so far\)", x) for x in lines]
    ended = [match for match in ended if match]
    assert [int(match[1]) for match in ended] == list(range(1, 12))
    assert len({match[2] for match in ended}) == 11
    assert sum(float(match[4]) for match in ended) <= workers * float(ended[-1][5]) + 11 * 0.05
    if workers == 1:
        fractions = [int(match[1]) for x in lines if (match := re.search(r"layer 4: (\d+)% in", x))]
        assert len(fractions) > 3 and fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] < 100
    assert lines[lines.index("next:") - 2].endswith("7 checks passed")


def test_lines_come_every_few_seconds(monkeypatch, capsys):
    from deus_merge.cli import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.steps(10, "block") as steps:
        for i in range(2):
            steps.end(f"layer {i}", "copy", resumed=True)
        for i in range(2, 10):
            steps.fraction(f"layer {i}")
            now[0] += 2
            steps.fraction(f"layer {i}", 0.5)
            now[0] += 2
            steps.end(f"layer {i}", "copy")
    assert capsys.readouterr().err.splitlines() == [
        "2 blocks finished by the earlier run",
        "[3/10] layer 3: 50% in 2.0 s (6.0 s so far)",
        "[5/10] layer 4: copy in 4.0 s (12 s so far)",
        "[6/10] layer 6: 50% in 2.0 s (18 s so far)",
        "[8/10] layer 7: copy in 4.0 s (24 s so far)",
        "[9/10] layer 9: 50% in 2.0 s (30 s so far)",
    ]


def test_a_long_step_is_not_silent(monkeypatch, capsys):
    """One that reports nothing while it runs, in a thread that is gone at the end."""
    from deus_merge.cli import progress

    monkeypatch.setattr(progress, "SILENCE", 0.1)
    monkeypatch.setattr(progress, "INTERVAL", 0.1)
    with progress.steps(3, "check") as steps:
        steps.fraction("checksums")
        time.sleep(1.3)
    told = capsys.readouterr().err
    assert re.fullmatch(r"\[0/3\] checksums: running for 1\.\d s \(1\.\d s so far\)\n", told)
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_verify_and_inspect_report_their_steps(run, tiny, tmp_path, monkeypatch):
    run("upscale", tiny, tmp_path / "out")
    monkeypatch.setattr("deus_merge.cli.progress.INTERVAL", 0)
    done = run("verify", tmp_path / "out", "--quick", "--json")
    names = [check["name"] for check in done.json()["checks"]]
    told = [re.match(rf"\[(\d+)/{len(names)}\] (.+?)( in [\d.]+ s)? \(", line) for line in done.err.splitlines()]
    assert [(int(match[1]), match[2]) for match in told if match] == list(enumerate(names, 1))
    lines = run("inspect", tiny, "--similarity").err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"[{i + 1}/5] layers {i} and {i + 1}" for i in range(5)]


def test_a_finished_output_names_its_blocks_once(run, tiny, tmp_path):
    run("upscale", tiny, tmp_path / "out")
    assert "11 blocks finished by the earlier run\n" in run("upscale", tiny, tmp_path / "out", "--resume").err


def test_a_bar_on_a_terminal(tiny, tmp_path):
    """It moves, has the block's name, fits the terminal, and is gone at the end."""
    text = on_terminal("upscale", tiny, tmp_path / "out")
    frames = [frame for frame in re.split(r"\r|\x1b\[2K", text) if "━" in frame]
    plain = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", frame).strip("\n") for frame in frames]
    assert frames and all(len(line) <= 80 for frame in plain for line in frame.splitlines())
    assert any("layer" in frame and "/11" in frame for frame in plain)
    last = text.replace("\r", "").partition("\nnext:")[0].split("\n")[-2:]
    assert "9 layers in" in last[0] and "bounds this run" in last[1] and "━" not in "".join(last)
    assert "━" not in on_terminal("verify", tmp_path / "out", "--quick", TERM="dumb")


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("upscale", "./bse", "out"), ("upscale", "./bse"), ("upscal",)])
def test_errors_are_in_colour_on_a_terminal_only(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert on_terminal(*arguments).startswith(RED)
    for variables in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_terminal(*arguments, **variables)
        assert plain.startswith("error: ") and "\x1b" not in plain
    assert run(*arguments, expect=2).err == plain


def test_without_arguments_there_is_help(run):
    done = run(expect=2)
    assert "\nCommands:\n  merge " in done.err and "\\n" not in done.err


def test_a_warning_is_in_colour(run, tiny, tmp_path):
    run("upscale", tiny, tmp_path / "out", "--preset", "stack")
    told = on_terminal("upscale", tiny, tmp_path / "out", "--preset", "stack", "-q", "--resume")
    assert "\x1b[33m\x1b[1mwarning:\x1b[0m the output is already complete" in told
