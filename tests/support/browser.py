"""A headless Chromium for tests, driven over the pipe of its DevTools protocol; standard library only.

    with Browser(find_chromium()) as browser:
        page = browser.open(path.as_uri())
        page.click("#button")
        page.evaluate("document.title")
        page.requests  # the address of everything that the page asked for

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

DEADLINE = 60.0  # seconds for anything to happen; a page takes a fraction of one
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-pipe",
    "--window-size=1400,900",
)
# DevTools' names and codes of the keys that are not characters, and the text that they type.
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Space": (32, " "), "Backspace": (8, "")}


def find_chromium() -> str | None:
    """The program that the environment variable CHROME names, else one on the PATH."""
    named = os.environ.get("CHROME")
    if named:
        assert shutil.which(named), f"Expected CHROME to name a program, found {named}: mend or unset it."
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


class Browser:
    """One browser process with a profile of its own, gone when the `with` block ends."""

    def __init__(self, program: str):
        self.program = program

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(prefix="fslora-test-browser-", ignore_cleanup_errors=True)
        # Out of the way of 3 and 4, which the browser reads commands from and answers to.
        theirs_in, self._out = (_move_up(fd) for fd in os.pipe())
        self._in, theirs_out = (_move_up(fd) for fd in os.pipe())
        log = os.path.join(self._profile.name, "stderr")
        self._pid = os.posix_spawn(
            self.program,
            [self.program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT, 0o600),
            ],
            setpgroup=0,  # a group of its own, so that its helpers end with it
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._buffer, self._log = 0, b"", Path(log)
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str, session: str) -> None:
        """Until an event has come, now or before."""
        deadline = time.monotonic() + DEADLINE
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._receive(deadline))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            if not chunk:
                why = "said nothing in time" if not ready else "ended"
                raise RuntimeError(f"{self.program} {why}: {self._log.read_text(errors='replace')[-2000:]}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> "Page":
        """A new page that has loaded `address`; everything from before its first request on is recorded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, address)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        self.events.clear()
        page.call("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired", session)
        return page


class Page:
    """One tab. Clicks and keys go through the browser's input, so they reach what a hand would reach."""

    def __init__(self, browser: Browser, session: str, address: str):
        self.browser, self.session, self.address = browser, session, address

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of an expression; of a promise, what it becomes."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Press the left button on the middle of the first element that matches, where nothing may cover it."""
        place = self.evaluate(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                if (!element) return "no such element";
                element.scrollIntoView({{block: "center", inline: "center"}});
                const box = element.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                const hit = document.elementFromPoint(x, y);
                return element.contains(hit) || element.closest("label")?.contains(hit) ? [x, y] : "covered";
            }})()"""
        )
        assert isinstance(place, list), f"{selector}: {place}"
        at = {"x": place[0], "y": place[1]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key: str) -> None:
        """Press a key of `KEYS` or a character where the focus is."""
        code, text = KEYS.get(key, (ord(key[0].upper()), key))
        names = {"key": " " if key == "Space" else key, "windowsVirtualKeyCode": code}
        if key in KEYS:
            names["code"] = key
        self.call("Input.dispatchKeyEvent", type="keyDown", **names, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def type(self, text: str) -> None:
        for character in text:
            self.press(character)

    def screenshot(self, path: str | os.PathLike, scheme: str = "light", width: int = 1400, height: int = 900) -> None:
        """Write a PNG of the whole page in the colours of a `light` or `dark` scheme."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(picture))

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.evaluate("new Promise((done) => setTimeout(done, 50))")  # what was caused has come when this answers
        return [
            event["params"]
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]

    @property
    def requests(self) -> list[str]:
        """The addresses that the page asked for, its own first."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """What was written to the console, uncaught errors, and what the browser logged (a breach of the policy)."""
        said = [str(event["args"]) for event in self._events("Runtime.consoleAPICalled")]
        thrown = [str(event["exceptionDetails"]) for event in self._events("Runtime.exceptionThrown")]
        return said + thrown + [event["entry"]["text"] for event in self._events("Log.entryAdded")]


def _move_up(fd: int) -> int:
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
