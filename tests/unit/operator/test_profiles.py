"""What a profile forbids a job, what it gives to it, and which one a job runs under."""

from dataclasses import replace

import pytest
from tests.builders import SETTINGS, make_job
from tests.unit.operator.profile_cases import raw_profile

from finetune_api.profile import parse_profile
from finetune_api.resolved_profile import ResolvedProfile
from finetune_api.status import Attempt, Resolved, Status
from finetune_operator.profiles import (
    choose,
    effective,
    endpoint_bounds,
    merged,
    monitoring_violations,
    offered,
    problem_of,
    snapshot,
    violations,
)

NAMED = {"profileRef": {"name": "small"}}


def spec_of(**spec):
    """The spec of a job that names the profile small."""
    job = make_job(**{**NAMED, **spec})
    assert job.spec is not None, job.problem
    return job.spec


def kept_of(spec, raw):
    """What the job team-a/bot keeps of a profile."""
    return snapshot(parse_profile(raw), "named by the job", spec, "team-a", "bot")


def found(spec, **profile):
    """What a profile has against a spec."""
    raw = raw_profile(**profile)
    return violations(spec, {}, kept_of(spec, raw), parse_profile(raw))


GPU = {"workers": {"min": 1, "max": 4}, "resourcesPerWorker": {"nvidia.com/gpu": 2}}
SUITE = {"name": "task", "source": "s3://private/suite.jsonl", "metrics": ["exactMatch"]}
JUDGE = {"endpoint": {"url": "https://judge.example.com/v1", "model": "judge"}}
TASKS = {"suites": [{"name": "arc", "lmEval": {"tasks": ["arc_easy", "hellaswag"]}}]}


@pytest.mark.parametrize(
    ("spec", "profile", "words"),
    [
        (
            {"compute": GPU},
            {"limits": {"workers": 3}},
            "spec.compute.workers.max is 4, and the profile small allows at most 3 (limits.workers)",
        ),
        (
            {"compute": GPU},
            {"limits": {"gpus": 7}},
            "spec.compute asks for 8 GPUs (4 workers), and the profile small allows at most 7 (limits.gpus)",
        ),
        (
            {"compute": {**GPU, "resourcesPerWorker": {"nvidia.com/mig-1g.5gb": 1, "amd.com/gpu": 1}}},
            {"limits": {"gpus": 7}},
            "spec.compute asks for 8 GPUs (4 workers), and the profile small allows at most 7 (limits.gpus)",
        ),
        (
            {"activeDeadlineSeconds": 7201},
            {"limits": {"activeDeadlineSeconds": 7200}},
            "spec.activeDeadlineSeconds is 7201, and the profile small allows at most 7200 (limits.activeDeadlineSeconds)",
        ),
        (
            {"maxGpuHours": 10.5},
            {"limits": {"maxGpuHours": 10}},
            "spec.maxGpuHours is 10.5, and the profile small allows at most 10 (limits.maxGpuHours)",
        ),
        ({}, {"allow": {"methods": ["ia3", "full"]}}, "spec.method is lora, and the profile small allows ia3, full (allow.methods)"),
        ({}, {"allow": {"objectives": ["dpo"]}}, "spec.objective is sft, and the profile small allows dpo (allow.objectives)"),
        (
            {"compute": {"nodeSelector": {"pool": "big"}}},
            {"compute": {"nodeSelector": {"pool": "small"}}},
            "spec.compute.nodeSelector has pool=big, and the profile small allows small (compute.nodeSelector)",
        ),
        (
            {"model": {"source": "hf://Qwen-evil/model"}},
            {"allow": {"models": ["hf://Qwen/"]}},
            "spec.model names hf://Qwen-evil/model, which the profile small does not allow (allow.models)",
        ),
        (
            {"model": {"source": "hf://Qwen/model", "revision": "refs/pr/7"}},
            {"allow": {"models": ["hf://Qwen/"]}},
            "spec.model.revision is refs/pr/7: anyone can open a pull request: the profile small allows none",
        ),
        ({}, {"allow": {"data": []}}, "spec.data.train names pvc://data/train.jsonl, which the profile small does not allow (allow.data)"),
        (
            {"evaluation": {"suites": [SUITE]}},
            {"allow": {"data": ["pvc://"]}},
            "spec.evaluation.suites[0] names s3://private/suite.jsonl, which the profile small does not allow (allow.data)",
        ),
        (
            {"evaluation": {"suites": [{**SUITE, "source": "pvc://a/b", "metrics": ["judgeScore"], "judge": JUDGE}]}},
            {"allow": {"endpoints": ["https://judge.example.com/v2"]}},
            "spec.evaluation.suites[0].judge.endpoint names https://judge.example.com/v1, which the profile small does not allow "
            "(allow.endpoints)",
        ),
        (
            {},
            {"allow": {"storage": ["s3://"]}},
            "spec.output names pvc://models/bot, which the profile small does not allow (allow.storage)",
        ),
        (
            {"evaluation": TASKS},
            {"allow": {"lmEvalTasks": ["arc_easy"]}},
            "spec.evaluation.suites[0].lmEval names the task hellaswag, which the profile small does not allow (allow.lmEvalTasks)",
        ),
        (
            {"model": {"source": "hf://org/model", "trustRemoteCode": True}},
            {},
            "spec.model.trustRemoteCode is true, and the profile small does not allow it (allowRemoteCode)",
        ),
    ],
)
def test_a_violation_names_field_limit_and_values(spec, profile, words):
    assert found(spec_of(**spec), **profile) == (words,)


@pytest.mark.parametrize(
    ("spec", "profile"),
    [
        ({"compute": GPU}, {"limits": {"workers": 4, "gpus": 8}}),
        ({"compute": {**GPU, "resourcesPerWorker": {"rdma/hca": 1, "cpu": 8}}}, {"limits": {"gpus": 0}}),
        ({"activeDeadlineSeconds": 7200, "maxGpuHours": 10}, {"limits": {"activeDeadlineSeconds": 7200, "maxGpuHours": 10}}),
        (
            {},
            {"allow": {"methods": ["lora"], "objectives": ["sft"], "models": ["hf://org"], "data": ["pvc://data/"], "storage": ["pvc://"]}},
        ),
        ({"data": {"train": {"configMap": {"name": "a", "key": "b.jsonl"}}}}, {"allow": {"data": []}}),
        ({"evaluation": TASKS}, {}),
        ({"evaluation": TASKS}, {"allow": {"data": ["pvc://"], "lmEvalTasks": ["arc_easy", "hellaswag"]}}),
        ({"model": {"source": "hf://org/model", "trustRemoteCode": True}}, {"allowRemoteCode": True}),
        ({"output": {}}, {"allow": {"storage": []}, "output": {"storage": "pvc://tuned/{name}"}}),
    ],
)
def test_what_keeps_within_the_profile_is_taken(spec, profile):
    assert found(spec_of(**spec), **profile) == ()


def test_tasks_that_fetch_data_of_their_own_do_not_pass_round_the_list_of_data():
    assert len(found(spec_of(evaluation=TASKS), allow={"data": ["pvc://"]})) == 2


def test_gpus_that_the_profile_gives_count():
    spec = spec_of(compute={"workers": {"min": 1, "max": 3}})
    words = found(spec, compute={"resourcesPerWorker": {"nvidia.com/gpu": 1}}, limits={"gpus": 2})
    assert words == ("spec.compute asks for 3 GPUs (3 workers), and the profile small allows at most 2 (limits.gpus)",)


OFFER = {
    "trainerImage": "registry.example/own:1",
    "head": {"cpu": 4},
    "compute": {
        "nodeSelector": {"pool": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "resourcesPerWorker": {"nvidia.com/gpu": 1, "cpu": 8, "memory": "64Gi"},
    },
    "output": {"storage": "s3://tuned/{namespace}/{name}", "secretRef": {"name": "s3"}},
    "limits": {"activeDeadlineSeconds": 3600, "maxGpuHours": 2},
}


def test_a_job_gets_what_it_does_not_name():
    spec = spec_of(output={}, compute={"resourcesPerWorker": {"cpu": 4}, "nodeSelector": {"zone": "a"}})
    run = merged(spec, kept_of(spec, raw_profile(**OFFER)))
    assert run.compute.resources_per_worker == {"nvidia.com/gpu": 1, "cpu": 4, "memory": "64Gi"}
    assert run.compute.node_selector == {"pool": "h100", "zone": "a"}
    assert [each.key for each in run.compute.tolerations] == ["gpu"]
    assert (run.output.storage, run.output.secret_ref.name) == ("s3://tuned/team-a/bot", "s3")
    assert (run.active_deadline_seconds, run.max_gpu_hours) == (3600, 2)
    assert run.profile_ref is None
    assert problem_of(run) == ""


def test_what_the_job_names_stands():
    spec = spec_of(activeDeadlineSeconds=60, maxGpuHours=1)
    run = merged(spec, kept_of(spec, raw_profile(**OFFER)))
    assert (run.output.storage, run.output.secret_ref) == ("pvc://models/bot", None)
    assert (run.active_deadline_seconds, run.max_gpu_hours) == (60, 1)


def test_given_twice_is_given_once():
    spec = spec_of(output={}, compute={"tolerations": [{"key": "gpu", "operator": "Exists"}]})
    kept = kept_of(spec, raw_profile(**OFFER))
    assert merged(merged(spec, kept), kept) == merged(spec, kept)
    assert len(merged(spec, kept).compute.tolerations) == 1


def test_a_snapshot_survives_being_written_and_read():
    kept = kept_of(spec_of(output={}), raw_profile(**OFFER, allow={"models": [], "data": ["pvc://"]}))
    assert ResolvedProfile.model_validate(kept.to_json()) == kept


def test_a_limit_holds_also_where_the_job_raises_its_own_later():
    kept = kept_of(spec_of(activeDeadlineSeconds=60), raw_profile(**OFFER))
    raised = spec_of(activeDeadlineSeconds=999999, maxGpuHours=999)
    assert (merged(raised, kept).active_deadline_seconds, merged(raised, kept).max_gpu_hours) == (3600, 2)


MONITORING = {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "s3://elsewhere/fresh.jsonl"}]}


def test_monitoring_that_is_added_later_keeps_to_the_list_or_is_left_out():
    suites = {"suites": [{**SUITE, "source": "pvc://data/suite.jsonl"}]}
    kept = kept_of(spec_of(evaluation=suites), raw_profile(allow={"data": ["pvc://data"]}))
    added = spec_of(evaluation=suites, monitoring=MONITORING)
    assert merged(added, kept).monitoring is None
    assert monitoring_violations(added, kept) == (
        "spec.monitoring.suites[0] names s3://elsewhere/fresh.jsonl, which the profile small does not allow (allow.data)",
    )
    fitting = {**MONITORING, "suites": [{"name": "task", "source": "pvc://data/fresh.jsonl"}]}
    assert merged(spec_of(evaluation=suites, monitoring=fitting), kept).monitoring is not None


S3 = {"secretRef": {"name": "s3"}}
SERVERS = ["https://minio.example.com:9000"]


def bounds_of(allow, **spec):
    """What the pods of a job under a profile are told of its Secrets: profile, Secrets, servers; None for nothing."""
    kept = kept_of(spec_of(**spec), raw_profile(allow=allow))
    told = endpoint_bounds(merged(spec_of(**spec), kept), Status(resolved=Resolved(profile=kept)))
    return told and (told.profile, told.secrets, told.allowed)


@pytest.mark.parametrize(
    ("listed", "spec"),
    [
        ({"models": ["s3://base"]}, {"model": {"source": "s3://base/llama", **S3}}),
        ({"data": ["s3://rows"]}, {"data": {"train": {"source": "s3://rows/a.jsonl", **S3}}}),
        ({"storage": ["s3://out"]}, {"output": {"storage": "s3://out/bot", **S3}}),
        ({"data": ["s3://rows"]}, {"evaluation": {"suites": [{**SUITE, "source": "s3://rows/suite.jsonl", **S3}]}}),
    ],
)
def test_secrets_of_s3_are_bounded_where_their_uris_are(listed, spec):
    assert bounds_of(listed, **spec) == ("small", ("s3",), ())
    assert bounds_of({**listed, "s3Endpoints": SERVERS}, **spec) == ("small", ("s3",), tuple(SERVERS))
    (bounded,) = listed
    others = {name: ["s3://", "pvc://"] for name in ("models", "data", "storage") if name != bounded}
    assert bounds_of({**others, "s3Endpoints": SERVERS}, **spec) is None, "no list bounds its URI"


def test_secrets_of_hubs_and_endpoints_are_not_bounded():
    judged = {"suites": [{**SUITE, "source": "validation", "metrics": ["judgeScore"], "judge": {"endpoint": {**JUDGE["endpoint"], **S3}}}]}
    model = {"source": "hf://Qwen/Qwen3-8B", **S3}
    assert (
        bounds_of({"models": ["hf://"], "data": ["pvc://"], "endpoints": ["https://judge.example.com"]}, model=model, evaluation=judged)
        is None
    )


def test_the_storage_that_the_profile_gives_is_bounded_too():
    raw = raw_profile(**OFFER, allow={"storage": ["s3://tuned"], "s3Endpoints": SERVERS})
    spec = spec_of(output={})
    kept = kept_of(spec, raw)
    told = endpoint_bounds(merged(spec, kept), Status(resolved=Resolved(profile=kept)))
    assert told is not None
    assert told.secrets == ("s3",)


def test_a_job_without_profile_or_of_an_operator_of_before_runs_as_it_did():
    spec = spec_of(model={"source": "s3://base/llama", **S3})
    kept = kept_of(spec, raw_profile(allow={"models": ["s3://base"]}))
    written = kept.to_json()
    assert written["allow"].pop("s3Endpoints") == []
    before = ResolvedProfile.model_validate(written)
    assert endpoint_bounds(spec, Status(resolved=Resolved(profile=before))) is None
    assert endpoint_bounds(spec, Status()) is None


def test_the_merged_job_keeps_the_rules_of_every_job():
    spec = spec_of(model={"source": "hf://org/model", "quantization": "nf4"}, output={})
    assert "needs a GPU" in problem_of(merged(spec, kept_of(spec, raw_profile())))
    spec = spec_of(output={})
    assert "output.storage must be set" in problem_of(merged(spec, kept_of(spec, raw_profile())))


def test_code_runs_where_job_and_profile_both_say_so():
    trusting, plain = {"source": "hf://org/model", "trustRemoteCode": True}, {"source": "hf://org/model"}
    for model, allowed, runs in (trusting, True, True), (trusting, False, False), (plain, True, False), (plain, False, False):
        spec = spec_of(model=model)
        assert merged(spec, kept_of(spec, raw_profile(allowRemoteCode=allowed))).model.trust_remote_code is runs


def test_a_job_that_began_under_no_profile_never_runs_its_models_code():
    spec = make_job(model={"source": "hf://org/model", "trustRemoteCode": True}).spec
    begun = Status(attempt=Attempt(number=1), resolved=Resolved(trainer_image="a"))
    assert effective(spec, begun).model.trust_remote_code is False
    assert effective(spec, begun, local=True).model.trust_remote_code is True  # the command line has asked for the profile


# Which profile.


def chosen(spec, *profiles, settings=SETTINGS):
    return choose(spec, offered(profiles), settings)


def test_the_named_profile_is_taken_even_beside_a_default():
    assert chosen(spec_of(), raw_profile("other", default=True), raw_profile()).profile.metadata.name == "small"


def test_a_job_that_names_none_gets_the_default():
    choice = chosen(make_job().spec, raw_profile(), raw_profile("usual", default=True))
    assert (choice.profile.metadata.name, choice.how) == ("usual", "the default")


def test_of_several_defaults_the_newest_is_taken_and_that_is_said():
    old, new = raw_profile("b", default=True), raw_profile("c", default=True, created="2026-02-01T00:00:00Z")
    same = raw_profile("a", default=True, created="2026-02-01T00:00:00Z")
    choice = chosen(make_job().spec, old, new, same)
    assert (choice.profile.metadata.name, choice.how) == ("a", "the newest of the default profiles a, c, b")


def test_without_profiles_a_job_runs_as_it_is():
    choice = chosen(make_job().spec)
    assert (choice.profile, choice.problem) == (None, "")


def test_a_platform_may_want_a_profile_of_every_job():
    choice = chosen(make_job().spec, raw_profile(), settings=replace(SETTINGS, require_profile=True))
    assert choice.problem == "a TuningProfile must be named in spec.profileRef.name; the cluster has small"
    usual = chosen(make_job().spec, raw_profile(default=True), settings=replace(SETTINGS, require_profile=True))
    assert usual.profile.metadata.name == "small"


def test_an_absent_profile_is_named_beside_those_that_there_are():
    assert chosen(spec_of()).problem == "there is no TuningProfile small (spec.profileRef.name); the cluster has none"
    names = "p00, p01, p02, p03, p04, p05, p06, p07, p08, p09, ..."
    assert chosen(spec_of(), *(raw_profile(f"p{n:02}") for n in range(11))).problem.endswith(f"the cluster has {names}")


def test_a_profile_that_is_not_understood_is_not_passed_round():
    broken = raw_profile(default=True, quotas={})
    assert "small cannot be understood: spec.quotas: unknown field" in chosen(make_job().spec, broken).problem
    assert "small cannot be understood: spec.quotas: unknown field" in chosen(spec_of(), broken).problem
    assert chosen(make_job().spec, raw_profile(quotas={})).problem == ""  # it is no default, so it means nothing to this job
