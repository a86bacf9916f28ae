"""Words as retrieval compares them, and whether a passage supports a sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.retrieval.grounding import Grounding
from finetune_trainer.retrieval.words import Language, language_of, terms

ENGLISH = "The tools are kept in the depot, and they are not to be left out in the rain by those who have borrowed them."
GERMAN = "Die Werkzeuge sind im Lager, und sie dürfen nicht von denen, die sie geliehen haben, im Regen gelassen werden."
FRENCH = "Les outils sont dans le dépôt, et ils ne doivent pas être laissés sous la pluie par ceux qui les ont empruntés."
TURKISH = "Bu aletler depoda durur ve onlar için çok önemli bir şey daha var: ne kadar süre kal\u0131r."
POLISH = "Narzędzia trzymamy w magazynie; nie wolno ich zostawiać na deszczu."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Fish, chips AND peas", ["fish", "chips", "and", "peas"]),
        ("The customer's re-run", ["the", "customer", "s", "re", "run"]),
        ("1,000 at 3.5% by 14:30; 1,00 or 12,345,678.", ["1000", "at", "3.5", "by", "14:30", "1,00", "or", "12345678"]),
        ("Straße \uff26\uff35\uff2c\uff2c cafe\u0301", ["strasse", "full", "café"]),
        ("東京都 a", ["東京", "京都", "a"]),
        ("町", ["町"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("snake_case x" + "y" * 100, ["snake", "case", "x" + "y" * 63]),
        ("— … !", []),
    ],
)
def test_terms(text: str, found: list[str]) -> None:
    assert terms(text) == found


@given(st.text(st.sampled_from("aZ09.,:_'- \n\t"), max_size=40))
def test_terms_of_plain_text_are_those_that_any_text_has(text: str) -> None:
    assert terms(text + " ü") == [*terms(text), "ü"]


@pytest.mark.parametrize(
    ("text", "name"),
    [(ENGLISH, "english"), (GERMAN, "german"), (FRENCH, "french"), (TURKISH, "turkish"), (POLISH, ""), ("", "")],
)
def test_the_language_is_told_by_its_frequent_words(text: str, name: str) -> None:
    assert language_of([text]).name == name


def test_endings_are_cut_off_as_the_language_has_them() -> None:
    english, german = language_of([ENGLISH]), language_of([GERMAN])
    assert english.stems("The deliveries were delivered") == ["deliveri", "deliv"]  # as snowballstem.org says
    assert english.stems("refunds for a refund") == ["refund", "refund"]
    assert german.stems("die Werkzeuge, das Werkzeug") == ["werkzeug", "werkzeug"]
    assert Language().stems("the refunds") == ["the", "refunds"]


def test_a_text_of_nothing_but_stop_words_can_be_searched_yet_has_no_content() -> None:
    english = language_of([ENGLISH])
    assert english.stems("to be or not to be") == ["to", "be", "or", "not", "to", "be"]
    assert english.content("to be or not to be") == []


PASSAGE = "Late returns\nTools that come back late cost 2 euros a day, at most 1,000 euros. The desk opens at 14:30."


@pytest.mark.parametrize(
    ("sentence", "held"),
    [
        ("Late tools cost 2 euros per day", True),
        ("A tool costs money", True),  # two of three words
        ("Members pay a deposit", False),
        ("Late tools cost 3 euros per day", False),  # the passage has no 3
        ("At most 1000 euros", True),
        ("The desk opens at 14:30", True),
        ("The desk opens at 14:45", False),
        ("It is what it is", False),
        ("", False),
    ],
)
def test_a_sentence_is_held_by_a_passage_with_half_its_words_and_all_its_numbers(sentence: str, held: bool) -> None:
    grounding = Grounding(language_of([ENGLISH]), 0.5)
    assert grounding.holds(sentence, [grounding.facts("Elsewhere"), grounding.facts(PASSAGE)]) is held


def test_one_passage_must_hold_enough_alone() -> None:
    grounding = Grounding(language_of([ENGLISH]), 0.75)
    halves = [grounding.facts("red green"), grounding.facts("blue white")]
    assert not grounding.holds("red green blue white", halves)
    assert grounding.holds("red green blue white", [grounding.facts("green blue white")])


def test_without_a_least_share_everything_is_held() -> None:
    assert Grounding(Language(), 0.0).holds("anything 7", [])
