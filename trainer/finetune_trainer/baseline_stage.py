"""The stage Baseline: what prompts for the untuned model, and other models, reach before anything is trained."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from finetune_api.baseline import BaselineModel, BaselinePlan, PromptStrategy
from finetune_api.evaluation import BASELINE
from finetune_trainer.answering import Candidate, outstanding
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.baseline import Outcome, compared, is_enough, metric_to_choose_by, prompted, strategies
from finetune_trainer.crew import Crew
from finetune_trainer.encoder import Encoder, load_encoder
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.evaluation.evidence import publish_report
from finetune_trainer.evaluation.markdown import Findings
from finetune_trainer.measuring import Asked, Measuring
from finetune_trainer.model import load_tokenizer
from finetune_trainer.model_files import fetch_model
from finetune_trainer.retrieval.knowledge import Knowledge, files_of, open_knowledge, read_passages


@dataclass(frozen=True)
class _Way:
    """One way to ask one model."""

    prompt: str
    model: str | None
    candidate: Candidate


def measure_baseline(attempt: Attempt, preparation: Preparation, crew: Crew, plan: BaselinePlan) -> bool:
    """Ask every model in every way. Returns whether one prompt for the base model is enough, so that nothing need be trained.

    Raises JobError (KnowledgeBaseInvalid, ModelNotFound, JudgeUnavailable, ...).
    """
    attempt.reporter.start_stage("Baseline", "measuring what prompts alone reach", workers_wanted=0)
    measuring = Measuring(attempt, preparation, crew)
    ways = list(_found(attempt, plan, _ways(attempt, preparation, measuring, plan)))
    untuned = measuring.ask_baseline("Baseline", *(way.candidate for way in ways))
    if measuring.waits:
        attempt.reporter.announce(workers_wanted=0, message="scoring the answers")
    outcomes = [Outcome(way.prompt, way.model, measuring.measured(way.candidate, untuned)) for way in ways]
    metric = metric_to_choose_by(plan, attempt.job.spec.evaluation)
    found = compared(outcomes, metric)
    attempt.reporter.announce(baseline=found)
    for each in found:
        asked = f"{each.prompt}{f' of {each.model}' if each.model else ''}"
        attempt.console.say(f"baseline {asked}: {each.metric} {each.value:.4g}{', the best' if each.best else ''}")
    if not is_enough(plan, outcomes, metric):
        return False
    attempt.reporter.update(sufficient=True)
    uri = publish_report(attempt.storage, Findings(attempt.job, attempt.reporter.report))
    attempt.console.say(f"a prompt alone reaches baseline.sufficientIf; the report is {uri}")
    return True


def _ways(attempt: Attempt, preparation: Preparation, measuring: Measuring, plan: BaselinePlan) -> Iterator[_Way]:
    """Each model with each strategy. What asks the base model just as the suites have it is the baseline itself."""
    models: list[tuple[str | None, Mapping[str, Any] | None]] = [(None, None)]
    models += [(each.name, each.model_source().model_dump(mode="json", by_alias=True, exclude_none=True)) for each in plan.models]
    for place, strategy in enumerate(strategies(plan)):
        cases_of = partial(_cases, attempt, preparation, strategy, _knowledge(attempt, strategy, place), measuring.training_cases())
        plain = strategy.examples is None and strategy.system is None and strategy.retrieval is None
        for name, model in models:
            if plain:
                candidate = measuring.candidate(f"model-{name}" if name else BASELINE, model=model)
            else:
                candidate = measuring.prompted(f"model-{name}.{strategy.name}" if name else f"prompt-{strategy.name}", cases_of, model)
            yield _Way(strategy.name, name, candidate)


def _found(attempt: Attempt, plan: BaselinePlan, ways: Iterable[_Way]) -> Iterator[_Way]:
    """The ways, with other models as they are now.

    One that is not there is found out before a worker is asked for, and all workers get the same revision. A model that has answered is not
    looked for again. Raises JobError (ModelNotFound, ModelInvalid, UnsafeModelFormat, AuthenticationFailed, ...).
    """
    known: dict[str, Mapping[str, Any]] = {}
    for way in ways:
        if way.model is None or way.candidate.model is None or outstanding(attempt.own, way.candidate) is None:
            yield way
            continue
        if way.model not in known:
            place = next(place for place, each in enumerate(plan.models) if each.name == way.model)
            known[way.model] = {**way.candidate.model, **_revision(attempt, plan.models[place], f"baseline.models[{place}]")}
        yield replace(way, candidate=replace(way.candidate, model=known[way.model]))


def _revision(attempt: Attempt, named: BaselineModel, field: str) -> dict[str, str]:
    """The revision of a model, where it has any, once all but its weights were looked at. `field` is its place in the spec."""
    try:
        files = fetch_model(named.model_source(), attempt.mounts, attempt.cache, weights=False)
        load_tokenizer(files)
    except JobError as error:
        raise JobError(error.reason, f"{field}: {error.message}") from error
    return {"revision": str(files.revision)} if named.source.startswith("hf://") else {}


def _cases(
    attempt: Attempt, preparation: Preparation, strategy: PromptStrategy, knowledge: Knowledge | None, shots: list[Case], asked: Asked
) -> tuple[Case, ...]:
    """A suite's cases as a strategy asks them."""
    room = asked.suite.max_new_tokens if asked.suite.generates else 0
    made = prompted(
        strategy,
        asked.cases,
        shots,
        knowledge,
        seed=preparation.job.spec.training.seed,
        fits=lambda case: preparation.longest is None or tokens_of(case, preparation) + room <= preparation.longest,
    )
    if made.shortened:
        suite = f"suite {asked.suite.name}: {made.shortened} of {len(asked.cases)} questions"
        attempt.console.say(f"prompt {strategy.name}, {suite} are asked with fewer examples or passages than wanted: no more fit")
    return made.cases


def tokens_of(case: Case, preparation: Preparation) -> int:
    """Tokens of a case with its golden answer."""
    tokenizer = preparation.tokenizer
    if case.messages:
        text = tokenizer.apply_chat_template(
            list(case.messages), tools=list(case.tools) or None, tokenize=False, add_generation_prompt=True
        )
        return len(tokenizer(f"{text}{case.reference}", add_special_tokens=False)["input_ids"])
    return len(tokenizer(f"{case.prompt or ''}{case.reference}")["input_ids"])


def _knowledge(attempt: Attempt, strategy: PromptStrategy, place: int) -> Knowledge | None:
    """The knowledge base of a strategy that shows passages."""
    if strategy.retrieval is None:
        return None
    field, base, retriever = f"baseline.prompts[{place}].retrieval", strategy.retrieval.knowledge_base, strategy.retrieval.retriever
    passages = read_passages(base, files_of(base, attempt.mounts, f"{field}.knowledgeBase"), attempt.tell)

    def load() -> Encoder:
        assert retriever.encoder is not None  # noqa: S101 - the spec's own rule
        return load_encoder(retriever.encoder.model_source(), attempt.mounts, attempt.cache, f"{field}.retriever.encoder")

    return open_knowledge(passages, retriever, load, attempt.storage, attempt.tell, attempt.job.metadata.namespace)
