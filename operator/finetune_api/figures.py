"""Measured values and the verdicts on them, in words: the same from the trainer and from the operator. Pure."""

from finetune_api.outcomes import Evaluation, GateResult


def figure(value: float | None) -> str:
    """A measured value."""
    return "not measured" if value is None else f"{value:.6g}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends of an interval, with a space before; nothing where there is none."""
    return "" if low is None or high is None else f" ({low:.6g} to {high:.6g})"


def gate_in_words(gate: GateResult) -> str:
    """The verdict on one gate."""
    over = f" than {gate.over}" if gate.over and gate.over not in gate.required else ""
    return f"{gate.metric}: {gate.verdict}: {figure(gate.observed)}{interval(gate.low, gate.high)}, required {gate.required}{over}"


def gates_in_words(evaluation: Evaluation) -> str:
    """How many gates are passed, and which are not."""
    passed = sum(gate.verdict == "Passed" for gate in evaluation.gates)
    others = (gate_in_words(gate) for gate in evaluation.gates if gate.verdict != "Passed")
    return "; ".join((f"{passed} of {len(evaluation.gates)} gates passed", *others))
