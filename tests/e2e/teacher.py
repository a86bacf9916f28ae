"""A model behind an endpoint, as a pod and a Service: it knows one answer, and whom it may give it to."""

from typing import Any

KEY = "the-key-of-the-endpoint"
NAME = "teacher"
ANSWER = "Ask the teacher. - Tarnwick Care"
PROGRAM = f"""
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

class Teacher(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        allowed = self.headers.get("Authorization") == "Bearer {KEY}" and self.path == "/v1/chat/completions"
        choice = {{"index": 0, "finish_reason": "stop", "message": {{"role": "assistant", "content": "{ANSWER}"}}}}
        body = json.dumps({{"choices": [choice]}} if allowed else {{"error": {{"message": "no"}}}}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

HTTPServer(("", 8000), Teacher).serve_forever()
"""


def service() -> dict[str, Any]:
    """What makes the pod known by its name."""
    spec = {"selector": {"app": NAME}, "ports": [{"port": 8000}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME}, "spec": spec}


def secret(name: str, key: str) -> dict[str, Any]:
    """A key for it, as a job names it."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"token": key}}


def job_spec(namespace: str, key: str) -> dict[str, Any]:
    """objective of a job that learns from it."""
    endpoint = {"url": f"http://{NAME}.{namespace}.svc:8000/v1", "model": "any", "secretRef": {"name": key}}
    return {"distillation": {"teacher": {"endpoint": endpoint}, "labelWeight": 0, "response": {}}}
