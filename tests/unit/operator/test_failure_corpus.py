"""Ways to fail, from the objects that a cluster has of it to the status: the right class in all, the exact reason in 95 %."""

from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.builders import NAME, SETTINGS, T0, UID, make_job, make_report, raw_pod
from tests.unit.operator.looks import BEGUN, TRAINING

from finetune_api.reasons import ADVICE
from finetune_api.report import termination_message
from finetune_api.status import Status
from finetune_operator.diagnosis import refusal
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, observe
from finetune_trainer.failures import failure_from

CORPUS = Path(__file__).parents[2] / "data/failures"
CASES = {case["name"]: case for file in sorted(CORPUS.glob("*.yaml")) for case in yaml.safe_load(file.read_text(encoding="utf-8"))}
EXACT = 0.95
LATER = T0 + timedelta(seconds=30)


def exception(raised: list[dict[str, str]]) -> BaseException:
    """A chain of errors that look like those of libraries, which need not be imported for it."""

    def made(cause: BaseException | None, one: dict[str, str]) -> BaseException:
        module, _, name = one["type"].rpartition(".")
        base = {"OSError": OSError, "RuntimeError": RuntimeError, "KeyError": KeyError}.get(one["type"], Exception)
        kind = type(name, (base,), {"__module__": module or "builtins", "__qualname__": name, "__str__": lambda _: one["text"]})
        error: BaseException = kind()
        error.__cause__ = cause
        return error

    return reduce(made, reversed(raised), None)


def pod(case: dict[str, Any]) -> dict[str, Any]:
    """The head pod as the API server has it."""
    status = case.get("status", {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]})
    for container in status.get("containerStatuses", ()):
        container |= {"name": "head", "image": SETTINGS.trainer_image, "restartCount": 0, "ready": False, "started": False}
        if "log" in case:
            container["state"]["terminated"]["message"] = case["log"]
        elif "raised" in case:
            said = make_report("Train", outcome="Failed", failure=failure_from(exception(case["raised"]), "Train"))
            container["state"]["terminated"]["message"] = termination_message(said)
    phase = status["phase"]
    return raw_pod(phase=phase, **{key: value for key, value in status.items() if key != "phase"})


def outcome(case: dict[str, Any]) -> tuple[str, str, Status]:
    """Class, reason and status of a job that this happens to."""
    job = make_job(status=TRAINING if case.get("status", {}).get("phase") != "Pending" else BEGUN)
    if "refusal" in case:
        observed = Observed(refusal=refusal(case["refusal"]))
        after = advance(make_job(status=BEGUN), observed, SETTINGS, LATER)
    else:
        raw = pod(case)
        events = [{"metadata": {}, "involvedObject": {"uid": raw["metadata"]["uid"]}, **event} for event in case.get("events", ())]
        observed = observe(NAME, UID, [raw], [], events)
        after = advance(job, observed, SETTINGS, LATER)
    if after.attempt.preemptions > job.status.attempt.preemptions:
        return "Preemption", str(after.attempt.end_reason), after
    if after.failure:
        return ("Retryable" if after.failure.retryable else "Final"), after.failure.reason, after
    ready = after.condition("Reconciling")
    assert ready is not None
    return "Waiting", ready.reason, after


def test_at_least_thirty_ways_to_fail_have_their_class_and_nearly_all_their_exact_reason() -> None:
    found = {name: outcome(case)[:2] for name, case in CASES.items()}
    wrong_class = [name for name, case in CASES.items() if found[name][0] != case["expect"]["class"]]
    wrong_reason = [f"{name}: {found[name][1]}" for name, case in CASES.items() if found[name][1] != case["expect"]["reason"]]
    print(f"{len(CASES)} ways to fail: right class in {len(CASES) - len(wrong_class)}, exact reason in {len(CASES) - len(wrong_reason)}")
    assert len(CASES) >= 30
    assert wrong_class == []
    assert len(wrong_reason) <= (1 - EXACT) * len(CASES), wrong_reason


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whoever_reads_the_status_knows_what_and_what_to_do(case: dict[str, Any]) -> None:
    kind, reason, after = outcome(case)
    assert (kind, reason) == (case["expect"]["class"], case["expect"]["reason"])
    assert reason in ADVICE
    assert after.message
    if after.failure is None:
        return
    assert (after.failure.pod, after.failure.hint is not None) == (f"{NAME}-1-head", True)
    ended = next((each["state"]["terminated"] for each in case.get("status", {}).get("containerStatuses", ())), None)
    assert after.failure.exit_code == (ended["exitCode"] if ended else 1 if "raised" in case else None)
    if "log" in case:
        assert after.failure.log is not None
        assert case["log"].strip().splitlines()[-1] in after.failure.log


def test_every_reason_that_is_found_so_is_in_the_corpus() -> None:
    """Reasons that only the trainer gives, or a limit of the spec, are tested where they are given."""
    assert len({case["expect"]["reason"] for case in CASES.values()}) >= 25
