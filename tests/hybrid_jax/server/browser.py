"""A headless Chromium for tests, driven through chromedriver's WebDriver interface. Knows nothing of the page."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,860"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver names the id of an element
PATIENCE_S = 60.0
ESCAPE, ENTER = "\ue00c", "\ue007"


class Browser:
    """One session: a window with a page in it."""

    def __init__(self, driver_url: str, profile: Path):
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = _call("POST", f"{driver_url}/session", {"capabilities": {"alwaysMatch": asked}})
        self._url = f"{driver_url}/session/{made['sessionId']}"

    def close(self) -> None:
        _call("DELETE", self._url)

    def open(self, url: str) -> None:
        _call("POST", f"{self._url}/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return _call("POST", f"{self._url}/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        _call("POST", f"{self._element(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        _call("POST", f"{self._element(selector)}/click", {})

    def text(self, selector: str) -> str:
        """The text of an element as it is seen."""
        found: str = _call("GET", f"{self._element(selector)}/text")
        return found

    def wait(self, script: str) -> Any:
        """What a script returns once that is true in JavaScript's sense."""
        end_s = time.monotonic() + PATIENCE_S
        while not (value := self.run(script)):
            assert time.monotonic() < end_s, f"not within {PATIENCE_S:g} s: {script}\n{self.run(SEEN)}"
            time.sleep(0.05)
        return value

    def complaints(self) -> list[str]:
        """What the browser's console says since the last call."""
        return [entry["message"] for entry in _call("POST", f"{self._url}/se/log", {"type": "browser"})]

    def look(self, dark: bool, width: int, height: int) -> bytes:
        """A picture (PNG) at that size, in light or dark; the window keeps both."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setEmulatedMedia", {"features": features})
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        return base64.b64decode(_call("GET", f"{self._url}/screenshot"))

    def _devtools(self, command: str, values: dict[str, Any]) -> None:
        _call("POST", f"{self._url}/goog/cdp/execute", {"cmd": command, "params": values})

    def _element(self, selector: str) -> str:
        found = _call("POST", f"{self._url}/element", {"using": "css selector", "value": selector})
        return f"{self._url}/element/{found[ELEMENT]}"


SEEN = "return document.body.innerText"


def _call(method: str, url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
        return json.load(answer)["value"]


@contextmanager
def browse(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile, ended with its driver."""
    assert DRIVER is not None
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_driver(f"http://127.0.0.1:{port}")
        browser = Browser(f"http://127.0.0.1:{port}", folder)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(10)


def _wait_for_driver(url: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            if _call("GET", f"{url}/status")["ready"]:
                return
        except OSError:
            assert time.monotonic() < end_s, "chromedriver does not answer"
        time.sleep(0.1)
