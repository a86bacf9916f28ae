"""What a served model makes of a suite: the candidate behind monitoring.endpoint, asked anew in every run."""

from collections.abc import Sequence
from dataclasses import replace

from finetune_api.evaluation import Suite
from finetune_api.reasons import Reason
from finetune_trainer.asking import Asker, Count, Say, Served, batch_size
from finetune_trainer.completions import Question
from finetune_trainer.endpoint import Party
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.storage import Storage

ENDPOINT = Party("monitoring.endpoint", "the endpoint", Reason.ENDPOINT_UNAVAILABLE)


def answers_of(behind: Served, suite: Suite, cases: Sequence[Case], storage: Storage, say: Say) -> tuple[Answered, ...]:
    """What the endpoint says to each case, in their order; an empty text where it refuses to answer.

    At most suite.maxNewTokens tokens, and the endpoint's own maxTokens. The answers are kept in `storage`, which is the run's own: what
    another run was told says nothing of what is served now. Raises JobError (EndpointUnavailable, also where it has answered nothing at
    all; AuthenticationFailed, InvalidSpec, StorageUnavailable).
    """
    endpoint = behind.endpoint.model_copy(update={"max_tokens": min(suite.max_new_tokens, behind.endpoint.max_tokens)})
    count, texts, size = Count(), list[str](), batch_size(endpoint)
    with Asker(replace(behind, endpoint=endpoint), storage, count, say) as asker:
        for start in range(0, len(cases), size):
            answers = asker.answers([_question(case) for case in cases[start : start + size]])
            texts += [answer.text if answer is not None else "" for answer in answers]
    nothing = count.refused + count.empty
    why = ", ".join(
        words
        for words in (
            f"{count.refused:,} refused, the first with {count.first_refusal}" if count.refused else "",
            f"{count.empty:,} empty" if count.empty else "",
        )
        if words
    )
    if nothing == len(cases):
        raise behind.party.failure(f"{endpoint.model} has answered none of the {len(cases):,} prompts of the suite {suite.name}: {why}")
    cut = f"; {count.cut:,} answers are cut off at {endpoint.max_tokens} tokens" if count.cut else ""
    say(f"suite {suite.name}: {len(cases) - nothing:,} of {len(cases):,} prompts answered{f'; {why}' if why else ''}{cut}")
    return tuple(Answered(case.id, text) for case, text in zip(cases, texts, strict=True))


def _question(case: Case) -> Question:
    if case.messages:
        return Question(messages=tuple(case.messages), tools=tuple(case.tools), place=case.place)
    return Question(prompt=case.prompt or "", place=case.place)
