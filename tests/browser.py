"""A headless Chromium driven over its DevTools protocol, and a server for the pages that it looks at."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/favicon.ico":  # which a browser asks every site for
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Page:
    """One tab. `problems` are console errors, exceptions and failed requests of the page that it shows."""

    def __init__(self, connection: Any, site: str) -> None:
        self.connection, self.site, self.number = connection, site, 0
        self.problems: list[str] = []
        self.requests: dict[str, str] = {}
        self.loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (message := self._receive()).get("id") != self.number:
            pass
        assert "error" not in message, f"{method}: {message['error']}"
        return dict(message["result"])

    def open(self, address: str, settle: float = 0.0) -> None:
        """Open an address of the site and wait until it is there."""
        self.problems, self.loaded = [], False
        self.call("Page.navigate", url=f"{self.site}/{address}")
        deadline = time.monotonic() + 30
        while not self.loaded:
            assert time.monotonic() < deadline, f"{address} did not load"
            self._receive()
        time.sleep(settle)
        self.run("0")

    def run(self, script: str) -> Any:
        """The value of a script in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def width(self, pixels: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=844, deviceScaleFactor=2, mobile=pixels < 600
        )

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.connection.recv())
        told = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if told["type"] == "error":
                self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            case "Network.responseReceived" if told["response"]["status"] >= 400:
                self.problems.append(f"{told['response']['status']} {told['response']['url']}")
        return message


@contextmanager
def browser(site: str) -> Iterator[Page]:
    """A browser that shows a site."""
    import websocket

    assert PROGRAM
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as profile:
        switches = (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
            "disable-component-update disable-dev-shm-usage remote-debugging-port=0 remote-allow-origins=*"
        )
        command = [
            PROGRAM,
            *(f"--{switch}" for switch in switches.split()),
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            found, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + 30
            while not found.exists() or found.read_text().count("\n") < 1:
                assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
                time.sleep(0.05)
            port = found.read_text().split()[0]
            connection = websocket.create_connection(_first_tab(port), timeout=30)
            yield Page(connection, site)
            connection.close()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _first_tab(port: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
        tabs = json.load(answer)
    return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
