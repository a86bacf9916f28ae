"""A status in words: a line of text for each fact. Pure."""

from collections.abc import Iterator

from finetune_api.figures import figure, gate_in_words, interval
from finetune_api.status import BaselineResult, EvaluationResult, SearchSummary, Status

LOG_LINES = 12
"""Of a failure's log."""


def status_lines(status: Status) -> list[str]:
    """Where a job stands, what it has achieved, and what to do where it failed."""
    return [
        f"{status.phase or 'not seen by an operator yet'}: {status.message or ''}".rstrip(": "),
        f"attempt {status.attempt.number} ({status.attempt.failures} failed, {status.attempt.preemptions} preempted)",
        *(f"{stage.name:10} {stage.state:10} {stage.start_time or ''} {stage.end_time or ''}".rstrip() for stage in status.stages),
        *_achieved(status),
        *_used(status),
        *_measured(status),
        *(f"{artifact.kind}: {artifact.uri} ({artifact.bytes} bytes)" for artifact in status.artifacts),
        *(f"warning: {warning}" for warning in status.warnings),
        *_failed(status),
        *monitoring_lines(status),
    ]


def _achieved(status: Status) -> Iterator[str]:
    if status.model:
        yield f"model: {status.model.parameters} parameters, {status.model.trained_parameters} of them trained"
    if status.data and (counts := _left_out_and_made(status)):
        yield f"data: {status.data.train} examples to train on; {counts}"
    yield from (f"{metric.name}: {metric.value:.6g}" for metric in status.metrics)
    if best := status.checkpoints and status.checkpoints.best:
        yield f"best checkpoint: step {best.step}, {best.metric} {best.value:.6g}"


def _used(status: Status) -> Iterator[str]:
    if plan := status.plan:
        verdict = "" if plan.fits is None else f", {'fits' if plan.fits else 'does not fit'} into {plan.gpu}"
        hours = "" if plan.gpu_hours is None else f", about {plan.gpu_hours:.3g} GPU-hours"
        yield f"plan: {plan.steps} steps, {plan.memory_per_gpu.total / 2**30:.1f} GiB of each GPU{verdict}{hours}"
    if usage := status.usage:
        yield f"used: {usage.gpu_seconds / 3600:.2f} GPU-hours, {usage.trained_tokens} tokens trained on"


def _left_out_and_made(status: Status) -> str:
    data = status.data
    counts = (
        ((data.made, "made"), (data.rejected, "rejected"), (data.duplicates, "duplicates left out"), (data.leaked, "leaked"))
        if data
        else ()
    )
    return ", ".join(f"{count} {what}" for count, what in counts if count)


def _measured(status: Status) -> Iterator[str]:
    yield from (_strategy(entry) for entry in status.baseline)
    if status.search:
        yield from _search(status.search)
    if status.evaluation is None:
        return
    for result in status.evaluation.results:
        yield from _result(result)
    yield from (f"gate {gate_in_words(gate)}" for gate in status.evaluation.gates)
    for found in status.evaluation.health:
        where = f" ({found.suite})" if found.suite else ""
        yield f"{found.name}{where}: {found.verdict}{': ' if found.message else ''}{found.message}"
    if status.evaluation.report:
        yield f"report: {status.evaluation.report}"


def _strategy(entry: BaselineResult) -> str:
    who = f"{entry.prompt} ({entry.model})" if entry.model else entry.prompt
    return f"prompt {who}: {entry.metric} {figure(entry.value)}{interval(entry.low, entry.high)}{', the best' if entry.best else ''}"


def _search(search: SearchSummary) -> Iterator[str]:
    yield f"search: {search.completed} of {search.trials} trials completed, {search.failed} failed, {search.pruned} pruned"
    if search.best:
        values = ", ".join(f"{path} {value}" for path, value in search.best.parameters.items())
        yield f"best trial: {search.best.trial} with {figure(search.best.value)}: {values}"


def _result(result: EvaluationResult) -> Iterator[str]:
    after = f"{figure(result.value)} after{interval(result.low, result.high)}"
    change = result.difference
    changed = f", difference {change.value:+.6g}{interval(change.low, change.high)}" if change else ""
    yield f"{result.metric}: {figure(result.baseline)} before, {after}{changed}"
    for other in result.compared:
        less = f", difference {other.difference.value:+.6g}" if other.difference else ""
        yield f"  {other.other}: {figure(other.value)}{less}"


def _failed(status: Status) -> Iterator[str]:
    """Why the last attempt that failed did: what, where, its last words, and what to change."""
    why = status.failure
    if why is None:
        return
    yield f"failure: {why.reason}: {why.message}"
    code = f"exit code {why.exit_code}" if why.exit_code is not None else ""
    if where := ", ".join(filter(None, (why.stage and f"stage {why.stage}", why.pod and f"pod {why.pod}", code))):
        yield f"where: {where}; {'another attempt may help' if why.retryable else 'another attempt would not help'}"
    if why.log:
        yield "the last lines of its log:"
        yield from (f"  | {line}" for line in why.log.splitlines()[-LOG_LINES:])
    if why.hint:
        yield f"what to do: {why.hint}"
    yield f"more of it: finetune explain {why.reason}"


def monitoring_lines(status: Status) -> Iterator[str]:
    """What the published model does on fresh data, where it is measured again, or why it is not."""
    found, held = status.monitoring, status.condition("Degraded")
    if found is not None:
        yield f"measured again: {found.runs} runs, {found.failed_runs} failed; {found.message}"
    for result in found.results if found else ():
        change = f", difference {result.difference:+.6g}" if result.difference is not None else ""
        verdict = f": {result.verdict}" if result.verdict else ""
        fresh = f"{figure(result.value)}{interval(result.low, result.high)}"
        yield f"fresh {result.metric}{verdict}: {fresh}, released with {figure(result.released)}{change}"
    if held is not None:
        yield f"degraded: {held.status}: {held.reason}: {held.message}"
    if found is not None and found.failure and found.failure.hint:
        yield f"what to do: {found.failure.hint}"
