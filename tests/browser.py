"""A page in Debian's chromium, over its debugging protocol."""
import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from websocket import create_connection

HERE = ("http://127.0.0.1", "http://localhost", "ws://127.0.0.1", "ws://localhost", "data:", "blob:", "file:", "about:", "chrome")


def find_chromium() -> str:
    "Its path; it is installed where it is missing and this user may."
    if not shutil.which("chromium") and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "--yes", "--quiet", "chromium"], capture_output=True, timeout=600)
    return shutil.which("chromium") or pytest.skip("no chromium, and it cannot be installed here")


class Browser:
    "A chromium without a window; `open` gives a Page."
    def __init__(self, folder: Path):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0",
                 "--remote-allow-origins=*", "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen([find_chromium(), *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port.exists() and port.read_text().strip()):
            assert time.monotonic() < end and self.process.poll() is None, "chromium did not start"
            time.sleep(.1)
        self.address = f"http://127.0.0.1:{port.read_text().split()[0]}"

    def open(self, url: str, width: int = 1400) -> "Page":
        request = urllib.request.Request(f"{self.address}/json/new?about:blank", method="PUT")
        tab = json.load(urllib.request.urlopen(request, timeout=30))
        return Page(tab["webSocketDebuggerUrl"], url, width)

    def close(self):
        self.process.terminate()
        self.process.wait(30)


class Page:
    """A tab.

    Attributes: requests, the addresses that it asked for; errors, what its console and its scripts complained of.
    """
    def __init__(self, socket: str, url: str, width: int):
        self.socket = create_connection(socket, timeout=120)
        self.number, self.requests, self.errors = 0, [], []
        for domain in ("Page", "Runtime", "Network", "Log"): self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str, what: dict):
        if event == "Network.requestWillBeSent": self.requests.append(what["request"]["url"])
        if event == "Runtime.exceptionThrown": self.errors.append(str(what["exceptionDetails"].get("exception", what))[:500])
        if event == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in what["args"])[:500])
        if event == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")

    def ask(self, script: str):
        "The value of an expression in the page; a promise is waited for."
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 120):
        "Wait until an expression is true."
        end = time.monotonic() + seconds
        while not self.ask(f"!!({script})"):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(.2)

    def click(self, x: float, y: float):
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str):
        number = {"ArrowLeft": 37, "ArrowRight": 39}[name]
        for kind in ("keyDown", "keyUp"): self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=number)

    def resize(self, width: int):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def picture(self, path):
        "Save what the page shows, to be looked at."
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    @property
    def elsewhere(self) -> list:
        "The requests to other hosts."
        return [url for url in self.requests if not url.startswith(HERE)]

    @property
    def broken_images(self) -> list:
        return self.ask("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 200))")
