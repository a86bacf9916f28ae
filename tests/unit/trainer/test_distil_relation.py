"""Relations and features against the published formulas, worked out pair by pair and triple by triple in float64."""

import itertools
import math

import pytest
import torch

from finetune_trainer.objectives.distillation.feature import attention_rows, hidden_states, new_projection
from finetune_trainer.objectives.distillation.relation import LARGEST_ANGLE, LARGEST_PAIR, Relations, angle, distance, evenly, similarity


def vectors(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def huber(difference: float) -> float:
    """Park et al. 2019, equation 6."""
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def distances_by_hand(points: list[list[float]]) -> list[float]:
    """Equation 4 and 5: Euclidean distances of pairs, divided by their mean."""
    raw = [math.dist(one, other) for one, other in itertools.combinations(points, 2)]
    return [value / (sum(raw) / len(raw)) for value in raw]


def cosines_by_hand(points: list[list[float]]) -> list[float]:
    """Equation 7: for all triples the cosine of the angle at the second point."""
    values = []
    for i, j, k in itertools.permutations(range(len(points)), 3):
        one, other = ([a - b for a, b in zip(points[place], points[j], strict=True)] for place in (i, k))
        product = sum(a * b for a, b in zip(one, other, strict=True))
        values.append(product / (math.hypot(*one) * math.hypot(*other)))
    return values


def mean_huber(ours: list[float], theirs: list[float]) -> float:
    return sum(huber(one - other) for one, other in zip(ours, theirs, strict=True)) / len(ours)


@pytest.mark.parametrize("count", [2, 5])
def test_distance_is_its_formula(count: int) -> None:
    student, teacher = vectors(count, 3, 1), vectors(count, 6, 2)
    expected = mean_huber(distances_by_hand(student.tolist()), distances_by_hand(teacher.tolist()))
    assert distance(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_distance_of_a_far_point_by_hand() -> None:
    """On a line at 0, 1, 10: distances 1, 9, 10, mean 20/3. At 0, 5, 10: 5, 5, 10, the same mean. Huber of -0.6, 0.6, 0: 0.36 / 3."""
    student, teacher = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.0, 0.0], [5.0, 0.0], [10.0, 0.0]])
    assert distance(student, teacher).item() == pytest.approx(0.36 / 3, rel=1e-6)


def test_angle_is_its_formula() -> None:
    student, teacher = vectors(5, 3, 3), vectors(5, 6, 4)
    expected = mean_huber(cosines_by_hand(student.tolist()), cosines_by_hand(teacher.tolist()))
    assert angle(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_similarity_is_its_formula() -> None:
    """Tung and Mori 2019: G = Q Q^T, each row divided by its L2 norm; the squared Frobenius norm of the difference over b squared."""
    student, teacher = vectors(4, 3, 5), vectors(4, 6, 6)
    total = 0.0
    rows = []
    for each in (student.tolist(), teacher.tolist()):
        products = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in each] for one in each]
        rows.append([[value / math.hypot(*row) for value in row] for row in products])
    for one, other in zip(*rows, strict=True):
        total += sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    assert similarity(student, teacher).item() == pytest.approx(total / 16, abs=1e-6)


def test_the_same_relations_cost_nothing() -> None:
    """Vectors that are turned, moved and scaled have the same angles and (over their mean) distances; not moved, the same similarities."""
    teacher = vectors(6, 4, 7)
    turn = torch.linalg.qr(vectors(4, 4, 8))[0]
    student = teacher @ turn * 3
    assert Relations(1.0, 2.0, 1.0).loss(student, teacher).item() == pytest.approx(0, abs=1e-9)
    assert Relations(1.0, 2.0, 0.0).loss(student + 5, teacher).item() == pytest.approx(0, abs=1e-9)
    assert Relations(1.0, 2.0, 1.0).loss(vectors(6, 4, 9), teacher).item() > 0.1


def test_weights_are_those_of_the_parts() -> None:
    student, teacher = vectors(5, 4, 10), vectors(5, 4, 11)
    parts = [Relations(*weights).loss(student, teacher).item() for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    assert parts == pytest.approx([each(student, teacher).item() for each in (distance, angle, similarity)])
    total = Relations(0.5, 2.0, 3.0).loss(student, teacher).item()
    assert total == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-6)


@pytest.mark.parametrize(("count", "lacks"), [(0, "all"), (1, "all"), (2, "angle")])
def test_too_few_have_no_relation(count: int, lacks: str) -> None:
    loss = Relations(0.0 if lacks == "angle" else 1.0, 2.0, 0.0).loss(vectors(count, 3, 12), vectors(count, 3, 13))
    assert loss.item() == 0.0


def test_gradients_are_those_of_finite_differences() -> None:
    teacher = vectors(4, 3, 14).double()
    student = vectors(4, 2, 15).double().requires_grad_()
    for part in (distance, angle, similarity):
        assert torch.autograd.gradcheck(lambda values, part=part: part(values, teacher), (student,)), part


def test_vectors_that_are_the_same_leave_a_finite_gradient() -> None:
    teacher = vectors(5, 3, 16)
    for student in (torch.cat([teacher[:3], teacher[:2]]), torch.zeros(5, 3)):
        moving = student.clone().requires_grad_()
        loss = Relations(1.0, 2.0, 1.0).loss(moving, torch.cat([teacher[:3], teacher[:2]]))
        gradient = torch.autograd.grad(loss, moving)[0]
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_of_many_evenly_spaced_ones_are_taken() -> None:
    assert evenly(4, 4) == slice(None)
    assert evenly(9, 3) == [0, 4, 8]
    assert evenly(100, LARGEST_ANGLE)[-1] == 99
    assert len(set(evenly(1000, LARGEST_PAIR))) == LARGEST_PAIR
    many, teacher = vectors(70, 3, 17), vectors(70, 5, 18)
    chosen = [place * 69 // 31 for place in range(32)]
    assert Relations(0.0, 1.0, 0.0).loss(many, teacher).item() == pytest.approx(angle(many[chosen], teacher[chosen]).item(), rel=1e-6)


def test_hidden_states_by_hand() -> None:
    """Differences (1, -1) and (0, 2): means of squares 1 and 2."""
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert hidden_states(student, teacher, None).item() == pytest.approx(3.0)


def test_a_projection_takes_the_student_to_the_teachers_width() -> None:
    student, teacher, projection = vectors(4, 2, 19), vectors(4, 3, 20), vectors(3, 2, 21)
    expected = sum(
        (sum(projection[row, column] * vector[column] for column in range(2)) - target[row]) ** 2 / 3
        for vector, target in zip(student, teacher, strict=True)
        for row in range(3)
    )
    torch.testing.assert_close(hidden_states(student, teacher, projection), expected)


def test_new_projections_follow_from_the_seed_and_keep_the_size() -> None:
    cpu = torch.device("cpu")
    one, again, other, pair = (new_projection(64, 256, seed, index, cpu) for seed, index in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, pair)
    assert (vectors(500, 64, 22) @ one.detach().T).std().item() == pytest.approx(1.0, rel=0.05)


def test_attention_rows_are_torchs_kl() -> None:
    """Two rows of two heads; the second position is not seen in the first row."""
    student, teacher = vectors(4, 3, 23).view(2, 2, 3).softmax(-1), vectors(4, 3, 24).view(2, 2, 3)
    teacher[0, :, 2] = -torch.inf
    teacher = teacher.softmax(-1)
    expected = sum(
        sum(t * math.log(t / s) for s, t in zip(ours, theirs, strict=True) if t > 0) / 2
        for ours, theirs in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True)
    )
    assert attention_rows(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert attention_rows(teacher, teacher).item() == 0


def test_maps_of_another_number_of_heads_are_compared_by_their_mean() -> None:
    student, teacher = vectors(4, 3, 25).view(1, 4, 3).softmax(-1), vectors(2, 3, 26).view(1, 2, 3).softmax(-1)
    ours, theirs = student[0].mean(0).tolist(), teacher[0].mean(0).tolist()
    expected = sum(t * math.log(t / s) for s, t in zip(ours, theirs, strict=True))
    assert attention_rows(student, teacher).item() == pytest.approx(expected, rel=1e-5)
