"""The command from manifest to exit code, as a process of its own, with a trainer that only looks like one."""

import json
import signal
from pathlib import Path

import pytest


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def conditions(job):
    return {condition["type"]: condition["status"] for condition in job["status"]["conditions"]}


def test_a_job_runs_to_its_end_and_says_where_the_result_is(place):
    code, output = place.run()
    assert code == 0, output
    job = place.stored()
    assert (job["status"]["phase"], job["status"]["attempt"]["number"]) == ("Complete", 1)
    assert conditions(job)["Complete"] == "True"
    assert "PHASE" in output
    assert "Training" in output
    assert "test/loss   3.1000   0.3000" in output
    assert output.count("warning: the data is small") == 1
    assert str(place.folder / ".finetune/claims/disk/out/adapter") in output
    assert place.processes() == []
    assert names(place.folder / ".finetune/configmaps") == ["rows"]
    assert names(place.folder / ".finetune/secrets") == []


def test_pods_are_told_of_this_machine_what_they_need(place):
    place.run()
    head, worker = (json.loads((place.traces / name).read_text()) for name in ("head-1", "worker-1"))
    state = place.folder / ".finetune"
    assert head["FINETUNE_VOLUMES"] == str(state)
    assert head["FINETUNE_HEAD_HOST"] == "127.0.0.1"
    assert head["FINETUNE_LOCAL"] == "1"
    assert head["FINETUNE_RAY_PORT"] == worker["FINETUNE_RAY_PORT"] != "6379"
    assert head["FINETUNE_REPORT_PORT"] not in ("8000", head["FINETUNE_RAY_PORT"])
    assert head["HOME"] == str(state / "pods/demo-1-head/volumes/home")
    assert not Path(head["TMPDIR"]).exists()
    assert not Path(worker["TMPDIR"]).exists()


def test_a_complete_job_is_not_run_again_unless_asked(place):
    place.run()
    code, output = place.run()
    assert code == 0
    assert "complete already" in output
    assert "test/loss" in output
    first = place.stored()["metadata"]["uid"]
    code, output = place.run("--fresh")
    assert code == 0, output
    assert place.stored()["metadata"]["uid"] != first


def test_a_failure_tells_reason_hint_and_the_end_of_the_log(place):
    place.mode = "fail"
    code, output = place.run()
    assert code == 1, output
    for words in (
        "demo failed in Prepare: DatasetInvalid",
        "train.jsonl line 7: no completion",
        "Hint: Correct the row.",
        "row 7 is broken",
    ):
        assert words in output
    assert str(place.folder / ".finetune/logs/demo-1-head.log") in output
    assert conditions(place.stored())["Failed"] == "True"
    assert place.processes() == []


def test_a_failed_job_begins_anew_once_its_cause_is_mended(place):
    place.mode = "fail"
    place.run()
    place.mode = "complete"
    code, output = place.run()
    assert code == 0, output
    assert place.stored()["status"]["attempt"] == {**place.stored()["status"]["attempt"], "number": 1, "failures": 0}


def test_ctrl_c_suspends_and_the_same_command_resumes(place):
    place.mode = "interrupt"
    run = place.start()
    place.wait_for("worker-1")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 130, output
    assert "suspending" in output
    assert "demo is suspended; the same command goes on from the last checkpoint" in output
    assert "spec.suspend" not in output, "a cluster's advice"
    job = place.stored()
    assert (job["spec"]["suspend"], job["status"]["phase"]) == (True, "Suspended")
    assert (place.traces / "checkpoint").exists()
    assert place.processes() == []
    code, output = place.run()
    assert code == 0, output
    job = place.stored()
    assert (job["spec"]["suspend"], job["status"]["phase"]) == (False, "Complete")
    attempt = job["status"]["attempt"]
    assert (attempt["number"], attempt["failures"], attempt["preemptions"]) == (2, 0, 0)


def test_a_fresh_run_is_not_gone_on_with_by_the_same_command(place):
    place.mode = "interrupt"
    run = place.start("--fresh")
    place.wait_for("worker-1")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 130, output
    assert "demo is suspended; the same command without --fresh goes on from the last checkpoint" in output


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(place):
    place.mode = "stubborn"
    run = place.start()
    place.wait_for("worker-1")
    run.send_signal(signal.SIGINT)
    place.eventually(lambda: place.stored()["spec"]["suspend"])
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 130, output
    assert place.processes() == []
    place.mode = "complete"
    code, output = place.run()
    assert code == 0, output
    assert place.stored()["status"]["attempt"]["failures"] == 0


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_suspend_as_well(place, number, expected):
    place.mode = "interrupt"
    run = place.start()
    place.wait_for("worker-1")
    run.send_signal(number)
    output, _ = run.communicate(timeout=100)
    assert run.returncode == expected, output
    assert place.stored()["status"]["phase"] == "Suspended"


def test_a_timeout_suspends(place):
    place.mode = "interrupt"
    code, output = place.run("--timeout")
    assert code == 124, output
    assert place.stored()["status"]["phase"] == "Suspended"
    assert place.processes() == []


def test_what_a_killed_run_left_is_ended_and_the_job_goes_on(place):
    place.mode = "interrupt"
    run = place.start()
    place.wait_for("worker-1")
    place.eventually(lambda: place.stored()["status"].get("workersReady") == 1)
    run.kill()
    run.communicate()
    assert place.processes() != []
    code, output = place.run()
    assert code == 0, output
    assert "ended what an earlier run had left: demo-1-head, demo-1-worker-0" in output
    attempt = place.stored()["status"]["attempt"]
    assert (attempt["number"], attempt["failures"], attempt["preemptions"]) == (2, 0, 1)
    assert place.processes() == []


def test_an_outcome_is_not_lost_when_the_run_was_killed(place):
    """The head ends while nobody looks: the next run reads how from the message that it left."""
    place.mode = "interrupt"
    run = place.start()
    place.wait_for("worker-1")
    place.eventually(lambda: place.stored()["status"].get("workersReady") == 1)
    run.kill()
    run.communicate()
    head = next(process for process in place.processes() if "head" in process.cmdline())
    message = place.folder / ".finetune/pods/demo-1-head/termination-log"
    head.terminate()
    head.wait(30)
    said = json.loads(message.read_text())
    message.write_text(json.dumps({**said, "outcome": "Succeeded"}))
    code, output = place.run()
    assert code == 0, output
    assert place.stored()["status"]["attempt"]["number"] == 1
    assert place.processes() == []


def test_two_runs_of_one_job_are_refused(place):
    place.mode = "interrupt"
    run = place.start()
    place.wait_for("worker-1")
    code, output = place.run()
    assert code == 2
    assert f"(process {run.pid}) is running demo" in output
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=100)
    assert run.returncode == 130


def test_a_spec_that_changed_midway_is_refused(place):
    place.mode = "interrupt"
    run = place.start()
    place.wait_for("worker-1")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=100)
    place.manifest.write_text(place.manifest.read_text().replace("lora: {}", "full: {}"))
    code, output = place.run()
    assert code == 2
    assert "spec.method changed since this job began" in output
    assert "--fresh" in output
    place.mode = "complete"
    assert place.run("--fresh")[0] == 0


def test_the_heads_log_can_be_followed(place):
    place.run()
    code, output = place.run("--logs", "--fresh")
    assert code == 0, output
    assert output.splitlines().count("preparing") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kind: FineTuneJob", "kind: Pod", "holds 0 objects of kind FineTuneJob"),
        ("model: {source", "model: {sauce", "line 5: spec.model.sauce: unknown field; did you mean source?"),
        ("disk/model", "disk/absent", "spec.model.source: pvc://disk/absent does not exist"),
        ("  backoffLimit: 1", "  suspend: true", "spec.suspend is true"),
        (
            "model: {source",
            "compute: {resourcesPerWorker: {nvidia.com/gpu: 1}}\n  model: {quantization: nf4, source",
            "spec.model.quantization nf4 needs a GPU, and this machine shows none",
        ),
    ],
)
def test_what_cannot_start_is_told_and_nothing_is_left(place, old, new, words):
    place.manifest.write_text(place.manifest.read_text().replace(old, new))
    code, output = place.run()
    assert code == 2
    assert words in output
    assert "Traceback" not in output
    assert not (place.folder / "demo.status.yaml").exists()
