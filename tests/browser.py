"""A headless Chromium, driven by chromedriver's plain HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LAST = 30.0

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip

# Resolves when the expression is true; looks when the page changes, and now and then for what is
# no change of the page.
_WHEN = """
const [expression, deadline, done] = arguments;
const holds = new Function("return (" + expression + ")");
const end = (value) => { observer.disconnect(); clearInterval(again); clearTimeout(late); done(value); };
const look = () => { const value = holds(); if (value) end(value); };
const observer = new MutationObserver(look);
observer.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
const again = setInterval(look, 200), late = setTimeout(() => end(null), deadline);
look();
"""


class Browser:
    """One window of a new browser, with an empty profile."""

    def __init__(self, base: str, profile: Path) -> None:
        self._base = base
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        # A page that stays at its event stream never ends to load.
        wanted = {"goog:chromeOptions": options, "pageLoadStrategy": "eager",
                  "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{made['sessionId']}"
        self._ask("POST", "/timeouts", {"script": int(LAST * 1000)})

    def open(self, url: str) -> None:
        """Go to an address."""
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """Run a script in the page; return what it returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": args})

    def wait(self, expression: str, timeout: float = 20.0) -> Any:
        """Wait until a JavaScript expression is true in the page; return its value."""
        found = self._ask("POST", "/execute/async",
                          {"script": _WHEN, "args": [expression, timeout * 1000]})  # fmt: skip
        assert found, (
            f"never so: {expression}; the page says:\n{self.run('return document.body.innerText')}"
        )
        return found

    def text(self, selector: str) -> str:
        """Return what an element says."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def press(self, *keys: str) -> None:
        """Press keys one after the other, where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Ask Chromium itself, in the words of its DevTools."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """Be a screen of that size and colour scheme."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """Save what the screen shows."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """Return what the console said at levels above info, policy violations among them."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def close(self) -> None:
        """Close the window and end the browser."""
        self._ask("DELETE", "")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=2 * LAST) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a driver and a browser; end both."""
    assert DRIVER is not None
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        made = Browser(f"http://127.0.0.1:{_port(driver)}", folder / "profile")
        try:
            yield made
        finally:
            made.close()
    finally:
        driver.terminate()
        driver.communicate(timeout=LAST)


def _port(driver: subprocess.Popen[bytes]) -> int:
    """Return where the driver listens, once it says so."""
    assert driver.stdout is not None
    said, deadline = b"", time.monotonic() + LAST
    while True:
        found = re.search(rb"started successfully on port (\d+)", said)
        if found:
            return int(found[1])
        assert select.select([driver.stdout], [], [], deadline - time.monotonic())[0], said
        more = os.read(driver.stdout.fileno(), 4096)
        assert more, said
        said += more
