"""A Hub on this machine: serves one repository from a folder, or fails in one of several ways."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"

FAILURES = {
    "missing": (401, "RepoNotFound"),  # what the Hub answers without a login
    "not found": (404, "RepoNotFound"),
    "no revision": (404, "RevisionNotFound"),
    "forbidden": (403, "GatedRepo"),
    "broken": (500, ""),
    "busy": (429, ""),
}


class FakeHub(ThreadingHTTPServer):
    """Serves `some/one`; `mode` may change at any time."""

    daemon_threads = True

    def __init__(self, folder: Path, mode: str = "ok") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.mode = folder, mode
        self.requests: list[str] = []
        self.license: str | None = "apache-2.0"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients hang up."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, mode = self.path.split("?")[0], self.server.mode
        self.server.requests.append(f"{self.command} {path}")
        listing = path.startswith("/api/models/some/one")
        if mode == "hang":
            time.sleep(60)
            return
        if mode == "gated" and not listing:
            mode = "forbidden"
        if mode in FAILURES:
            code, name = FAILURES[mode]
            self._send(code, b"{}", body, {"X-Error-Code": name, "X-Error-Message": name})
            return
        files = sorted(p for p in self.server.folder.rglob("*") if p.is_file())
        if listing and "/tree/" in path:
            found: Any = [
                {"type": "file", "path": self._name(f), "size": f.stat().st_size, "oid": _etag(f)}
                for f in files
            ]
            self._send(200, json.dumps(found).encode(), body)
        elif listing:
            siblings = [
                {"rfilename": self._name(f), "size": f.stat().st_size, "blobId": _etag(f)} for f in files
            ]
            about = {"id": "some/one", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            about["cardData"] = {"license": self.server.license} if self.server.license else {}
            self._send(200, json.dumps(about).encode(), body)
        else:
            file = self.server.folder / "/".join(path.split("/")[5:])
            if not path.startswith("/some/one/resolve/") or not file.is_file():
                self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                return
            data = file.read_bytes()
            headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT}
            self._send(200, data, body, headers, cut=mode == "cut" and len(data) > 2000)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.server.folder).as_posix()

    def _send(
        self, code: int, data: bytes, body: bool, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut and body:
            self.close_connection = True


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def fake_hub(folder: Path, mode: str = "ok") -> Iterator[FakeHub]:
    """A running Hub."""
    hub = FakeHub(folder, mode)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def python(
    code: str, environment: dict[str, str], *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, since huggingface_hub reads the environment on import."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(
    arguments: list[object], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run `inlaid ARGUMENTS...` in a process of its own."""
    words = [sys.executable, "-m", "inlaid", *map(str, arguments)]
    return subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
