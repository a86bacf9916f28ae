"""Passages: how documents are cut."""

from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.retrieval.documents import Document, Section
from finetune_trainer.retrieval.passages import Passage, passages_of, pieces


def test_a_text_that_fits_is_one_piece_as_it_stands() -> None:
    assert list(pieces("One,  two.\n\nThree!", 3, 1)) == ["One,  two.\n\nThree!"]


def test_pieces_have_so_many_words_and_begin_with_the_last_of_the_one_before() -> None:
    text = " ".join(f"w{number}" for number in range(25))
    assert [piece.split() for piece in pieces(text, 10, 3)] == [
        [f"w{number}" for number in range(10)],
        [f"w{number}" for number in range(7, 17)],
        [f"w{number}" for number in range(14, 24)],
        ["w21", "w22", "w23", "w24"],
    ]


def test_a_piece_ends_with_a_sentence_if_that_is_late_enough() -> None:
    assert list(pieces("a b. c d e f g. h i j k l", 10, 0)) == ["a b. c d e f g.", "h i j k l"]
    assert list(pieces("a b. c d e f g h i j k l", 10, 0)) == ["a b. c d e f g h i j", "k l"]
    assert list(pieces("a b c d e f g\n\nh i j k l", 10, 0)) == ["a b c d e f g", "h i j k l"]
    assert list(pieces('a b c d e f "g." h i j k l', 10, 0)) == ['a b c d e f "g."', "h i j k l"]


def test_scripts_without_spaces_are_counted_by_their_characters() -> None:
    assert list(pieces("東京都は大きい町です。人が多い。", 9, 0)) == ["東京都は大きい町で", "す。人が多い。"]


def test_what_has_no_letter_is_no_piece_and_what_has_no_space_is_cut() -> None:
    assert list(pieces(" --- \n * * *", 8, 0)) == []
    assert list(pieces("", 8, 0)) == []
    assert [len(piece) for piece in pieces("x" * 1000, 8, 0)] == [512, 488]


def test_passages_stay_under_their_heading_and_come_once() -> None:
    sections = (Section("A", "one two"), Section("B", "three"), Section("A", "one two"))
    documents = [Document("a.md", sections), Document("b.md", (Section("A", "one two"), Section("C", "one two")))]
    assert list(passages_of(documents, 8, 2)) == [
        Passage("a.md", "A", "one two"),
        Passage("a.md", "B", "three"),
        Passage("b.md", "C", "one two"),
    ]
    assert Passage("a.md", "A", "one two").shown == "A\none two"
    assert Passage("a.md", "", "one two").shown == "one two"


@given(
    st.lists(st.sampled_from(["word", "end.", "no!\n\n", "\n", "東", "1"]), max_size=80),
    st.integers(1, 12),
    st.data(),
)
def test_pieces_lose_nothing_and_end(words: list[str], most: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, most - 1))
    text = " ".join(words)
    made = list(pieces(text, most, overlap))
    spoken = [part.split() for part in made]
    assert all(len(part) <= most for part in spoken)
    whole: list[str] = []
    for number, part in enumerate(spoken):
        if number:
            assert part[:overlap] == whole[len(whole) - overlap :]
        whole += part[overlap:] if number else part
    assert whole == text.split()
