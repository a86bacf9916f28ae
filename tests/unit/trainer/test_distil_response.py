"""Divergences of the next token's distribution against torch's own KL in float64, dense, and their slopes by finite differences."""

import math

import pytest
import torch
from torch.nn import functional

from finetune_api.estimate import CHUNK
from finetune_trainer.objectives.distillation.divergences import DIVERGENCES
from finetune_trainer.objectives.distillation.head import score_logits
from finetune_trainer.objectives.distillation.response import Largest, Response, cross_entropy, largest, together, whole
from finetune_trainer.objectives.linear_score import Logits, Score, chunks, linear_score

NAMES = sorted(DIVERGENCES)


def dense(name: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The published formula over whole distributions, by torch.distributions; float64 [N, V] logits."""
    q = torch.distributions.Categorical(logits=student / temperature)
    p = torch.distributions.Categorical(logits=teacher / temperature)
    if name == "forwardKL":
        value = torch.distributions.kl_divergence(p, q)
    elif name == "reverseKL":
        value = torch.distributions.kl_divergence(q, p)
    else:
        middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        value = (torch.distributions.kl_divergence(p, middle) + torch.distributions.kl_divergence(q, middle)) / 2
    return value.sum() * temperature**2


def logits(rows: int, width: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_each_divergence_is_its_formula_with_its_gradient(name: str, temperature: float) -> None:
    student, teacher = logits(7, 13, 1).requires_grad_(), logits(7, 13, 2)
    expected = dense(name, student, teacher, temperature)
    slope = torch.autograd.grad(expected, student)[0]
    value = score_logits(student, whole(Response.named(0.7, name, temperature), lambda part: teacher[part]))
    torch.testing.assert_close(value, 0.7 * expected)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], 0.7 * slope)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_by_finite_differences(name: str) -> None:
    hidden, weight, bias = logits(4, 3, 3).requires_grad_(), logits(6, 3, 4).requires_grad_(), logits(1, 6, 5)[0].requires_grad_()
    teacher, targets = logits(4, 6, 6), torch.tensor([0, 5, 2, 2])
    score = together(cross_entropy(0.5, targets), whole(Response.named(1.0, name, 2.0), lambda part: teacher[part]))
    assert torch.autograd.gradcheck(lambda *inputs: linear_score(*inputs, Logits(torch.float64), score), (hidden, weight, bias))


@pytest.mark.parametrize("name", NAMES)
def test_slopes_of_the_largest_by_finite_differences(name: str) -> None:
    student, taught = logits(5, 8, 7).requires_grad_(), of(logits(5, 8, 8), 3)
    score = largest(Response.named(1.3, name, 1.5), taught)
    assert torch.autograd.gradcheck(lambda values: score_logits(values, score), (student,))


def test_two_outcomes_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = 3/4 ln 3/2 + 1/4 ln 1/2; KL(q||p) = 1/2 ln 2/3 + 1/2 ln 2."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    middle = [5 / 8, 3 / 8]
    by_hand = {
        "forwardKL": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverseKL": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "jensenShannon": (
            0.75 * math.log(0.75 / middle[0]) + 0.25 * math.log(0.25 / middle[1])
            + 0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])
        ) / 2,
    }  # fmt: skip
    for name, expected in by_hand.items():
        value = score_logits(student, whole(Response.named(1.0, name, 1.0), lambda part: teacher[part]))
        assert float(value) == pytest.approx(expected, rel=1e-6), name


def of(teacher: torch.Tensor, k: int, temperature: float = 1.5) -> Largest:
    """The k largest of these logits, kept at a temperature."""
    log_p = (teacher / temperature).log_softmax(dim=1)
    values, ids = log_p.topk(k, dim=1)
    rest = (1 - values.exp().sum(dim=1, keepdim=True)).clamp_min(0).log()
    return Largest(ids, torch.cat([values, rest], dim=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 4])
def test_the_largest_are_compared_as_outcomes_beside_all_others(name: str, k: int) -> None:
    """Worked out by merging the other tokens into one outcome before the dense formula is taken."""
    student, teacher = logits(6, 9, 9).requires_grad_(), logits(6, 9, 10)
    taught = of(teacher, k)

    def merged(values: torch.Tensor) -> torch.Tensor:
        probabilities = (values / 1.5).softmax(dim=1)
        named = probabilities.gather(1, taught.ids)
        return torch.cat([named, 1 - named.sum(dim=1, keepdim=True)], dim=1).log()

    expected = dense(name, merged(student), merged(teacher), 1.0) * 1.5**2
    value = score_logits(student, largest(Response.named(1.0, name, 1.5), taught))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_as_the_largest_are_the_whole(name: str) -> None:
    student, teacher = logits(6, 9, 11).requires_grad_(), logits(6, 9, 12)
    ids = torch.argsort(teacher, dim=1, descending=True)
    log_p = (teacher / 1.5).log_softmax(dim=1).gather(1, ids)
    taught = Largest(ids, torch.cat([log_p, torch.full((6, 1), -torch.inf)], dim=1))
    value = score_logits(student, largest(Response.named(1.0, name, 1.5), taught))
    expected = dense(name, student, teacher, 1.5)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-6, atol=1e-9)


def test_fewer_than_k_are_filled_up_with_one_of_them() -> None:
    student = logits(1, 6, 13).requires_grad_()
    short = Largest(torch.tensor([[4, 2]]), torch.tensor([[0.5, 0.3, 0.2]]).double().log())
    filled = Largest(torch.tensor([[4, 2, 4, 4]]), torch.tensor([[0.5, 0.3, 0.0, 0.0, 0.2]]).double().log())
    values = [score_logits(student, largest(Response.named(1.0, name, 1.0), each)) for name in NAMES for each in (short, filled)]
    slopes = [torch.autograd.grad(value, student)[0] for value in values]
    for place in range(0, len(values), 2):
        torch.testing.assert_close(values[place], values[place + 1])
        torch.testing.assert_close(slopes[place], slopes[place + 1])


def test_one_certain_token_is_the_cross_entropy() -> None:
    """A hard label as a teacher: KL to one certain outcome is -log q of it."""
    student, targets = logits(5, 7, 14).requires_grad_(), torch.tensor([3, 0, 6, 6, 1])
    certain = Largest(targets[:, None], torch.tensor([[0.0, -torch.inf]]).double().expand(5, 2))
    value = score_logits(student, largest(Response.named(1.0, "forwardKL", 1.0), certain))
    expected = functional.cross_entropy(student, targets, reduction="sum")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_distribution_costs_nothing_and_pulls_nowhere(name: str) -> None:
    student = logits(5, 7, 15).requires_grad_()
    fixed = student.detach()
    for score in (
        whole(Response.named(1.0, name, 2.0), lambda part: fixed[part]),
        largest(Response.named(1.0, name, 1.5), of(fixed, 3)),
    ):
        value = score_logits(student, score)
        assert abs(value.item()) < 1e-12
        assert float(torch.autograd.grad(value, student)[0].abs().max()) < 1e-12


def test_what_only_one_output_layer_has_is_left_out() -> None:
    """Models of one family fill the output layer up to different sizes; the teacher's 9 columns or 5 beside the student's 7."""
    student = logits(4, 7, 16).requires_grad_()
    for width in (9, 5):
        teacher, common = logits(4, width, 17), min(7, width)
        value = score_logits(student, whole(Response.named(1.0, "forwardKL", 1.0), lambda part, teacher=teacher: teacher[part]))
        expected = dense("forwardKL", student[:, :common], teacher[:, :common], 1.0)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("rows", [1, CHUNK, CHUNK + 1])
def test_chunks_give_what_the_whole_gives(rows: int) -> None:
    hidden, weight = logits(rows, 4, 18).requires_grad_(), logits(5, 4, 19).requires_grad_()
    teacher, targets = logits(rows, 5, 20), torch.zeros(rows, dtype=torch.int64)
    expected = dense("jensenShannon", hidden @ weight.T, teacher, 1.0) + functional.cross_entropy(
        hidden @ weight.T, targets, reduction="sum"
    )
    score: Score = together(cross_entropy(1.0, targets), whole(Response.named(1.0, "jensenShannon", 1.0), lambda part: teacher[part]))
    value = linear_score(hidden, weight, None, Logits(torch.float64), score)
    torch.testing.assert_close(value, expected)
    for ours, reference in zip(torch.autograd.grad(value, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_micro_batch_without_labels_has_no_loss() -> None:
    hidden, weight = logits(0, 4, 21).requires_grad_(), logits(5, 4, 22).requires_grad_()
    score = together(
        cross_entropy(1.0, torch.zeros(0, dtype=torch.int64)), whole(Response.named(1.0, "forwardKL", 1.0), lambda part: hidden)
    )
    value = linear_score(hidden, weight, None, Logits(torch.float64), score)
    assert value.item() == 0.0
    assert torch.autograd.grad(value, weight)[0].abs().sum() == 0


def test_a_large_vocabulary_is_computed_a_few_positions_at_a_time() -> None:
    on_cpu = chunks(80, 131_072, torch.device("cpu"))
    assert [(part.start, part.stop) for part in on_cpu] == [(0, 32), (32, 64), (64, 80)]
    on_gpu = chunks(1200, 131_072, torch.device("cuda"))
    assert [(part.start, part.stop) for part in on_gpu] == [(0, 512), (512, 1024), (1024, 1200)]


def test_without_gradients_nothing_is_kept_for_them() -> None:
    with torch.no_grad():
        value = linear_score(
            torch.ones(2, 3), torch.ones(4, 3, requires_grad=True), None, Logits(torch.float32), cross_entropy(1.0, torch.tensor([0, 1]))
        )
    assert not value.requires_grad
    assert float(value) == pytest.approx(2 * math.log(4), rel=1e-6)
