"""A Prometheus server for tests, and the targets that it scrapes: expositions that stand still."""

import contextlib
import http.server
import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.promtool import tool

READY_SECONDS = 60


@dataclass(frozen=True)
class Prometheus:
    """A server that runs."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer. Fails with the server's words where it is an error."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as response:  # noqa: S310 - http always
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query, as a vector."""
        return list(self.get("query", query=expression)["result"])


@contextlib.contextmanager
def targets(texts: Mapping[str, bytes]) -> Iterator[str]:
    """Serve each text at its path. Yields host and port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(texts[self.path])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def prometheus(folder: Path, port: int, rules: Mapping[str, Any], jobs: list[dict[str, Any]]) -> Iterator[Prometheus]:
    """A server that scrapes these jobs and evaluates these rules every second, ready and with some samples of each target."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump({"global": every, "rule_files": ["rules.yaml"], "scrape_configs": jobs}))
    command = [tool("prometheus"), "--config.file=prometheus.yaml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        try:
            server = Prometheus(f"http://127.0.0.1:{port}")
            _wait(server, process, folder / "log", len(jobs))
            yield server
        finally:
            process.terminate()


def _wait(server: Prometheus, process: subprocess.Popen[bytes], log: Path, count: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, AssertionError):
            if len(server.query("sum_over_time(up[1m]) > 3")) == count:
                return
        time.sleep(0.3)
    raise AssertionError(f"Prometheus has not scraped its targets:\n{log.read_text()}")
