"""Every manifest in examples/ that needs no GPU and no hub, as it is in the repository, run by the installed chart until it is published.

Which these are follows from the manifests (tests.example_jobs): one that is added runs here. The others are named in the output.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.e2e import teacher, test_closed_loop_in_pods
from tests.e2e.kubectl import Kubectl, assert_all_gone, wait_until
from tests.e2e.names import CLAIM, CONFIG_MAP, DATA, ROOT
from tests.e2e.test_whole_way import condition, status_of
from tests.example_jobs import JOBS, LEFT_OUT, RUNNABLE, shown, taught_by

from finetune_operator.manifest import read_manifests
from finetune_trainer.storage import MANIFEST

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1500)]

HERE = [path for path in RUNNABLE if path != test_closed_loop_in_pods.EXAMPLE]
ENDPOINT = ROOT / "examples/objectives/distillation-endpoint.yaml"
PROFILE, UNDER_PROFILE = ROOT / "examples/platform/profile.yaml", ROOT / "examples/platform/job.yaml"
SECONDS = 900
"""Most that an example takes on two cores, with another one beside it."""


@dataclass
class Runs:
    """The examples' jobs. While one is waited for, the next one trains beside it: on two cores that is as much as there is room for."""

    kubectl: Kubectl
    coming: list[Path]
    """Those of this session, in their order."""
    apply: Callable[[Path], None]
    known: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """The status of each that has ended."""

    def status(self, path: Path) -> dict[str, Any]:
        """The status of an example's job when it has ended; its teachers have run before."""
        if path not in self.known:
            for other in taught_by(path):
                self.status(other)
            self._begin(path)
            for other in self._beside(path):
                self._begin(other)
            name = JOBS[path].metadata.name
            self.known[path] = wait_until(f"{shown(path)} ends", lambda: self._ended(name), SECONDS)
        return self.known[path]

    def _beside(self, path: Path) -> list[Path]:
        """The one that trains meanwhile. Where one of them wants several workers, both might wait for places that the other has."""
        following = self.coming[self.coming.index(path) + 1 :][:1] if path in self.coming else []
        alone = [each for each in (path, *following) if JOBS[each].spec.compute.workers.max > 1]
        untaught = [other for each in following for other in taught_by(each) if other not in self.known]
        return [] if alone or untaught else following

    def _begin(self, path: Path) -> None:
        if self.kubectl.find("finetunejob", JOBS[path].metadata.name) is None:
            self.apply(path)

    def _ended(self, name: str) -> dict[str, Any] | None:
        status = status_of(self.kubectl, name)
        return status if status.get("phase") in ("Complete", "Failed") else None


@pytest.fixture(scope="module")
def support_data(kubectl: Kubectl, storage: str) -> Iterator[None]:
    """The data that the examples name. Other tests bring the same, and begin with a storage in which nothing was published."""
    made = kubectl.find("configmap", CONFIG_MAP) is None
    if made:
        kubectl("create", "configmap", CONFIG_MAP, f"--from-file={DATA}")
    yield
    kubectl.python(storage, "import shutil; shutil.rmtree('/storage/out', ignore_errors=True)")
    if made:
        kubectl("delete", "configmap", CONFIG_MAP)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, release: Kubectl, kubectl: Kubectl, support_data: None) -> Runs:
    def apply(path: Path) -> None:
        if path != ENDPOINT:
            kubectl.apply_file(path)
            return
        request.getfixturevalue("endpoint")
        kubectl.apply(teacher.secret("teacher", teacher.KEY), _served(path, kubectl.namespace))

    chosen = [item.callspec.params.get("example") for item in request.session.items if isinstance(item, pytest.Function) and _own(item)]
    return Runs(kubectl, [path for path in chosen if path is not None], apply)


def _own(item: pytest.Function) -> bool:
    return item.path == Path(__file__) and hasattr(item, "callspec")


def _served(path: Path, namespace: str) -> Mapping[str, Any]:
    """The manifest, with the endpoint that there is here."""
    (found,) = copy.deepcopy(read_manifests(path.read_text(encoding="utf-8")))
    given = found["spec"]["objective"]["distillation"]["teacher"]["endpoint"]
    assert given["secretRef"] == {"name": "teacher"}
    given["url"] = teacher.job_spec(namespace, "teacher")["distillation"]["teacher"]["endpoint"]["url"]
    return dict(found)


@pytest.mark.parametrize("example", HERE, ids=lambda path: path.stem)
def test_example_ends_complete_with_its_artifacts_in_the_storage(runs: Runs, kubectl: Kubectl, storage: str, example: Path) -> None:
    job = JOBS[example]
    status = runs.status(example)
    assert (status["phase"], condition(status, "Complete").get("status")) == ("Complete", "True"), status.get("failure")
    assert (status["attempt"]["number"], status["attempt"]["failures"]) == (1, 0)
    assert status["progress"]["step"] == status["progress"]["totalSteps"] > 0
    published = {each["kind"]: each for each in status["artifacts"]}
    assert set(published) == set(job.spec.artifacts)
    for kind, each in published.items():
        assert each["uri"] == f"{job.spec.output.storage}/{kind}"
        found = json.loads(kubectl.python(storage, _LOOK, each["uri"].replace(f"pvc://{CLAIM}", "/storage"), MANIFEST))
        assert (found["digest"], found["bytes"]) == (each["digest"], each["bytes"])
        assert found["weights"] > 0
        assert found["finite"]
    kubectl("delete", "ftj", job.metadata.name)
    assert_all_gone(kubectl, job.metadata.name, 60)


_LOOK = """
import hashlib, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file

folder, manifest = Path(sys.argv[1]), sys.argv[2]
files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path != folder / manifest}
told = {name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for name, path in files.items()}
weights = [tensor for path in files.values() if path.suffix == ".safetensors" for tensor in load_file(path).values()]
print(json.dumps({
    "digest": "sha256:" + hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest(),
    "bytes": sum(each["bytes"] for each in told.values()),
    "weights": sum(tensor.numel() for tensor in weights),
    "finite": all(bool(torch.isfinite(tensor).all()) for tensor in weights),
}))
"""


@pytest.mark.parametrize("example", list(LEFT_OUT), ids=lambda path: path.stem)
def test_example_that_cannot_run_here_is_accepted_and_told(
    release: Kubectl, kubectl: Kubectl, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\nnot run: {shown(example)} {LEFT_OUT[example]}")
    kubectl("apply", "--dry-run=server", "--filename", str(example))


def test_the_platform_s_job_runs_under_the_profile_beside_it(release: Kubectl, kubectl: Kubectl) -> None:
    """Its GPU, image and claims are not here, so it is looked at no further than what it was given."""
    name = JOBS[UNDER_PROFILE].metadata.name
    kubectl.apply_file(PROFILE)
    try:
        kubectl.apply_file(UNDER_PROFILE)
        kept = wait_until("the profile is kept", lambda: status_of(kubectl, name).get("resolved", {}).get("profile"), 60)
        assert (kept["name"], kept["storage"]) == ("one-gpu", f"pvc://models/{name}")
        assert kept["resourcesPerWorker"]["nvidia.com/gpu"] in (1, "1")
        accepted = condition(status_of(kubectl, name), "Accepted")
        assert (accepted["status"], "one-gpu" in accepted["message"]) == ("True", True)
    finally:
        kubectl("delete", "ftj", name, "--ignore-not-found")
        kubectl("delete", "--filename", str(PROFILE))
    assert_all_gone(kubectl, name, 60)
