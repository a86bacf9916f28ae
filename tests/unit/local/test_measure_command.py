"""`finetune measure`: one measuring run on demand, with a trainer that only looks like one."""

import json

SUITES = "  evaluation: {suites: [{name: task, source: validation, metrics: [f1]}]}\n"
PLAN = "  monitoring: {schedule: 0 3 * * *, suites: [{name: task, source: pvc://disk/fresh.jsonl}]}\n"
OUTPUT = "  output: {storage: pvc://disk/out}\n"


def write(place, *, plan: str = PLAN) -> None:
    text = place.manifest.read_text().replace(SUITES, "").replace(PLAN, "")
    place.manifest.write_text(text.replace(OUTPUT, f"{OUTPUT}{SUITES}{plan}"))


def test_what_was_published_is_measured_on_demand(place):
    write(place)
    code, output = place.run()
    assert code == 0, output
    published = place.stored()["status"]
    code, output = place.run("--measure", "--logs")
    assert code == 0, output
    status = place.stored()["status"]
    assert (status["phase"], status["attempt"], status["artifacts"]) == ("Complete", published["attempt"], published["artifacts"])
    assert status["monitoring"]["runs"] == 1
    assert "fresh task/f1: Held: 0.8 (0.7 to 0.9), released with 0.75, difference +0.05" in output
    assert "preparing" in output
    assert json.loads((place.traces / "head-2").read_text())["FINETUNE_ATTEMPT"] == "2"
    assert not (place.traces / "worker-2").exists()
    assert place.processes() == []
    # The next one is worse, and that ends otherwise.
    place.mode = "degraded"
    code, output = place.run("--measure")
    assert code == 1, output
    assert "degraded: True: Degraded: task/f1: 0.3 (0.2 to 0.4), released with 0.75" in output
    assert place.stored()["status"]["monitoring"]["runs"] == 2


def test_monitoring_that_changes_is_no_reason_to_train_again(place):
    write(place, plan="")
    place.run()
    uid = place.stored()["metadata"]["uid"]
    code, output = place.run("--measure")
    assert code == 2
    assert "spec.monitoring is not set" in output
    write(place)
    code, output = place.run()
    assert code == 0, output
    assert "complete already" in output
    code, output = place.run("--measure")
    assert code == 0, output
    assert place.stored()["metadata"]["uid"] == uid


def test_what_has_not_run_cannot_be_measured(place):
    write(place)
    code, output = place.run("--measure")
    assert code == 2
    assert "has published nothing here" in output
