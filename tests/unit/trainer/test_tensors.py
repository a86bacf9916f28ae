import numpy as np
import torch

from finetune_trainer.data.examples import join
from finetune_trainer.data.tensors import IGNORED, collate

EXAMPLES = join(
    [
        (np.array([10, 11, 12], np.int32), np.array([False, False, True])),
        (np.array([20, 21], np.int32), np.array([True, True])),
        (np.array([30, 31, 32, 33], np.int32), np.array([False, True, False, True])),
    ]
)


def test_a_flat_row_by_hand() -> None:
    """Targets are the next tokens of the same example; positions restart; the last token of an example predicts nothing."""
    batch = collate(EXAMPLES, [(2, 0), (1,)], "flat")
    assert batch.input_ids.tolist() == [[30, 31, 32, 33, 10, 11, 12, 20, 21]]
    assert batch.targets.tolist() == [[31, IGNORED, 33, IGNORED, IGNORED, 12, IGNORED, 21, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.label_positions.tolist() == [0, 2, 5, 7]
    assert batch.document_lengths == (4, 3, 2)
    assert (batch.tokens, batch.labels) == (9, 4)


def test_padded_lines_by_hand() -> None:
    batch = collate(EXAMPLES, [(2, 0), (1,)], "padded")
    assert batch.input_ids.tolist() == [[30, 31, 32, 33], [10, 11, 12, 0], [20, 21, 0, 0]]
    assert batch.targets.tolist() == [[31, IGNORED, 33, IGNORED], [IGNORED, 12, IGNORED, IGNORED], [21, IGNORED, IGNORED, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.label_positions.tolist() == [0, 2, 5, 8]
    assert (batch.tokens, batch.labels) == (9, 4)


def test_the_labels_of_a_batch_are_those_the_examples_count() -> None:
    assert EXAMPLES.label_counts().tolist() == [1, 1, 2]
    assert collate(EXAMPLES, [(0, 1, 2)], "flat").labels == 4


def test_moving_a_batch_keeps_its_boundaries() -> None:
    batch = collate(EXAMPLES, [(0, 1)], "flat").to(torch.device("meta"))
    assert batch.input_ids.is_meta
    assert batch.label_positions.is_meta
    assert batch.document_lengths == (3, 2)
