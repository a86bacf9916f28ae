"""Counters by namespace, as Prometheus's own parser reads them."""

from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.metrics import Metrics


def used(metrics: Metrics, uid: str, seconds: float, *, gone: bool = False, namespace: str = "team") -> None:
    meta = {"namespace": namespace, "name": uid, "uid": uid, "labels": {}}
    status = {"usage": {"gpuSeconds": seconds, "trainedTokens": 10 * int(seconds)}}
    metrics.jobs.see({"metadata": meta, "spec": {}, "status": status}, gone=gone)


def totals(metrics: Metrics, name: str = "finetune_namespace_gpu_seconds_total") -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.labels["namespace"]: sample.value for family in families for sample in family.samples if sample.name == name}


def test_what_a_namespace_has_used_does_not_fall_when_a_job_goes() -> None:
    metrics = Metrics("1", depth=lambda: 0, leading=lambda: True)
    used(metrics, "before", 5000)  # used before this process began
    assert totals(metrics) == {"team": 0}
    used(metrics, "before", 5100)
    used(metrics, "new", 0)
    used(metrics, "new", 30)
    used(metrics, "new", 40, gone=True)
    used(metrics, "other", 0, namespace="others")
    used(metrics, "other", 7, namespace="others")
    assert totals(metrics) == {"team": 140, "others": 7}
    assert totals(metrics, "finetune_namespace_trained_tokens_total") == {"team": 1400, "others": 70}
    metrics.jobs.keep(["other"])  # the other one was deleted while nobody watched
    assert totals(metrics) == {"team": 140, "others": 7}
    used(metrics, "new", 40, gone=True)
    assert totals(metrics) == {"team": 140, "others": 7}


def test_only_the_leader_tells_of_namespaces() -> None:
    metrics = Metrics("1", depth=lambda: 0, leading=lambda: False)
    used(metrics, "new", 0)
    used(metrics, "new", 30)
    assert totals(metrics) == {}
