"""kubectl as the tests use it: what a user would type, with its output."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_api import LABEL_JOB_NAME

POLL_SECONDS = 0.5
KINDS = "pods,configmaps,secrets,services,networkpolicies"
"""Everything that the operator makes for a job."""

Manifest = Mapping[str, Any]


class KubectlError(Exception):
    """kubectl said no; its own words."""


class Kubectl:
    """kubectl in one namespace of the cluster that KUBECONFIG names."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def __call__(self, *arguments: str, stdin: bytes | None = None, timeout: float = 120) -> str:
        """Standard output. Raises KubectlError with standard error where kubectl fails."""
        command = ["kubectl", "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, check=False)
        if done.returncode != 0:
            raise KubectlError(f"{' '.join(command)}: {done.stderr.decode().strip()}")
        return done.stdout.decode()

    def get(self, *what: str) -> dict[str, Any]:
        """An object or a list, as JSON."""
        return dict(json.loads(self("get", *what, "--output", "json")))

    def find(self, *what: str) -> dict[str, Any] | None:
        """An object; None where there is none of this name."""
        text = self("get", *what, "--output", "json", "--ignore-not-found")
        return dict(json.loads(text)) if text else None

    def names(self, kinds: str, selector: str = "") -> list[str]:
        """kind/name of every object of these kinds."""
        return self("get", kinds, "--output", "name", *(["--selector", selector] if selector else [])).split()

    def apply(self, *manifests: Manifest) -> None:
        """`kubectl apply` of objects that a test made."""
        self("apply", "--filename", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}).encode())

    def apply_file(self, path: Path) -> None:
        """`kubectl apply` of a file, as it is."""
        self("apply", "--filename", str(path))

    def python(self, pod: str, program: str, *arguments: str, stdin: bytes | None = None, timeout: float = 300) -> str:
        """Output of a Python program in a running pod."""
        interactive = ["--stdin"] if stdin is not None else []
        return self("exec", *interactive, pod, "--", "python", "-c", program, *arguments, stdin=stdin, timeout=timeout)


def wait_until(what: str, look: Callable[[], Any], seconds: float) -> Any:
    """The first answer of `look` that is true. Raises AssertionError after `seconds`, naming `what` and the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}; last seen: {found!r}")
        time.sleep(POLL_SECONDS)


def left_of(kubectl: Kubectl, job: str) -> list[str]:
    """What exists of a job's objects."""
    return kubectl.names(KINDS, f"{LABEL_JOB_NAME}={job}")


def assert_all_gone(kubectl: Kubectl, job: str, seconds: float) -> None:
    """Nothing of a job is left, or within `seconds` nothing will be."""
    wait_until(f"nothing is left of {job}", lambda: not left_of(kubectl, job), seconds)
