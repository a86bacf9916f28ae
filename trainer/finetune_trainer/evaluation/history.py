"""The course of a training's losses, in the job's folder of output.storage: what the report's curves are drawn from.

Rank 0 keeps it, whole, with each checkpoint. It is bounded, and what it holds in the end does not depend on how often the training was
interrupted: which points stay follows from their steps alone, and a training that goes on from a checkpoint forgets what came after it.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.losses import Losses, metric_of
from finetune_trainer.storage import Storage

HISTORY = "history.json"
POINTS_MAX = 1000
"""Of the training, and as many of the validation."""
TRAIN, VALIDATION = "train/loss", "validation/loss"
RECENT, RECENT_LEAST = 10, 10
"""The training loss at a step is the mean of the last tenth of the steps, and of ten at least: one step's is mostly its examples' own."""


@dataclass(frozen=True)
class Point:
    """What was measured after a step."""

    step: int
    """Optimiser steps done; 0 is the untuned model."""
    values: Mapping[str, float]
    """By metric: train/loss, train/learningRate, validation/loss, ...; always finite."""


@dataclass(frozen=True)
class Course:
    """The points in the order of their steps, no step twice."""

    train: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()


class Thinned:
    """Points of growing steps, at most so many: the first, the latest, and those whose step is a multiple of a stride.

    The stride is 1, and doubles whenever there are too many.
    """

    def __init__(self, points: tuple[Point, ...] = (), stride: int = 1, most: int = POINTS_MAX) -> None:
        self.points, self.stride, self._most = list(points), stride, most

    def add(self, point: Point) -> None:
        """One more; in place of the one of its step, where that was measured before."""
        if self.points and point.step <= self.points[-1].step:
            self.points = [point if each.step == point.step else each for each in self.points]
            return
        if len(self.points) > 1 and self.points[-1].step % self.stride:
            self.points.pop()  # it stood there as the latest
        self.points.append(point)
        while len(self.points) > self._most:
            self.stride *= 2
            middle = [each for each in self.points[1:-1] if each.step % self.stride == 0]
            self.points = [self.points[0], *middle, self.points[-1]]

    def forget_after(self, step: int) -> None:
        """Drop the points of later steps."""
        while self.points and self.points[-1].step > step:
            self.points.pop()


class History:
    """Takes down what the workers measure. All may call it; only the one with a storage keeps anything."""

    def __init__(self, storage: Storage | None, step: int = 0) -> None:
        """Go on with what is in the job's folder, from the step that the training goes on from."""
        kept = storage.read_json(HISTORY) if storage is not None else None
        self._storage = storage
        self._train, self._held_out = _series(kept, "train"), _series(kept, "heldOut")
        for series in (self._train, self._held_out):
            series.forget_after(step)

    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of one optimiser step, by metric."""
        self._add(self._train, step, figures)

    def held_out(self, step: int, losses: Losses) -> None:
        """What was measured on examples that are not trained on after so many steps; 0 for the untuned model."""
        self._add(self._held_out, step, {metric_of(name): value for name, value in losses.items()})

    def keep(self) -> None:
        """Write it, before the checkpoint of the same step. It is not worth failing for."""
        if self._storage is None:
            return
        value = {"train": _json_of(self._train), "heldOut": _json_of(self._held_out)}
        with suppress(JobError):
            self._storage.write_json(HISTORY, value)

    def _add(self, series: Thinned, step: int, values: Mapping[str, float]) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if self._storage is not None and finite:
            series.add(Point(step, finite))


def read_history(storage: Storage) -> Course:
    """What the workers have kept in the job's folder; empty where they have not. Raises JobError (StorageUnavailable)."""
    kept = storage.read_json(HISTORY)
    return Course(tuple(_series(kept, "train").points), tuple(_series(kept, "heldOut").points))


def train_loss(course: Course, step: int) -> float | None:
    """The mean training loss of the latest steps (RECENT): neither where it was measured nor saved before has a part in it.

    Before the first step it is what that step began with. None where none is known.
    """
    if step == 0:
        return course.train[0].values.get(TRAIN) if course.train else None
    start = step - max(step // RECENT, RECENT_LEAST)
    losses = [point.values[TRAIN] for point in course.train if start < point.step <= step and TRAIN in point.values]
    return fmean(losses) if losses else None


def gap_at(course: Course, point: Point) -> float | None:
    """The validation loss of a point less the training loss there; None where one of them is not known."""
    train = train_loss(course, point.step)
    return None if train is None or VALIDATION not in point.values else point.values[VALIDATION] - train


def _json_of(series: Thinned) -> dict[str, Any]:
    return {"stride": series.stride, "points": [{"step": point.step, **point.values} for point in series.points]}


def _series(kept: Any, name: str) -> Thinned:  # noqa: ANN401 - any JSON
    """A series as it was written; empty where this is not one."""
    try:
        stride = kept[name]["stride"]
        points = [Point(each["step"], {key: float(value) for key, value in each.items() if key != "step"}) for each in kept[name]["points"]]
    except (TypeError, KeyError, ValueError, AttributeError):
        return Thinned()
    steps = [point.step for point in points]
    whole = all(isinstance(number, int) for number in (stride, *steps)) and steps == sorted(set(steps))
    return Thinned(tuple(points), stride) if whole and stride > 0 else Thinned()
