"""What a worker computes at once."""

import numpy as np

from finetune_trainer.data.shares import Limit, Piece, Sharing

LENGTHS = np.array([10, 20, 30, 40, 50], dtype=np.int64)
ROWS = ((0, 1), (2,), (3,), (4,))
"""30, 30, 40 and 50 tokens."""


def test_all_rows_are_computed_once() -> None:
    for world in (1, 2, 3, 5):
        for limit in (Limit("auto", 60), Limit(1, 0), Limit(3, 0)):
            pieces = [Sharing(rank, world).pieces(ROWS, LENGTHS, limit) for rank in range(world)]
            assert sorted(row for own in pieces for piece in own for row in piece.rows) == sorted(ROWS)


def test_together_all_compute_equally_often() -> None:
    """Longest first, each to the worker with the least: 50 + 30 tokens and 40 + 30, one row at a time; a fifth worker has none."""
    two = [Sharing(rank, 2, together=True).pieces(ROWS, LENGTHS, Limit(1, 0)) for rank in range(2)]
    assert [len(own) for own in two] == [2, 2]
    five = [Sharing(rank, 5, together=True).pieces(ROWS, LENGTHS, Limit(1, 0)) for rank in range(5)]
    assert [[piece.idle for piece in own] for own in five] == [[False], [False], [False], [False], [True]]
    three = [Sharing(rank, 3, together=True).pieces(ROWS, LENGTHS, Limit(1, 0)) for rank in range(3)]
    assert [sum(piece.idle for piece in own) for own in three] == [1, 1, 0]


def test_half_of_what_was_too_much() -> None:
    assert Limit("auto", 4096).halved(90) == Limit("auto", 45)
    assert Limit("auto", 50).halved(90) == Limit("auto", 25)
    assert Limit(8, 4096).halved(2) == Limit(1, 4096)
    assert str(Limit("auto", 45)) == "45 tokens"
    assert (str(Limit(1, 0)), str(Limit(2, 0))) == ("1 sequence", "2 sequences")


def test_the_largest_piece_is_the_same_for_all() -> None:
    """Of 50 + 30 and 40 + 30 tokens: 80; as lines of one length, 2 times 50 and 3 times 40: 120. By rows: two."""
    assert {Sharing(rank, 2).largest(ROWS, LENGTHS, Limit("auto", 100)) for rank in range(2)} == {80}
    assert {Sharing(rank, 2, padded=True).largest(ROWS, LENGTHS, Limit("auto", 120)) for rank in range(2)} == {120}
    assert {Sharing(rank, 2).largest(ROWS, LENGTHS, Limit(5, 0)) for rank in range(2)} == {2}


def test_padding_takes_memory() -> None:
    """One line of 50 and, in the same piece, one of 40: 100 positions; with two more of 10 and 20 it would be 200."""
    pieces = Sharing(0, 1, padded=True).pieces(ROWS, LENGTHS, Limit("auto", 100))
    assert pieces == [Piece(((4,), (3,))), Piece(((0, 1), (2,)))]
