"""A headless Chromium over its DevTools pipe: what the tests of the page need, and nothing that must be installed."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)
KEYS = {"Tab": 9, "Enter": 13}


def chromium() -> str | None:
    """Where a Chromium is, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browsing(folder: Path) -> Iterator["Browser"]:
    """A browser whose files are in the folder. Skips the test where there is no Chromium."""
    if not chromium():
        pytest.skip("no Chromium is here: install the package chromium to see the page tested in it")
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.close()


class Browser:
    """One tab. `requested` has every address that it asked for, `logged` what went wrong in the page."""

    def __init__(self, folder: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = f'exec "$0" {FLAGS} --user-data-dir="$1" about:blank 3<&{theirs_in} 4>&{theirs_out}'
        with (folder / "chromium.log").open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", command, chromium(), str(folder / "profile")],
                pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in, self._unread = os.fdopen(ours_out, "wb", 0), ours_in, b""
        self._number, self._session = 0, None
        self.requested: list[str] = []
        self.logged: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(self, method: str, **params: object) -> dict:
        """One command of the DevTools protocol -> its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._unread:
            part = os.read(self._in, 2**20)
            assert part, "Chromium has ended: see chromium.log"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.logged.append(params["exceptionDetails"]["exception"]["description"])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["source"] not in ("network", "recommendation"):
            self.logged.append(params["entry"]["text"])  # what the content security policy forbade is among it

    def run(self, expression: str) -> object:
        """JavaScript in the page -> its value."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, attempts: int = 12_000) -> None:
        for _ in range(attempts):
            if self.run(f"Boolean({condition})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"{condition} never was; the page says {self.text('body')[:1000]!r}, {self.logged}")

    def open(self, url: str, ready: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && {ready}")

    def size(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def choose(self, selector: str, *paths: Path) -> None:
        """Files in a file field, as a person's choice."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def click(self, selector: str) -> None:
        """The mouse on the middle of the element, once it is there and no longer moves."""
        element = f"document.querySelector({json.dumps(selector)})"
        middle = f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())"
        self.wait(f"{element} && {element}.checkVisibility()")
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        before = None
        while (place := self.run(middle)) != before:
            before = place
            time.sleep(0.1)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def type(self, selector: str, text: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)
        self.press("Tab")

    def text(self, selector: str) -> str:
        """What can be read there: of what is hidden, nothing."""
        return str(
            self.run(f"(e => e.checkVisibility() ? e.innerText : '')(document.querySelector({json.dumps(selector)}))")
        )

    def screenshot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def open_report(self, path: Path, width: int) -> None:
        """Opens a report in a window so wide: it must not scroll sideways."""
        self.size(width)
        self.open(path.as_uri(), "document.querySelector('h1')")
        assert self.run("document.documentElement.scrollWidth") <= width
