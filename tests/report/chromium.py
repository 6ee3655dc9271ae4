"""A headless Chromium, driven over a pipe by its own protocol: no package is needed beside the browser."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable() -> str | None:
    """The browser: ``CHROMIUM``, or the first of its usual names; None without one."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    works = found and subprocess.run([found, "--version"], capture_output=True, timeout=30).returncode == 0
    return found if works else None


@dataclass
class View:
    """What a page did at one width, in one theme.

    Attributes:
        scroll_width: The width of its content, px.
        outside: Elements that reach beyond the screen though nothing around them scrolls.
        small: Texts that are shown in less than 10 px.
        console: Messages of the console and errors.
        requests: What the page asked for, itself left out.
        background: The colour of the page.
        picture: A PNG of all of it.
    """

    scroll_width: int
    outside: list[str]
    small: list[str]
    console: list[str]
    requests: list[str]
    background: str
    picture: bytes


_MEASURE = """(() => {
  const scrolls = e => { for (; e; e = e.parentElement) if (getComputedStyle(e).overflowX !== 'visible') return true; };
  const say = e => e.tagName + '.' + (e.className.baseVal ?? e.className) + ': ' + e.textContent.trim().slice(0, 40);
  const all = [...document.body.querySelectorAll('*')].filter(e => e.getClientRects().length);
  const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const scale = e => e.ownerSVGElement && e.getScreenCTM ? e.getScreenCTM().d : 1;
  return {
    scroll_width: document.documentElement.scrollWidth,
    outside: all.filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 && !scrolls(e)).map(say),
    small: texts.filter(e => parseFloat(getComputedStyle(e).fontSize) * scale(e) < 10).map(say),
    background: getComputedStyle(document.body).backgroundColor,
    height: document.documentElement.scrollHeight,
  };
})()"""


class Chromium:
    """A browser with one tab."""

    def __init__(self, program: str):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        def place() -> None:  # the browser reads from 3 and writes to 4
            first, second = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(first, 3)
            os.dup2(second, 4)

        command = [
            program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={self._profile.name}", "about:blank",
        ]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=place, close_fds=False, **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self._ids, self._events, self._rest = itertools.count(1), [], b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)
        self._out.close()
        self._in.close()
        self._profile.cleanup()

    def view(self, page: Path, width: int, theme: str, *, opened: bool = False) -> View:
        """Show a file.

        Args:
            page: The file.
            width: Of the screen, px.
            theme: ``light`` or ``dark``.
            opened: Whether to open everything that can be opened.
        """
        watchdog = threading.Timer(60, self._process.kill)
        watchdog.start()
        try:
            return self._view(page.absolute().as_uri(), width, theme, opened)
        finally:
            watchdog.cancel()

    def _view(self, url: str, width: int, theme: str, opened: bool) -> View:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self._events.clear()
        self._call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        if opened:
            self._evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = self._evaluate(_MEASURE)
        size = {"width": width, "height": min(8000, found.pop("height")), "x": 0, "y": 0, "scale": 1}
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=size)
        asked = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return View(
            **found,
            console=[json.dumps(event["params"]) for event in self._events if event["method"] in kinds],
            requests=[address for address in asked if address != url],
            picture=base64.b64decode(shot["data"]),
        )

    def _evaluate(self, script: str):
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def _call(self, method: str, **params):
        message = {"id": next(self._ids), "method": method, "params": params}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != message["id"]:
            self._events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            chunk = self._in.read1(1 << 16)
            assert chunk, "the browser ended"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)
