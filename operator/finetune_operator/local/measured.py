"""What was measured, for a terminal: prompts of the untuned model, before and after with intervals, gates, health."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.scrub import scrub
from finetune_api.status import EvaluationResult, Status

VERDICT_STYLES = {"Passed": "green", "Good": "green", "Failed": "red", "Bad": "red", "Inconclusive": "yellow"}
_COLUMN_SPACE = (0, 3, 0, 0)


def measured(status: Status, place: Callable[[str], Path | None]) -> Iterator[RenderableType]:
    """The tables that the status has something for. `place` finds a URI on this machine."""
    evaluation = status.evaluation
    if status.baseline:
        yield Text()
        yield _baselines(status)
    if evaluation is None:
        return
    if evaluation.results:
        yield Text()
        yield comparison(evaluation.results)
    if evaluation.gates or evaluation.health:
        yield Text()
        yield _verdicts(status)
    if evaluation.report:
        yield Text(f"\nreport: {place(evaluation.report) or evaluation.report}")


def comparison(results: tuple[EvaluationResult, ...]) -> Table:
    """The untuned and the tuned model side by side, with the change and its interval where they are known."""
    table = Table(box=None, pad_edge=False, padding=_COLUMN_SPACE)
    table.add_column("")
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    changed = any(result.difference for result in results)
    if changed:
        table.add_column("change", justify="right")
        table.add_column("interval")
    for result in results:
        row: list[str | Text] = [_plain(result.metric), _figure(result.baseline), _figure(result.value)]
        if changed:
            change = result.difference
            row += ["", ""] if change is None else [f"{change.value:+.4f}", _interval(change.low, change.high, "+.4f")]
        table.add_row(*row)
    return table


def _baselines(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, padding=_COLUMN_SPACE)
    for title in ("prompt", "metric"):
        table.add_column(title)
    table.add_column("value", justify="right")
    table.add_column("interval")
    table.add_column("")
    for entry in status.baseline:
        who = f"{entry.prompt} ({entry.model})" if entry.model else entry.prompt
        interval = _interval(entry.low, entry.high, ".4f")
        table.add_row(_plain(who), _plain(entry.metric), _figure(entry.value), interval, Text("best", "bold") if entry.best else "")
    return table


def _verdicts(status: Status) -> Table:
    """The gates with what was seen and what is required, then forgetting and overfitting."""
    table = Table(box=None, pad_edge=False, padding=_COLUMN_SPACE, show_header=False)
    for _ in range(4):
        table.add_column()
    evaluation = status.evaluation
    for gate in evaluation.gates if evaluation else ():
        over = f" than {gate.over}" if gate.over and gate.over not in gate.required else ""
        observed = f"{_figure(gate.observed)} {_interval(gate.low, gate.high, '.4f')}".strip()
        table.add_row(_plain(f"gate {gate.metric}"), _verdict(gate.verdict), observed, _plain(f"required: {gate.required}{over}"))
    for found in evaluation.health if evaluation else ():
        where = f" ({found.suite})" if found.suite else ""
        table.add_row(_plain(f"{found.name}{where}"), _verdict(found.verdict), "", _plain(found.message))
    return table


def _plain(text: str) -> Text:
    """A text of the trainer's as it is: a str in a table is markup, and broken markup an error."""
    return Text(scrub(text))


def _verdict(word: str) -> Text:
    return Text(word, VERDICT_STYLES[word])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"({low:{form}} to {high:{form}})"
