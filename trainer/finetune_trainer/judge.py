"""A judge behind an endpoint: scores for answers, and which of two answers is better.

Two answers are compared twice, each standing first once: many judges prefer a place to an answer (Wang et al. 2023, Large Language Models
are not Fair Evaluators). What the judge says is kept in output.storage (see asking.py), so that it is paid for once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from finetune_api.reasons import Reason
from finetune_trainer.asking import Asker, Count, Say, Served, batch_size, folder_of, identity_of
from finetune_trainer.completions import Question
from finetune_trainer.data.cases import Case
from finetune_trainer.data_cache import mark_used
from finetune_trainer.endpoint import Party
from finetune_trainer.storage import Storage
from finetune_trainer.verdicts import Form, asked_again, choice_in, choice_question, score_in, score_question

Read = Callable[[str], float | None]
"""The verdict in what a judge says."""


def judge_at(field: str) -> Party:
    """A judge whose endpoint is that field of the spec."""
    return Party(field, "the judge", Reason.JUDGE_UNAVAILABLE)


@dataclass(frozen=True)
class Judged:
    """Verdicts on a suite's cases."""

    per_case: tuple[float | None, ...]
    """0 to 1 in the cases' order: the score, or how far the answer is preferred to the other one (1, 0.5, 0). None: no verdict."""
    ties: int = 0
    """Pairs that are a tie: called so, the same text, or won once by each of the two places."""
    turned: int = 0
    """Pairs whose verdict went with the place in both orders."""
    first: float | None = None
    """Share of the decisions that chose the answer that stood first, where pairs were compared; 0.5 is no bias. None: no decision."""

    @property
    def no_verdict(self) -> int:
        """Cases on which the judge, asked twice, gave no verdict, or which it refused."""
        return sum(value is None for value in self.per_case)


class Judge:
    """A judge that is ready to be asked. A context; in one thread, outside of any event loop."""

    def __init__(self, served: Served, instruction: str, storage: Storage, namespace: str, say: Say) -> None:
        """`storage` is output.storage, `namespace` the job's."""
        self._served, self._instruction, self._say = served, instruction, say
        folder = folder_of(identity_of(served.endpoint, namespace))
        mark_used(storage, folder)
        self._count = Count()
        self.words = ""
        """What became of the cases that it was asked about last."""
        self._asker = Asker(served, storage.at(folder), self._count, say)

    def __enter__(self) -> Self:
        self._asker.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._asker.__exit__(*error)

    def check(self) -> None:
        """Find out whether the judge answers at all, for the price of one token. Raises JobError as `scores` does."""
        self._asker.probe(chat=True)

    def scores(self, cases: Sequence[Case], answers: Sequence[str]) -> Judged:
        """How good each answer is: the judge's 1 to 10 as 0 to 1.

        Raises JobError (JudgeUnavailable, also where not one verdict is given; AuthenticationFailed, InvalidSpec, StorageUnavailable).
        """
        questions = [score_question(case, answer, self._instruction) for case, answer in zip(cases, answers, strict=True)]
        judged = Judged(tuple(self._verdicts(questions, "score", score_in)))
        self._tell(judged, f"the judge has scored {len(cases) - judged.no_verdict:,} of {len(cases):,} answers")
        return judged

    def wins(self, cases: Sequence[Case], answers: Sequence[str], others: Sequence[str]) -> Judged:
        """How far each answer is preferred to the other one. Those that are the same but for space around them are ties, not asked about.

        Raises JobError as `scores` does.
        """
        pairs = list(zip(cases, answers, others, strict=True))
        differ = [place for place, (_, answer, other) in enumerate(pairs) if answer.strip() != other.strip()]
        questions = [
            choice_question(case, *order, self._instruction)
            for case, answer, other in (pairs[place] for place in differ)
            for order in ((answer, other), (other, answer))
        ]
        said = list(self._verdicts(questions, "choice", choice_in))
        judged = compared(len(pairs), dict(zip(differ, zip(said[::2], said[1::2], strict=True), strict=True)))
        self._tell(judged, _words(judged, len(pairs), len(pairs) - len(differ)))
        return judged

    def _verdicts(self, questions: Sequence[Question], form: Form, read: Read) -> Iterator[float | None]:
        """A verdict for each question, of those that have none after they were asked twice None."""
        size = batch_size(self._served.endpoint)
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            said = self._asker.outcomes(batch)
            found = [None if answer is None else read(answer.text) for answer in said]
            unclear = [(place, answer.text) for place, answer in enumerate(said) if answer is not None and found[place] is None]
            again = self._asker.outcomes([asked_again(batch[place], text, form) for place, text in unclear])
            for (place, _), answer in zip(unclear, again, strict=True):
                found[place] = None if answer is None else read(answer.text)
            yield from found

    def _tell(self, judged: Judged, words: str) -> None:
        """Say what became of the cases. Raises JobError where there is no verdict at all."""
        count = self._count
        missing = f"{judged.no_verdict:,} have no verdict in the last line of what it says, though asked twice, and count for nothing"
        refused = f" ({count.refused:,} refused, the first with {count.first_refusal})" if count.refused else ""
        if judged.per_case and judged.no_verdict == len(judged.per_case):
            what = f"{self._served.endpoint.model} has given no verdict on any of {judged.no_verdict:,} answers{refused}"
            raise self._served.party.failure(
                f"{what}: check model, and maxTokens ({self._served.endpoint.max_tokens}) where it reasons first"
            )
        self.words = f"{words}; {missing}{refused}" if judged.no_verdict else words
        self._say(self.words)


def compared(count: int, both: dict[int, tuple[float | None, float | None]]) -> Judged:
    """Of the verdicts on pairs, by their place: the first with the answer standing first, the second with the other one.

    Pairs that are not there are of the same text. A pair with one verdict has none: half of it would be the place's.
    """
    per_case: list[float | None] = [0.5] * count
    chosen_first: list[float] = []
    ties, turned = count - len(both), 0
    for place, (forward, backward) in both.items():
        if forward is None or backward is None:
            per_case[place] = None
            continue
        per_case[place] = (forward + 1 - backward) / 2
        chosen_first += [verdict for verdict in (forward, backward) if verdict != 0.5]
        ties += per_case[place] == 0.5
        turned += forward == backward != 0.5
    first = sum(chosen_first) / len(chosen_first) if chosen_first else None
    return Judged(tuple(per_case), ties, turned, first)


def _words(judged: Judged, count: int, same: int) -> str:
    """What is to be known of the comparisons."""
    decided = [value for value in judged.per_case if value is not None]
    won, lost = sum(value > 0.5 for value in decided), sum(value < 0.5 for value in decided)
    words = f"the judge has compared {count:,} pairs of answers, in both orders: {won:,} won, {lost:,} lost, {judged.ties:,} ties"
    words += f" ({same:,} of them the same text)" if same else ""
    if judged.first is not None:
        words += f"; it chose the answer that stood first in {judged.first:.0%} of its decisions"
    return words + (f", and {judged.turned:,} pairs went with the place alone" if judged.turned else "")
