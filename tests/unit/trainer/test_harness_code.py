"""Tasks of lm-eval whose files run what a model writes, found without any of it being imported."""

import importlib.util
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest

from finetune_trainer.evaluation.harness_code import program_in


def task_of(file: Path) -> object:
    """A task that scores with a function of that file."""
    return SimpleNamespace(
        config={"metric_list": [{"metric": partial(FunctionType((lambda: None).__code__.replace(co_filename=str(file)), {}))}]}
    )


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("score/math/utils_math.py", "math_grader.py"),
        ("longproc/metrics.py", "metrics.py"),
        ("cruxeval/utils.py", "utils.py"),
        ("truthfulqa/utils.py", None),
        ("ifeval/utils.py", None),
        ("minerva_math/utils.py", None),
    ],
)
def test_tasks_of_the_harness(module: str, found: str | None) -> None:
    """score's takes `sympy.parse_expr` of the answer, longproc's countdown `eval`; neither says that it is unsafe."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    program = program_in(task_of(Path(spec.submodule_search_locations[0]) / "tasks" / module))
    assert (program.name if program else None) == found


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("def f(a):\n    return eval(a)", True),
        ("exec(answer)", True),
        ("subprocess.run(answer)", True),
        ("os.system(answer)", True),
        ("model.eval()", False),
        ("re.compile(answer)", False),
        ("def _subprocess(doc): ...", False),
    ],
)
def test_what_counts_as_running_a_text(tmp_path: Path, text: str, runs: bool) -> None:
    (tmp_path / "utils.py").write_text(text)
    assert (program_in(task_of(tmp_path / "utils.py")) is not None) == runs


def test_a_task_without_code_of_its_own() -> None:
    assert program_in(SimpleNamespace(config={"metric_list": [{"metric": "acc"}], "doc_to_text": "{{question}}"})) is None
    assert program_in(SimpleNamespace()) is None
