"""What a pod is told, and what it makes of it: the job, Ray's command lines, the exit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.builders import SETTINGS, make_job

from finetune_api.endpoint_bounds import EndpointBounds
from finetune_api.reasons import Reason
from finetune_api.report import TERMINATION_MESSAGE_BYTES, Report, parse_report
from finetune_api.resolved_profile import ResolvedAllowed, ResolvedProfile
from finetune_api.scrub import scrub
from finetune_api.status import Artifact, Attempt, Failure, Metric, Resolved
from finetune_api.v1alpha1 import Compute
from finetune_operator.plan import desired_objects
from finetune_trainer.environment import Environment, environment_from
from finetune_trainer.errors import JobError
from finetune_trainer.head import write_termination_log
from finetune_trainer.ray_cluster import cpus_of, gpus_of, head_command, quantity, ray_variables, worker_command
from finetune_trainer.sources import Mounts

VARIABLES = {
    "FINETUNE_JOB_FILE": "/etc/finetune/job/job.json",
    "FINETUNE_ATTEMPT": "2",
    "FINETUNE_TOKEN_FILE": "/etc/finetune/token/token",
    "FINETUNE_HEAD_HOST": "bot-2-head.bot-2.team.svc",
    "FINETUNE_RAY_PORT": "6379",
    "FINETUNE_REPORT_PORT": "8000",
    "FINETUNE_VOLUMES": "/mnt/finetune",
    "FINETUNE_TERMINATION_LOG": "/dev/termination-log",
}


def test_the_environment_of_a_pod() -> None:
    environment = environment_from(VARIABLES)
    assert environment.attempt == 2
    assert environment.ray_address == "bot-2-head.bot-2.team.svc:6379"
    assert environment.report_url == "http://bot-2-head.bot-2.team.svc:8000"
    assert environment.volumes == Path("/mnt/finetune")
    assert not environment.local
    assert "token" not in repr(environment).replace("token_file", "").replace("/etc/finetune/token/token", "")


@pytest.mark.parametrize("name", ["FINETUNE_JOB_FILE", "FINETUNE_TOKEN_FILE", "FINETUNE_HEAD_HOST"])
def test_what_is_not_set_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not set"):
        environment_from({key: value for key, value in VARIABLES.items() if key != name})


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="FINETUNE_ATTEMPT must be a whole number, not 'two'"):
        environment_from(VARIABLES | {"FINETUNE_ATTEMPT": "two"})


def with_job(tmp_path: Path, text: str) -> Environment:
    (tmp_path / "job.json").write_text(text)
    return environment_from(VARIABLES | {"FINETUNE_JOB_FILE": str(tmp_path / "job.json")})


def test_a_job_that_is_wrong_names_the_field(tmp_path: Path) -> None:
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "a"},
        "spec": {"model": {"source": "ftp://a"}},
    }
    with pytest.raises(JobError, match=r"spec\.model\.source") as caught:
        with_job(tmp_path, json.dumps(manifest)).job()
    assert caught.value.reason == Reason.INVALID_SPEC
    assert "spec.model.source: must be hf://owner/name" in caught.value.message
    assert "spec.data: Field required" in caught.value.message


def a_newer_operators(**chosen: Any) -> dict[str, Any]:
    """The job file of an operator whose API has more fields: at the top, in a part, and in the items of a list."""
    job = make_job(training={"epochs": 2}, evaluation={"suites": [{"name": "task", "source": "validation", "metrics": ["loss"]}]})
    made = desired_objects(job, job.status.model_copy(update={"attempt": Attempt(number=1)}), SETTINGS)
    manifest: dict[str, Any] = json.loads(made[0]["data"]["job.json"])
    spec = manifest["spec"]
    spec |= {"priority": 0, "watch": {"often": True}}
    spec["training"]["momentumOfTomorrow"] = 0.5
    spec["evaluation"]["suites"][0]["weight"] = 1
    manifest["metadata"]["chosen"] |= chosen
    return manifest


def test_what_a_newer_operator_fills_in_and_nobody_has_chosen_is_left_out(tmp_path: Path) -> None:
    job = with_job(tmp_path, json.dumps(a_newer_operators())).job()
    assert (job.spec.training.epochs, [suite.name for suite in job.spec.evaluation.suites]) == (2, ["task"])


@pytest.mark.parametrize(
    ("chosen", "field"),
    [
        ({"priority": None}, "spec.priority"),
        ({"watch": {"often": None}}, "spec.watch"),
        ({"training": {"momentumOfTomorrow": None}}, "spec.training.momentumOfTomorrow"),
        ({"evaluation": {"suites": [{"name": None, "weight": None}]}}, "spec.evaluation.suites.0.weight"),
    ],
)
def test_what_was_chosen_and_is_not_known_here_is_refused(tmp_path: Path, chosen: dict[str, Any], field: str) -> None:
    with pytest.raises(JobError, match=field) as refused:
        with_job(tmp_path, json.dumps(a_newer_operators(**chosen))).job()
    assert refused.value.reason == Reason.INVALID_SPEC
    assert refused.value.message.count("Extra inputs") == 1, "the others are left out"


def test_a_wrong_value_beside_an_unknown_field_is_refused(tmp_path: Path) -> None:
    manifest = a_newer_operators()
    manifest["spec"]["training"]["epochs"] = 0
    with pytest.raises(JobError, match=r"spec\.training\.epochs"):
        with_job(tmp_path, json.dumps(manifest)).job()


def test_the_mounts_know_what_the_profile_says_of_secrets(tmp_path: Path) -> None:
    """As the operator writes it; a job without profile, or of an operator of before, has none."""
    allowed = ResolvedAllowed(models=("s3://base",), s3_endpoints=("https://minio.example.com",))
    job = make_job(model={"source": "s3://base/llama", "secretRef": {"name": "s3"}})
    status = job.status.model_copy(update={"attempt": Attempt(number=1)})
    told = status.model_copy(update={"resolved": Resolved(profile=ResolvedProfile(name="small", allow=allowed))})
    files = [desired_objects(job, each, SETTINGS)[0]["data"]["job.json"] for each in (told, status)]
    bounds = EndpointBounds(profile="small", secrets=("s3",), allowed=("https://minio.example.com",))
    assert [with_job(tmp_path, text).mounts() for text in files] == [
        Mounts(Path("/mnt/finetune"), bounds=bounds),
        Mounts(Path("/mnt/finetune")),
    ]
    assert with_job(tmp_path, files[0]).job() == with_job(tmp_path, files[1]).job()


def test_bounds_that_cannot_be_read_are_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="allowed") as refused:
        with_job(tmp_path, '{"metadata": {"endpointBounds": {"profile": "small", "secrets": ["s3"]}}}').mounts()
    assert refused.value.reason == Reason.INVALID_SPEC


def test_a_job_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        with_job(tmp_path, '{"apiVersion"').job()


@pytest.mark.parametrize(("text", "value"), [(2, 2), ("2", 2), ("500m", 0.5), ("1.5", 1.5), ("2k", 2000), ("1Gi", 2**30)])
def test_quantities(text: int | str, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus"),
    [
        ({}, 1, 0),
        ({"cpu": "500m"}, 1, 0),
        ({"cpu": "7500m", "nvidia.com/gpu": 1}, 8, 1),
        ({"amd.com/gpu": "4"}, 4, 4),
        ({"nvidia.com/gpu": 8, "cpu": 96, "memory": "1Ti"}, 96, 8),
    ],
)
def test_what_a_worker_offers(resources: dict[str, Any], cpus: int, gpus: int) -> None:
    compute = Compute(resources_per_worker=resources)
    assert (cpus_of(compute), gpus_of(compute)) == (cpus, gpus)
    command = worker_command(environment_from(VARIABLES), compute, Path("/tmp/worker"))
    assert command[:3] == [str(Path(sys.executable).parent / "ray"), "start", "--block"]
    assert f"--num-cpus={cpus}" in command
    assert f"--num-gpus={gpus}" in command
    assert "--address=bot-2-head.bot-2.team.svc:6379" in command


def test_the_head_takes_no_work_and_has_no_dashboard() -> None:
    command = head_command(environment_from(VARIABLES | {"FINETUNE_LOCAL": "1"}), Path("/tmp/head"))
    for flag in ("--head", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats", "--port=6379"):
        assert flag in command


def test_ray_asks_for_the_token_and_its_file_is_all_that_is_passed() -> None:
    variables = ray_variables(environment_from(VARIABLES))
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_AUTH_TOKEN_PATH"] == "/etc/finetune/token/token"
    assert "RAY_AUTH_TOKEN" not in variables


def test_every_flag_is_one_that_ray_knows() -> None:
    known = subprocess.run(
        [Path(sys.executable).parent / "ray", "start", "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    environment = environment_from(VARIABLES | {"FINETUNE_LOCAL": "1"})
    for command in (head_command(environment, Path("/tmp/head")), worker_command(environment, Compute(), Path("/tmp/worker"))):
        for flag in command[2:]:
            assert flag.partition("=")[0] in known or flag == "--no-monitor"


@pytest.mark.parametrize("character", ["m", "é", "語", "😀", "\x01", '"'])
def test_the_termination_message_fits_and_says_why(tmp_path: Path, character: str) -> None:
    """4096 bytes are all that the kubelet keeps."""
    report = Report(
        job_uid="u" * 36,
        attempt=3,
        outcome="Failed",
        message="m" * 1024,
        metrics=tuple(Metric(name=f"suite-{index}/" + "n" * 100, value=1 / 3, step=index) for index in range(64)),
        artifacts=(Artifact(kind="adapter", uri="s3://" + "b" * 1000, digest="sha256:" + "0" * 64, bytes=1),),
        failure=Failure(stage="Train", reason="DatasetInvalid", message=character * 1000, hint="h" * 200, retryable=False),
    )
    log = tmp_path / "termination-log"
    log.write_text("older and longer " * 1000)
    write_termination_log(log, report)
    assert log.stat().st_size <= TERMINATION_MESSAGE_BYTES
    read = parse_report(log.read_text())
    assert read is not None
    assert (read.outcome, read.attempt) == ("Failed", 3)
    assert read.failure is not None
    assert (read.failure.reason, read.failure.retryable, set(read.failure.message)) == ("DatasetInvalid", False, {scrub(character)})
    assert len(read.failure.message) >= 500


def test_a_wrong_call_is_told_so() -> None:
    for arguments in ([], ["boss"], ["head", "more"]):
        done = subprocess.run(
            [sys.executable, "-m", "finetune_trainer", *arguments], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 2
        assert "usage" in done.stderr
