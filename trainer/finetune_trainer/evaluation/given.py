"""Scores that other models give to a candidate's answers: an encoder, and a judge behind an endpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.evaluation import Suite, SuiteMetric
from finetune_trainer.asking import Say, served
from finetune_trainer.encoder import Encoder, load_encoder
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.embedding import similarities
from finetune_trainer.judge import Judge, judge_at
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

GIVEN: tuple[SuiteMetric, ...] = ("embeddingSimilarity", "judgeScore", "judgeWinRate")
"""Metrics that another model than the measured one gives."""
EVEN = 0.5
"""Win rate of the untuned model against itself."""

PerCase = Sequence[float | None]


@dataclass
class Givers:
    """The encoder and the judge of one suite, loaded when they are first needed. Its `given` is what scores.measured takes."""

    suite: Suite
    where: str
    """The suite's field in the spec: evaluation.suites[0]."""
    storage: Storage
    """output.storage."""
    namespace: str
    """The job's."""
    mounts: Mounts
    cache: Path
    say: Say
    comparison: str | None = field(default=None, init=False)
    """What became of the last comparison with the untuned model, in the judge's words: what it chose, and how often by the place alone."""
    _encoder: Encoder | None = field(default=None, init=False)

    def given(self, cases: Sequence[Case], answered: Iterable[Answered], baseline: Iterable[Answered]) -> dict[SuiteMetric, PerCase]:
        """The scores of each case by the suite's metrics that another model gives, in the cases' order.

        `baseline` are the untuned model's own answers, which the win rate is against; where they are the candidate's, it is 0.5 everywhere
        and nobody is asked. Raises JobError (JudgeUnavailable, AuthenticationFailed, SecretNotFound, ModelNotFound, ModelInvalid, ...).
        """
        texts, others = _texts(cases, answered), _texts(cases, baseline)
        givers: Mapping[SuiteMetric, Callable[[], PerCase]] = {
            "embeddingSimilarity": lambda: similarities(self.encoder(), [case.reference for case in cases], texts),
            "judgeScore": lambda: self._judged(lambda judge: judge.scores(cases, texts).per_case),
            "judgeWinRate": lambda: self._wins(cases, texts, others),
        }
        return {metric: givers[metric]() for metric in GIVEN if metric in self.suite.metrics}

    def encoder(self) -> Encoder:
        """The suite's encoder, fetched and loaded. Raises JobError as load_encoder does."""
        if self._encoder is None:
            assert self.suite.encoder is not None  # noqa: S101 - the spec's own rule
            self._encoder = load_encoder(self.suite.encoder.model_source(), self.mounts, self.cache, f"{self.where}.encoder")
        return self._encoder

    def check(self) -> None:
        """Find out, before anything is paid for, whether the encoder loads and the judge answers. Raises JobError as `given` does."""
        if self.suite.encoder is not None:
            self.encoder()
        if self.suite.judge is not None:
            with self._judge() as judge:
                judge.check()

    def _wins(self, cases: Sequence[Case], texts: Sequence[str], others: Sequence[str]) -> PerCase:
        if texts == others:
            return [EVEN] * len(cases)

        def compare(judge: Judge) -> PerCase:
            found = judge.wins(cases, texts, others)
            self.comparison = judge.words
            return found.per_case

        return self._judged(compare)

    def _judged(self, ask: Callable[[Judge], PerCase]) -> PerCase:
        with self._judge() as judge:
            return ask(judge)

    def _judge(self) -> AbstractContextManager[Judge]:
        assert self.suite.judge is not None  # noqa: S101 - the spec's own rule
        behind = served(self.suite.judge.endpoint, judge_at(f"{self.where}.judge.endpoint"), self.mounts)
        return Judge(behind, self.suite.judge.instruction, self.storage, self.namespace, self.say)


def _texts(cases: Sequence[Case], answered: Iterable[Answered]) -> list[str]:
    """What was said to each case, in the cases' order."""
    found = {each.id: each.text for each in answered}
    return [found[case.id] for case in cases]
