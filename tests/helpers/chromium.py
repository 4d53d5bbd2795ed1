"""A headless Chromium of the system, driven through the DevTools protocol over a pipe: no driver and no package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 120
"""Seconds until an answer counts as missing."""

_ON_3_AND_4 = "import os, sys; [os.dup2(int(sys.argv[n]), n + 2) for n in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"


def find_chromium():
    """The browser's program, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Talks to a Chromium: it reads commands on its descriptor 3, and writes answers and events on 4."""

    def __init__(self, profile):
        to_browser, self._commands = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe())
        self._answers, from_browser = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe())
        command = [sys.executable, "-c", _ON_3_AND_4, str(to_browser), str(from_browser), find_chromium(), *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (to_browser, from_browser):
            os.close(end)
        self._read, self._number, self.events = b"", 0, []

    def _next(self, deadline):
        while b"\0" not in self._read:
            if not select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._answers, 2**20)
            if not part:
                raise EOFError(f"Chromium has ended with {self._process.wait()}")
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **parameters):
        """The result of a command; the events before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event):
        """Until an event has come."""
        deadline = time.monotonic() + PATIENCE
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._next(deadline))

    def close(self):
        self.call("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._answers)


@contextmanager
def browsing(profile):
    """A browser with a new, empty profile."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


class Tab:
    """One page in a browser."""

    def __init__(self, browser, width=1200, height=900, scheme="light"):
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def open(self, path):
        """Load a file and whatever it asks for."""
        self._browser.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self._browser.wait_for("Page.loadEventFired")
        return self

    def evaluate(self, expression):
        """The value of a JavaScript expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def requests(self):
        """The addresses that were asked for since the page was opened."""
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self):
        """Messages on the console, and exceptions, since the page was opened."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self._browser.events if event.get("method") in kinds]

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self):
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])
