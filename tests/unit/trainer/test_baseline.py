"""Prompts of every strategy, written out by hand; the best of them; and when nothing need be trained."""

from collections.abc import Sequence

import pytest

from finetune_api.baseline import BaselinePlan, PromptStrategy
from finetune_api.evaluation import EvaluationPlan
from finetune_trainer.baseline import AS_IT_IS, Outcome, compared, is_enough, metric_to_choose_by, prompted, question, strategies
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.evaluation.scores import Measured
from finetune_trainer.retrieval import Knowledge, Passage
from finetune_trainer.retrieval.bm25 import WordIndex
from finetune_trainer.retrieval.search import Hit


def plain(name: str, prompt: str, reference: str) -> Case:
    return Case(name, reference, prompt=prompt)


def talk(name: str, asked: str, reference: str, system: str | None = None) -> Case:
    turns = [{"role": "system", "content": system}] if system else []
    return Case(name, reference, messages=(*turns, {"role": "user", "content": asked}))


def strategy(**fields: object) -> PromptStrategy:
    return PromptStrategy.model_validate({"name": "mine", **fields})


PASSAGES = (
    Passage("a.md", "Refunds", "Refunds take five days."),
    Passage("b.md", "", "Parcels are sent by train."),
    Passage("c.md", "", "Opening hours are nine to five."),
)
KNOWLEDGE = Knowledge(PASSAGES, WordIndex([passage.shown for passage in PASSAGES]))
RETRIEVAL = {"knowledgeBase": {"source": "pvc://docs/kb"}, "retriever": {"passages": 2}}
PLAIN_SHOTS = [plain("s0", "2+2=", "4"), plain("s1", "refund?\n", "five days"), plain("s2", "parcel?\n", "by train")]
TALK_SHOTS = [talk("s0", "Two and two?", "Four.", "Be brief."), talk("s1", "When is my refund?", "In five days.")]


def one(strategy: PromptStrategy, case: Case, shots: Sequence[Case] = (), knowledge: Knowledge | None = None) -> Case:
    (found,) = prompted(strategy, [case], shots, knowledge).cases
    return found


@pytest.mark.parametrize("case", [plain("0", "3+3=", "6"), talk("0", "Three and three?", "Six.", "Be kind.")])
def test_zero_shot_asks_as_the_data_does(case: Case) -> None:
    assert one(AS_IT_IS, case) == case


def test_a_system_prompt() -> None:
    told = strategy(system="Answer in verse.")
    assert one(told, plain("0", "3+3=", "6")).prompt == "Answer in verse.\n\n3+3="
    expected = ({"role": "system", "content": "Answer in verse."}, {"role": "user", "content": "Hello"})
    assert one(told, talk("0", "Hello", "Hi")).messages == expected
    assert one(told, talk("0", "Hello", "Hi", "Be kind.")).messages == expected  # in place of the data's own


def test_examples_before_a_plain_prompt() -> None:
    found = one(strategy(examples=1), plain("0", "3+3=", "6"), PLAIN_SHOTS[:1])
    assert found == plain("0", "2+2=4\n\n3+3=", "6")


def test_examples_as_turns_of_a_conversation() -> None:
    """The question's own system prompt stays first, and the examples' do not come in."""
    found = one(strategy(examples=1), talk("0", "Three and three?", "Six.", "Be kind."), TALK_SHOTS[:1])
    assert found.messages == (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Three and three?"},
    )
    assert found.reference == "Six."


def test_similar_examples_are_nearest_to_the_question() -> None:
    found = one(
        strategy(examples=2, selection="similar"), plain("0", "Where is my parcel, and the refund? The parcel!\n", "x"), PLAIN_SHOTS
    )
    assert found.prompt == "refund?\nfive days\n\nparcel?\nby train\n\nWhere is my parcel, and the refund? The parcel!\n"


def test_similar_examples_are_filled_up_where_nothing_is_alike() -> None:
    found = prompted(strategy(examples=3, selection="similar"), [plain("0", "zzz", "x")], PLAIN_SHOTS)
    assert found.shortened == 0
    assert found.cases[0].prompt is not None
    assert all(shot.reference in found.cases[0].prompt for shot in PLAIN_SHOTS)


def test_a_similarity_can_be_given() -> None:
    class Last:
        def __init__(self, texts: Sequence[str]) -> None:
            self._last = len(texts) - 1

        def search(self, queries: Sequence[str], most: int) -> list[tuple[Hit, ...]]:
            assert most >= 1
            return [(Hit(self._last, 1.0),) for _ in queries]

    found = prompted(strategy(examples=1, selection="similar"), [plain("0", "refund?", "x")], PLAIN_SHOTS, index_of=Last)
    assert found.cases[0].prompt == "parcel?\nby train\n\nrefund?"


def test_random_examples_are_the_same_for_all_questions_and_follow_from_the_seed() -> None:
    shots = [plain(f"s{number}", f"question {number}: ", f"answer {number}") for number in range(50)]
    cases = [plain(str(number), f"asked {number}: ", "x") for number in range(20)]

    def before(seed: int) -> set[str]:
        found = prompted(strategy(examples=4), cases, shots, seed=seed).cases
        return {(each.prompt or "").removesuffix(case.prompt or "") for each, case in zip(found, cases, strict=True)}

    assert len(before(1)) == 1
    assert before(1) == before(1)
    assert len({next(iter(before(seed))) for seed in range(5)}) == 5
    assert next(iter(before(1))).count("answer") == 4


@pytest.mark.parametrize("selection", ["random", "similar"])
def test_an_example_that_asks_the_same_is_not_shown(selection: str) -> None:
    """It would give the answer away."""
    shots = [*PLAIN_SHOTS, plain("s3", "refund? ", "the answer itself")]
    found = prompted(strategy(examples=3, selection=selection), [plain("0", "refund?\n", "x")], shots)
    assert found.cases[0].prompt is not None
    assert "the answer itself" not in found.cases[0].prompt
    assert "five days" not in found.cases[0].prompt
    assert found.cases[0].prompt.endswith("\n\nrefund?\n")
    assert found.shortened == 1  # two are left


def test_examples_of_another_kind_are_not_shown() -> None:
    found = prompted(strategy(examples=1), [talk("0", "Hello", "Hi")], PLAIN_SHOTS)
    assert found.cases == (talk("0", "Hello", "Hi"),)
    assert found.shortened == 1


def test_passages_before_the_question() -> None:
    shown = "Passages:\n\n[1] Refunds\nRefunds take five days.\n\n"
    asked = strategy(retrieval=RETRIEVAL)
    assert one(asked, plain("0", "How long do refunds take?", "x"), (), KNOWLEDGE).prompt == f"{shown}How long do refunds take?"
    found = one(asked, talk("0", "How long do refunds take?", "x", "Be kind."), (), KNOWLEDGE)
    assert found.messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{shown}How long do refunds take?"})
    nothing = talk("0", "zzz", "x")
    assert one(asked, nothing, (), KNOWLEDGE) == nothing  # no passage has anything of it


def test_passages_beside_a_question_of_parts() -> None:
    parts = [{"type": "text", "text": "How long do refunds take?"}]
    case = Case("0", "x", messages=({"role": "user", "content": parts},))
    assert question(case) == "How long do refunds take?"
    (turn,) = one(strategy(retrieval=RETRIEVAL), case, (), KNOWLEDGE).messages
    assert turn["content"] == [{"type": "text", "text": "Passages:\n\n[1] Refunds\nRefunds take five days.\n\n"}, *parts]
    assert case.messages[0]["content"] == parts


def test_all_together() -> None:
    asked = strategy(system="Be brief.", examples=1, retrieval=RETRIEVAL)
    found = one(asked, plain("0", "How long do refunds take?", "x"), PLAIN_SHOTS[:1], KNOWLEDGE)
    assert found.prompt == "Be brief.\n\n2+2=4\n\nPassages:\n\n[1] Refunds\nRefunds take five days.\n\nHow long do refunds take?"


def test_the_last_question_of_a_longer_conversation_is_the_question() -> None:
    turns = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi. What is it about?"},
        {"role": "user", "content": "My parcels."},
    )
    case = Case("0", "x", messages=turns)
    assert question(case) == "My parcels."
    found = one(strategy(retrieval=RETRIEVAL), case, (), KNOWLEDGE)
    assert found.messages == (*turns[:2], {"role": "user", "content": "Passages:\n\n[1] Parcels are sent by train.\n\nMy parcels."})


def test_what_does_not_fit_goes_the_least_fitting_first() -> None:
    asked = strategy(examples=2, selection="similar", retrieval=RETRIEVAL)
    case = plain("0", "parcels and refunds: parcel? parcel? refund?", "x")
    everything = one(asked, case, PLAIN_SHOTS, KNOWLEDGE).prompt or ""
    assert [everything.count(text) for text in ("five days\n\nparcel?\nby train", "[1]", "[2]")] == [1, 1, 1]

    def at(most: int) -> tuple[str, int]:
        found = prompted(asked, [case], PLAIN_SHOTS, KNOWLEDGE, fits=lambda each: len(each.prompt or "") <= most)
        return found.cases[0].prompt or "", found.shortened

    assert at(len(everything)) == (everything, 0)
    assert at(len(everything) - 1) == (everything.removeprefix("refund?\nfive days\n\n"), 1)
    first_passage, shortened = at(len(case.prompt or "") + 60)
    assert first_passage.startswith("Passages:\n\n[1] ")
    assert "[2]" not in first_passage
    assert shortened == 1
    assert at(0) == (case.prompt, 1)  # the question itself is never cut


def test_a_plain_text_is_no_question() -> None:
    text = Case("1", "", prompt="Once upon a time")
    found = prompted(strategy(system="Be brief.", examples=1), [plain("0", "3+3=", "6"), text], PLAIN_SHOTS[:1])
    assert found.cases[1] == text
    assert found.shortened == 0


def test_what_a_strategy_needs_must_be_there() -> None:
    with pytest.raises(ValueError, match="mine shows examples, and there are none"):
        prompted(strategy(examples=1), [plain("0", "a", "b")])
    with pytest.raises(ValueError, match="mine shows passages, and there is no knowledge base"):
        prompted(strategy(retrieval=RETRIEVAL), [plain("0", "a", "b")])


def plan(**fields: object) -> BaselinePlan:
    return BaselinePlan.model_validate({"prompts": ({"name": "zero-shot"}, {"name": "polite", "system": "Please."}), **fields})


def test_other_models_without_prompts_are_asked_as_the_data_asks() -> None:
    assert strategies(plan()) == plan().prompts
    assert strategies(BaselinePlan.model_validate({"models": ({"name": "other", "source": "hf://a/b"},)})) == (AS_IT_IS,)


def outcome(prompt: str, value: float | None, model: str | None = None, half: float = 0.05, metric: str = "task/f1") -> Outcome:
    ends = (None, None) if value is None else (value - half, value + half)
    return Outcome(prompt, model, (Measured("task/loss", 1.0), Measured(metric, value, *ends)))


def test_the_best_is_one_of_all() -> None:
    found = compared([outcome("a", 0.5), outcome("b", 0.7), outcome("c", 0.7, "other"), outcome("d", None)], "task/f1")
    assert [(each.prompt, each.model, each.value, each.best) for each in found] == [
        ("a", None, 0.5, False),
        ("b", None, 0.7, True),  # the first of equally good ones
        ("c", "other", 0.7, False),
    ]
    assert (found[0].low, found[0].high) == (pytest.approx(0.45), pytest.approx(0.55))


def test_the_best_of_losses_is_the_lowest() -> None:
    found = compared([outcome("a", 1.5, metric="task/perplexity"), outcome("b", 1.2, metric="task/perplexity")], "task/perplexity")
    assert [each.best for each in found] == [False, True]
    assert compared([outcome("a", None)], "task/f1") == ()


@pytest.mark.parametrize(
    ("outcomes", "enough"),
    [
        ([outcome("a", 0.5), outcome("b", 0.97, half=0.01)], True),
        ([outcome("a", 0.5), outcome("b", 0.97, half=0.05)], False),  # not for sure
        ([outcome("a", 0.5), outcome("b", 0.99, "other", half=0.01)], False),  # another model is not what is tuned
        ([outcome("a", None)], False),
        ([], False),
    ],
)
def test_training_is_superfluous_only_for_sure(outcomes: list[Outcome], enough: bool) -> None:
    wanted = plan(sufficientIf={"metric": "task/f1", "atLeast": 0.95})
    assert is_enough(wanted, outcomes, "task/f1") is enough
    assert not is_enough(plan(), outcomes, "task/f1")


def test_the_goal_may_be_another_metric_than_the_best_is_chosen_by() -> None:
    ways = [
        Outcome("a", None, (Measured("task/f1", 0.9), Measured("task/loss", 2.0, 1.9, 2.1))),
        Outcome("b", None, (Measured("task/f1", 0.8), Measured("task/loss", 0.5, 0.4, 0.6))),
    ]
    assert not is_enough(plan(sufficientIf={"metric": "task/loss", "atMost": 1.0}), ways, "task/f1")
    assert is_enough(plan(sufficientIf={"metric": "task/loss", "atMost": 1.0}), ways, "task/loss")
    assert not is_enough(plan(sufficientIf={"metric": "task/bleu", "atLeast": 1.0}), ways, "task/f1")


def test_the_metric_to_choose_by() -> None:
    tasks = {"name": "words", "lmEval": {"tasks": ("hellaswag",)}}
    evaluation = EvaluationPlan.model_validate({"suites": (tasks, {"name": "task", "source": "test", "metrics": ("loss", "f1", "bleu")})})
    assert metric_to_choose_by(plan(), evaluation) == "task/f1"
    assert metric_to_choose_by(plan(metric="task/bleu"), evaluation) == "task/bleu"
    losses = EvaluationPlan.model_validate({"suites": ({"name": "task", "source": "test", "metrics": ("perplexity", "loss")},)})
    assert metric_to_choose_by(plan(), losses) == "task/perplexity"
    with pytest.raises(ValueError, match="no suite has examples"):
        metric_to_choose_by(plan(), EvaluationPlan.model_validate({"suites": (tasks,)}))
