"""The untuned model asked in several ways: the prompts of each strategy, and which of them did best. Pure.

What a strategy puts together, where it asks for it:

    a conversation    its system prompt in place of the data's, examples as turns before the question, passages at the question's beginning
    a plain prompt    system prompt, examples as prompt and completion, passages, the prompt; an empty line between them

A prompt that is all the data has stays as it is, and so does a plain text, which is no question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from finetune_api.baseline import BaselinePlan, PromptStrategy
from finetune_api.evaluation import GENERATED_METRICS, EvaluationPlan
from finetune_api.status import BaselineResult
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.evaluation.scores import Measured, finite
from finetune_trainer.gate import NOT_MEASURED, is_sufficient, lower_is_better
from finetune_trainer.made_data.texts import numbered
from finetune_trainer.retrieval import Knowledge, Passage
from finetune_trainer.retrieval.bm25 import WordIndex
from finetune_trainer.retrieval.search import Index

AS_IT_IS = PromptStrategy(name="zero-shot")
"""The strategy of models that stand beside the base model, where no prompts are named."""
Turn = Mapping[str, Any]
Fits = Callable[[Case], bool]
IndexOf = Callable[[Sequence[str]], Index]


@dataclass(frozen=True)
class Prompted:
    """A suite as a strategy asks it."""

    cases: tuple[Case, ...]
    """As many as before, under the same ids and with the same references."""
    shortened: int = 0
    """Questions with fewer examples or passages than wanted, since there are no more of their kind or more did not fit."""


@dataclass(frozen=True)
class Outcome:
    """What one way to ask came to."""

    prompt: str
    """Name of the strategy."""
    model: str | None
    """Name of another model; None is the base model."""
    measured: tuple[Measured, ...]
    """The metrics of all suites."""

    def figure(self, metric: str) -> Measured | None:
        """One metric, where it has a value."""
        return next((each for each in self.measured if each.metric == metric and each.value is not None), None)


def strategies(plan: BaselinePlan) -> tuple[PromptStrategy, ...]:
    """The ways in which every model is asked."""
    return plan.prompts or (AS_IT_IS,)


def prompted(
    strategy: PromptStrategy,
    cases: Sequence[Case],
    shots: Sequence[Case] = (),
    knowledge: Knowledge | None = None,
    *,
    seed: int = 0,
    fits: Fits = lambda _: True,
    index_of: IndexOf = WordIndex,
) -> Prompted:
    """A suite's cases as the strategy asks them.

    `shots` are training examples, of which those of a case's own kind (plain, or a conversation) are shown, and never one that asks the
    same; `knowledge` is needed for retrieval. `fits` says whether the model can take a case: while it cannot, first examples go, the least
    fitting first, then passages. `index_of` finds similar examples: by words, where it is not given. Raises ValueError where the strategy
    needs shots or knowledge, and there are none.
    """
    _check(strategy, shots, knowledge)
    asked = [each for each in cases if each.reference]
    shown = _shown(strategy, asked, shots, seed, index_of)
    found = _found(strategy, asked, knowledge)
    done, shortened = {}, 0
    for case, examples, passages in zip(asked, shown, found, strict=True):
        done[case.id], whole = _fitted(strategy, case, examples, passages, fits)
        shortened += not whole or len(examples) < (strategy.examples or 0)
    return Prompted(tuple(done.get(case.id, case) for case in cases), shortened)


def metric_to_choose_by(plan: BaselinePlan, evaluation: EvaluationPlan) -> str:
    """The plan's metric, else the first one of generated answers, else the first. Raises ValueError where no suite has cases."""
    chosen: str | None = plan.metric
    if chosen is not None:
        return chosen
    names = [name for suite in evaluation.suites if suite.lm_eval is None for name in suite.metric_names]
    generated = (name for name in names if name.rpartition("/")[2] in GENERATED_METRICS)
    if not names:
        raise ValueError("no suite has examples that prompts could be measured on")
    return next(generated, names[0])


def compared(outcomes: Sequence[Outcome], metric: str) -> tuple[BaselineResult, ...]:
    """What each way came to, in their order, as the status tells it; one of them is the best, of equally good ones the first.

    One for which the metric has no value is left out.
    """
    best = best_of(outcomes, metric)
    return tuple(
        BaselineResult(
            prompt=each.prompt,
            model=each.model,
            metric=metric,
            value=figure.value,
            low=finite(figure.low),
            high=finite(figure.high),
            best=each is best,
        )
        for each in outcomes
        if (figure := each.figure(metric)) is not None and figure.value is not None
    )


def best_of(outcomes: Sequence[Outcome], metric: str) -> Outcome | None:
    """The way with the best value, of equally good ones the first; None where none has one.

    The best of several looks better than it is, the more the more there are: what follows from it is left to an interval.
    """
    sign = -1.0 if lower_is_better(metric) else 1.0
    values = [(sign * figure.value, each) for each in outcomes if (figure := each.figure(metric)) is not None and figure.value is not None]
    return max(values, key=lambda each: each[0], default=(0.0, None))[1]


def is_enough(plan: BaselinePlan, outcomes: Sequence[Outcome], metric: str) -> bool:
    """Whether the best prompt for the base model, by `metric`, reaches sufficientIf for sure, so that nothing need be trained."""
    best = best_of([each for each in outcomes if each.model is None], metric)
    if plan.sufficient_if is None or best is None:
        return False
    return is_sufficient(plan.sufficient_if, best.figure(plan.sufficient_if.metric) or NOT_MEASURED)


def _check(strategy: PromptStrategy, shots: Sequence[Case], knowledge: Knowledge | None) -> None:
    if strategy.examples and not shots:
        raise ValueError(f"the prompt {strategy.name} shows examples, and there are none")
    if strategy.retrieval is not None and knowledge is None:
        raise ValueError(f"the prompt {strategy.name} shows passages, and there is no knowledge base")


def _shown(strategy: PromptStrategy, cases: Sequence[Case], shots: Sequence[Case], seed: int, index_of: IndexOf) -> list[list[Case]]:
    """The examples of each case, the best fitting last, where it stands beside the question."""
    if strategy.examples is None:
        return [[] for _ in cases]
    order = np.random.default_rng(seed).permutation(len(shots)).tolist()
    if strategy.selection == "random":
        first = [order] * len(cases)
    else:
        index = index_of([question(shot) for shot in shots])
        hits = index.search([question(case) for case in cases], strategy.examples * 2)  # some may ask the same
        first = [[*(hit.number for hit in each), *order] for each in hits]
    return [
        _taken(case, [shots[number] for number in dict.fromkeys(numbers)], strategy.examples)
        for case, numbers in zip(cases, first, strict=True)
    ]


def _taken(case: Case, shots: Sequence[Case], most: int) -> list[Case]:
    """The first examples that may be shown before a case, in turned order. One with the same question would give the answer away."""
    own = question(case).strip()
    usable = (shot for shot in shots if shot.reference and bool(shot.messages) == bool(case.messages) and question(shot).strip() != own)
    return list(islice(usable, most))[::-1]


def _found(strategy: PromptStrategy, cases: Sequence[Case], knowledge: Knowledge | None) -> Sequence[Sequence[Passage]]:
    if strategy.retrieval is None or knowledge is None:
        return [()] * len(cases)
    return knowledge.retrieve([question(case) for case in cases], strategy.retrieval.retriever.passages)


def _fitted(strategy: PromptStrategy, case: Case, examples: Sequence[Case], passages: Sequence[Passage], fits: Fits) -> tuple[Case, bool]:
    """The case with as much as fits, and whether that is all."""
    whole = True
    while True:
        full = _composed(case, strategy.system, examples, passages)
        if not (examples or passages) or fits(full):
            return full, whole
        examples, passages, whole = (examples[1:], passages, False) if examples else (examples, passages[:-1], False)


def _composed(case: Case, system: str | None, examples: Sequence[Case], passages: Sequence[Passage]) -> Case:
    """One prompt."""
    shown = f"Passages:\n\n{numbered(passages)}\n\n" if passages else ""
    if not case.messages:
        before = [*([system] if system else []), *((shot.prompt or "") + shot.reference for shot in examples)]
        return replace(case, prompt="".join(f"{text.rstrip()}\n\n" for text in before) + shown + (case.prompt or ""))
    own = [turn for turn in case.messages if turn.get("role") in _INSTRUCTING]
    rest = [turn for turn in case.messages if turn.get("role") not in _INSTRUCTING]
    first: list[Turn] = [{"role": "system", "content": system}] if system else own
    return replace(case, messages=(*first, *(turn for shot in examples for turn in _turns(shot)), *_with_passages(rest, shown)))


_INSTRUCTING = ("system", "developer")


def _turns(shot: Case) -> list[Turn]:
    """An example as turns of the conversation."""
    asked = [turn for turn in shot.messages if turn.get("role") not in _INSTRUCTING]
    return [*asked, {"role": "assistant", "content": shot.reference}]


def _with_passages(turns: Sequence[Turn], shown: str) -> list[Turn]:
    """The turns with passages before the last question."""
    last = max((place for place, turn in enumerate(turns) if turn.get("role") == "user"), default=None)
    if not shown or last is None:
        return list(turns)
    content = turns[last].get("content")
    content = [{"type": "text", "text": shown}, *content] if isinstance(content, list) else shown + (content or "")
    return [*turns[:last], {**turns[last], "content": content}, *turns[last + 1 :]]


def question(case: Case) -> str:
    """What a case asks, in words: its prompt, or what the user said last."""
    if not case.messages:
        return case.prompt or ""
    said = [turn.get("content") for turn in case.messages if turn.get("role") == "user"]
    content = said[-1] if said else ""
    return "".join(str(part.get("text", "")) for part in content) if isinstance(content, list) else str(content or "")
