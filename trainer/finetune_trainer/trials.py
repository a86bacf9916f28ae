"""The trials of a search, in the job's folder of output.storage: what is known of them survives whoever runs them.

    trials/<number>/trial.json     values, state, value; written when the trial begins, at every validation and when it ends
                    ...            what the loop leaves for the trial's job, until the trial has ended

A trial that runs no more and has not ended is run again under its number, with its values: it goes on from its last checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from finetune_trainer.search_space import Values
from finetune_trainer.storage import Storage

FOLDER = "trials"
RECORD = "trial.json"
TrialState = Literal["Running", "Completed", "Pruned", "Failed"]
STATES: tuple[TrialState, ...] = ("Running", "Completed", "Pruned", "Failed")


@dataclass(frozen=True)
class Trial:
    """One point of the space, and what came of it."""

    number: int
    """From 1."""
    values: Values
    state: TrialState = "Running"
    value: float | None = None
    """The goal's metric, of a trial that was completed."""
    reason: str = ""
    """Why it failed: a reason of the closed set."""
    message: str = ""
    course: tuple[tuple[float, float], ...] = ()
    """Validation losses on the way: share of the trial's steps, loss."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will be known of it."""
        return self.state != "Running"


def best_of(trials: Sequence[Trial], mode: str) -> Trial | None:
    """The completed trial with the best value, the first of several; None where there is none."""
    completed = [trial for trial in trials if trial.state == "Completed" and trial.value is not None]
    sign = 1.0 if mode == "min" else -1.0
    return min(completed, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)


class Trials:
    """The trials of one search, by number. `search` is what the values and figures follow from: trials of another are not read."""

    def __init__(self, own: Storage, search: str) -> None:
        self._storage, self._search = own.at(FOLDER), search
        found = (self._read(name) for name in self._storage.folders() if name.isdecimal())
        self._trials = {trial.number: trial for trial in found if trial is not None}

    def all(self) -> tuple[Trial, ...]:
        """Every trial that has begun, by number."""
        return tuple(trial for _, trial in sorted(self._trials.items()))

    def keep(self, trial: Trial) -> None:
        """Write down a trial as it is now."""
        before = self._trials.get(trial.number)
        if before is None:
            self._storage.remove(str(trial.number))  # of another search
        self._trials[trial.number] = trial
        self._storage.write_json(f"{trial.number}/{RECORD}", {**asdict(trial), "values": dict(trial.values), "search": self._search})

    def changed(self, number: int, **changes: Any) -> Trial:  # noqa: ANN401 - a trial's fields
        """Write down what is new of a trial."""
        trial = replace(self._trials[number], **changes)
        self.keep(trial)
        return trial

    def folder(self, number: int) -> Storage:
        """A trial's own folder: what output.storage's `.finetune/<uid>` is to the job."""
        return trial_folder_in(self._storage, number)

    def clear(self, number: int) -> None:
        """Remove everything of a trial but what is known of it. Raises JobError (StorageUnavailable)."""
        folder = self.folder(number)
        for name in (*folder.folders(), *folder.files()):
            if name != RECORD:
                folder.remove(name)

    def _read(self, name: str) -> Trial | None:
        return trial_from(self._storage.read_json(f"{name}/{RECORD}"), self._search)


class ReportDesk:
    """Where workers leave their losses for the drivers of their trials: an actor of Ray, one for all of a search."""

    def __init__(self) -> None:
        self._reports: dict[int, list[dict[str, float]]] = {}
        self._ended: set[int] = set()
        self._left: set[int] = set()

    def put(self, number: int, report: dict[str, float]) -> None:
        """Leave a report of a trial."""
        self._reports.setdefault(number, []).append(report)

    def take(self, number: int) -> list[dict[str, float]]:
        """A trial's reports since the last time, in order."""
        return self._reports.pop(number, [])

    def end(self, number: int) -> None:
        """Have a trial's workers leave."""
        self._ended.add(number)

    def ended(self, number: int) -> bool:
        """Whether a trial's workers are to leave."""
        return number in self._ended

    def leave(self, number: int) -> None:
        """Say that a trial's workers have left."""
        self._left.add(number)

    def left(self, number: int) -> bool:
        """Whether a trial's workers have left."""
        return number in self._left


def trial_folder_in(trials: Storage, number: int) -> Storage:
    """A trial's own folder below that of all trials."""
    return trials.at(str(number))


def trial_from(record: Any, search: str) -> Trial | None:  # noqa: ANN401 - any JSON
    """A trial as it was written; None where this is none of this search."""
    if not isinstance(record, Mapping) or record.get("search") != search or record.get("state") not in STATES:
        return None
    try:
        course = tuple((float(share), float(loss)) for share, loss in record["course"])
        value = None if record["value"] is None else float(record["value"])
        return Trial(int(record["number"]), dict(record["values"]), record["state"], value, record["reason"], record["message"], course)
    except (KeyError, TypeError, ValueError):
        return None
