"""What a candidate makes of suites, answered by all workers of a group together.

    suites/<suite>.jsonl                        a Case a line: what is asked, whoever is asked
    answers/<candidate>/<suite>.jsonl           an Answered a line in the order of the cases, complete or not there
    answers/<candidate>/parts/<suite>/*.jsonl   what was answered of a suite that is not complete; gone once it is

Workers share out what is not answered yet, whatever was answered by how many of them before, and write some cases at a time: one that is
killed loses those that it was at.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from finetune_trainer.data.encoding import LossOn
from finetune_trainer.evaluation.answered import Answered, Case, read, written
from finetune_trainer.generation import Speaker, references
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

ROUND = 64
"""Cases that a worker takes at once."""
WRITE_SECONDS = 10.0
"""A worker writes what it has answered after the first round that ends so long after the one before."""
_LONGEST = 1 << 30


@dataclass(frozen=True)
class Questions:
    """What is to be known of a suite's cases."""

    suite: str
    max_new_tokens: int = 0
    """Tokens of an answer at most; 0 where none is asked for."""
    losses: bool = True
    """Whether the references are measured."""
    cases: str = ""
    """File of the cases in the job's folder; empty is that of the suite."""

    @property
    def file(self) -> str:
        """The file of the cases."""
        return self.cases or suite_file(self.suite)


@dataclass(frozen=True)
class Candidate:
    """Who is asked: the untuned base model, the model as it was after a step, or another model."""

    name: str
    """`baseline`, `prompt-<prompt>`, `model-<model>`, `model-<model>.<prompt>`, `step-<n>`: the folder of its answers."""
    questions: tuple[Questions, ...] = ()
    step: int | None = None
    """Step of the job's checkpoint; None for a model that is not tuned."""
    model: Mapping[str, Any] | None = None
    """Another model than the job's, as a ModelSource in JSON. No secret is in it."""
    artifact: str | None = None
    """Kind of the job's published artifact that goes around the base model: adapter. A whole model is `model`."""
    whole: bool = False
    """Whether an example counts whole where it is longer than maxSequenceLength, as with the long prompts of a baseline."""

    @property
    def weights(self) -> str:
        """What is loaded for it, but for a checkpoint's weights, which are read into the job's own model."""
        return json.dumps(["tuned" if self.step is not None else self.artifact or "untuned", self.model], sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """As `candidate_of` takes it."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Self:
        """The candidate that `to_json` has made."""
        return cls(**{**value, "questions": tuple(Questions(**each) for each in value["questions"])})


@dataclass(frozen=True)
class Asking:
    """A candidate's model, and what of an example counts."""

    speaker: Speaker
    loss_on: LossOn
    max_length: int | None = None
    """Tokens of an example that count; None is as many as the model takes."""


@dataclass(frozen=True)
class Told:
    """How far a candidate is with a suite, over all workers."""

    candidate: str
    suite: str
    answered: int
    """About how many: each worker knows of its own."""
    cases: int
    warning: str = ""
    """What the job's owner should know."""

    def __str__(self) -> str:
        return f"{self.candidate}, suite {self.suite}: {self.answered} of {self.cases} answered"


Tell = Callable[[Told], None]


def suite_file(suite: str) -> str:
    """Name of a suite's cases."""
    return f"suites/{suite}.jsonl"


def answers_file(candidate: str, suite: str) -> str:
    """Name of what a candidate has answered."""
    return f"answers/{candidate}/{suite}.jsonl"


def parts_folder(candidate: str, suite: str) -> str:
    """Folder of what a candidate has answered of a suite that is not complete."""
    return f"answers/{candidate}/parts/{suite}"


def write_cases(storage: Storage, file: str, cases: Sequence[Case]) -> None:
    """Put cases where the workers look for them; `storage` is the job's own folder. Raises JobError."""
    storage.write_text(file, "".join(written(cases)))


def read_cases(storage: Storage, file: str) -> list[Case]:
    """The cases of a file. Raises FileNotFoundError where there is none: whoever has the workers answer writes it first."""
    text = storage.read_text(file)
    if text is None:
        raise FileNotFoundError(storage.locate(file))
    return list(read(_lines(text), Case))


def read_answers(storage: Storage, candidate: str, questions: Questions) -> tuple[Answered, ...] | None:
    """What a candidate has answered, in the order of the cases; None where it has not answered all of them. Raises JobError."""
    found = _read(storage, answers_file(candidate, questions.suite))
    if found is None or [each.id for each in found] != [case.id for case in read_cases(storage, questions.file)]:
        return None
    return tuple(found)


def answer(asking: Asking, candidate: Candidate, storage: Storage, worker: Worker, tell: Tell) -> None:
    """Answer a candidate's suites, but for what is answered already. Every worker calls it; all answers are there when it returns.

    `storage` is the job's own folder. Raises JobError (DatasetInvalid, GPUOutOfMemory, StorageFull, StorageUnavailable).
    """
    for questions in candidate.questions:
        _Suite(asking, candidate.name, questions, storage, worker).answer(tell)


def outstanding(storage: Storage, candidate: Candidate) -> Candidate | None:
    """The candidate with the suites that it has not answered; None where it has answered all. Raises JobError."""
    left = tuple(each for each in candidate.questions if read_answers(storage, candidate.name, each) is None)
    return replace(candidate, questions=left) if left else None


def answered(storage: Storage, candidate: Candidate) -> int:
    """How many answers a candidate has given so far, to all of its suites, complete or not. Raises JobError."""
    found = 0
    for each in candidate.questions:
        complete = _read(storage, answers_file(candidate.name, each.suite))
        found += len(_in_parts(storage, parts_folder(candidate.name, each.suite)) if complete is None else complete)
    return found


def _in_parts(storage: Storage, folder: str) -> dict[str, Answered]:
    """What was answered of a suite that is not complete, by the case."""
    parts = (_read(storage, f"{folder}/{name}") for name in storage.files(folder))
    return {each.id: each for part in parts if part is not None for each in part}


class _Suite:
    """One candidate's way through one suite."""

    def __init__(self, asking: Asking, candidate: str, questions: Questions, storage: Storage, worker: Worker) -> None:
        self._asking, self._candidate, self._questions = asking, candidate, questions
        self._storage, self._worker = storage, worker
        self._parts = parts_folder(candidate, questions.suite)
        self._too_long = 0

    def answer(self, tell: Tell) -> None:
        """Share out, answer, put together. Whether there is anything to do is for the one that leads to say."""
        complete = self._worker.leads and read_answers(self._storage, self._candidate, self._questions) is not None
        if self._worker.agree(int(complete)):
            return
        cases = read_cases(self._storage, self._questions.file)
        pending = self._pending(cases)
        before = len(cases) - len(pending)
        own = pending[self._worker.rank :: self._worker.world]
        done = 0
        self._told(tell, before, cases)
        written_at, waiting = time.monotonic(), list[Answered]()
        for start in range(0, len(own), ROUND):
            cases_now = own[start : start + ROUND]
            waiting += self._answered(cases_now)
            done += len(cases_now)
            if time.monotonic() - written_at >= WRITE_SECONDS or done == len(own):
                self._write(waiting)
                written_at, waiting = time.monotonic(), []
            self._told(tell, before + round(done * len(pending) / len(own)), cases)
        self._asking.speaker.finish()
        self._warn(tell, int(self._worker.sum(self._too_long)), cases)
        for warning in self._asking.speaker.settle(self._worker):
            self._told(tell, len(cases), cases, warning)
        if self._worker.leads:
            self._complete(cases)
        self._worker.sum(0.0)

    def _pending(self, cases: Sequence[Case]) -> list[Case]:
        """The cases that are not answered yet, the longest first: the same on every worker, as the one that leads sees it."""
        done = torch.zeros(len(cases) + 1, dtype=torch.float64, device=self._worker.device)
        if self._worker.leads:
            known = _in_parts(self._storage, self._parts)
            done[: len(cases)] = torch.tensor([float(case.id in known) for case in cases], dtype=torch.float64)
        self._worker.all_reduce(done)
        left = [case for case, known in zip(cases, done.tolist(), strict=False) if not known]
        return sorted(left, key=lambda case: -_characters(case))

    def _answered(self, cases: Sequence[Case]) -> list[Answered]:
        speaker, asking = self._asking.speaker, self._asking
        found = [Answered(case.id) for case in cases]
        if self._questions.losses:
            context = speaker.voice.context or _LONGEST
            limit = context if asking.max_length is None else min(context, asking.max_length)
            scores = speaker.measured(references(cases, speaker.voice.tokenizer, asking.loss_on, limit))
            found = [replace(score, id=case.id) for score, case in zip(scores, cases, strict=True)]
        if self._questions.max_new_tokens:
            replies = speaker.replies([speaker.prompt(case) for case in cases], self._questions.max_new_tokens)
            found = [replace(each, text=reply.text) for each, reply in zip(found, replies, strict=True)]
            self._too_long += sum(reply.too_long for reply in replies)
        return found

    def _write(self, answers: Sequence[Answered]) -> None:
        self._storage.write_text(f"{self._parts}/{uuid.uuid4().hex}.jsonl", "".join(written(answers)))

    def _complete(self, cases: Sequence[Case]) -> None:
        """Put the parts together, in the order of the cases, and remove them; another group may have been at the same, and first."""
        if read_answers(self._storage, self._candidate, self._questions) is None:
            known = _in_parts(self._storage, self._parts)
            answers = [known[case.id] for case in cases]
            self._storage.write_text(answers_file(self._candidate, self._questions.suite), "".join(written(answers)))
        self._storage.remove(self._parts)

    def _told(self, tell: Tell, done: int, cases: Sequence[Case], warning: str = "") -> None:
        if self._worker.leads:
            tell(Told(self._candidate, self._questions.suite, done, len(cases), warning))

    def _warn(self, tell: Tell, too_long: int, cases: Sequence[Case]) -> None:
        """Say that some cases could not be asked: their answers are empty, and count as such."""
        if too_long:
            suite, limit = self._questions.suite, self._asking.speaker.voice.context
            what = f"suite {suite}: {too_long} of {len(cases)} prompts leave no room for an answer: the model takes {limit} tokens"
            warning = f"{what}; {self._candidate} counts as having said nothing to them"
            self._told(tell, len(cases), cases, warning)


def _characters(case: Case) -> int:
    """About how long a case is."""
    return len(case.prompt or "") + len(case.reference) + sum(len(str(message.get("content"))) for message in case.messages)


def _lines(text: str) -> list[str]:
    """The lines of a file of JSON: a text in it may hold what else ends a line elsewhere (U+2028)."""
    return [line for line in text.split("\n") if line]


def _read(storage: Storage, name: str) -> list[Answered] | None:
    """The answers of a file; None where it is absent or not as it was written."""
    try:
        text = storage.read_text(name)
        return None if text is None else list(read(_lines(text), Answered))
    except (ValueError, TypeError, KeyError):
        return None
