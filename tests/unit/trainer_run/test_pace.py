"""What the head's /metrics tells of speed: steps, checkpoints, goodput, use of the devices; how many series that is at most."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.promtool import check_metrics

from finetune_api.status import Metric, ModelSummary, Progress, Usage
from finetune_trainer.device import peak_flops
from finetune_trainer.pace import Goodput, Pace, mfu
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.report import ReportCollector, Reporter
from finetune_trainer.training_series import SERIES

SECONDS = "2026-01-01T00:00:00Z"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_goodput_is_the_share_of_time_in_steps_that_count() -> None:
    clock = Clock()
    goodput = Goodput(clock)
    assert goodput.ratio is None
    goodput.take("a", 0, 0, 0.0)
    clock.now += 100
    goodput.take("a", 0, 40, 80.0)
    assert goodput.ratio == pytest.approx(0.8)
    # The group was lost, and the next one goes on from step 30: ten of forty steps, 20 of 80 seconds, were for nothing.
    clock.now += 20
    goodput.take("b", 30, 30, 0.0)
    assert goodput.ratio == pytest.approx(60 / 120)
    clock.now += 80
    goodput.take("b", 30, 70, 80.0)
    assert goodput.ratio == pytest.approx(140 / 200)


def test_a_group_that_took_no_step_costs_only_its_time() -> None:
    clock = Clock()
    goodput = Goodput(clock)
    goodput.take("a", 10, 10, 0.0)
    clock.now += 10
    goodput.take("b", 10, 10, 0.0)
    clock.now += 10
    goodput.take("b", 10, 15, 10.0)
    assert goodput.ratio == pytest.approx(0.5)


def test_use_of_the_devices_by_hand() -> None:
    """A model of 1e9 parameters that are all trained takes 6e9 operations a token; 1e5 tokens a second on two devices of 1e15: 0.3."""
    assert mfu(ModelSummary(parameters=10**9, trained_parameters=10**9), 1e5, 2, 1e15) == pytest.approx(0.3)
    # Frozen weights need no gradient: 4e9 a token, and 2 for each of the adapter's 1e7.
    assert mfu(ModelSummary(parameters=10**9, trained_parameters=10**7), 1e5, 1, 1e15) == pytest.approx(0.402)


@pytest.mark.parametrize(
    ("model", "rate", "processes", "peak"),
    [
        (None, 1.0, 1, 1.0),
        (ModelSummary(parameters=1), None, 1, 1.0),
        (ModelSummary(parameters=1), 1.0, 0, 1.0),
        (ModelSummary(), 1.0, 1, None),
    ],
)
def test_use_of_the_devices_is_not_told_where_it_is_not_known(model: Any, rate: Any, processes: int, peak: Any) -> None:
    assert mfu(model, rate, processes, peak) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
    ],
)
def test_gpus_are_known_by_their_names(name: str, teraflops: float) -> None:
    assert peak_flops(name) == pytest.approx(teraflops * 1e12)
    assert peak_flops("NVIDIA GeForce GT 710") is None


def full_exposition() -> bytes:
    """The exposition of a head that knows everything."""
    reporter = Reporter("uid", 2, clock=lambda: SECONDS)
    collector = ReportCollector(reporter)
    reporter.start_stage("Train", "", workers_wanted=2)
    names = ("train/loss", "validation/loss", "train/learningRate", "train/gradNorm", "validation/other")
    reporter.update(
        progress=Progress(percent=25, step=30, total_steps=120, epoch=0.5, tokens_per_second=1e5, eta_seconds=3, last_update_time=SECONDS),
        metrics=tuple(Metric(name=name, value=1.5) for name in names),
        model=ModelSummary(parameters=10**9, trained_parameters=10**9),
        usage=Usage(gpu_seconds=5, trained_tokens=4096),
    )
    pace = Pace(
        step_seconds=0.5,
        stepping_seconds=15.0,
        checkpoint_seconds=2.0,
        checkpoint_bytes=12_000,
        checkpoint_time=SECONDS,
        memory_peak_bytes=2**30,
        peak_flops=1e15,
    )
    collector.take(WorkerProgress(group="g", processes=2, start_step=0, step=30, total_steps=120, pace=pace))
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)


def test_head_tells_what_the_workers_measured() -> None:
    full = full_exposition()
    found = {sample.name: sample.value for family in text_string_to_metric_families(full.decode()) for sample in family.samples}
    assert found["finetune_training_tokens_total"] == 4096
    assert found["finetune_training_step_duration_seconds"] == 0.5
    assert found["finetune_training_checkpoint_duration_seconds"] == 2
    assert found["finetune_training_checkpoint_size_bytes"] == 12_000
    assert found["finetune_training_checkpoint_last_success_timestamp_seconds"] == 1767225600  # date -d 2026-01-01T00:00:00Z +%s
    assert found["finetune_training_gpu_memory_peak_bytes"] == 2**30
    assert found["finetune_training_mfu_ratio"] == pytest.approx(0.3)
    assert found["finetune_training_goodput_ratio"] == 1


def test_head_has_as_many_series_as_it_says_and_promtool_takes_them() -> None:
    full = full_exposition()
    samples = [sample for family in text_string_to_metric_families(full.decode()) for sample in family.samples]
    assert len(samples) == SERIES
    assert {name for sample in samples for name in sample.labels} == {"stage"}
    assert check_metrics(full) == ""
