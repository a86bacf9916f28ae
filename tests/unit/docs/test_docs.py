"""The documents tell the truth: their manifests are accepted, their commands understood, their links lead somewhere."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from tests.unit.docs.commands import commands, problem
from tests.unit.docs.markdown import DOCUMENTS, EXAMPLES, ROOT, Block, anchors, blocks, comments, languages, links

from finetune_api import KIND
from finetune_api.profile import PROFILE_KIND, parse_profile
from finetune_api.report import Report
from finetune_api.status import Status
from finetune_api.v1alpha1 import Method, Objective, parse_job
from finetune_operator.manifest import read_manifests
from finetune_operator.metrics import Metrics
from finetune_trainer.data.formats import Format, detect_format, example_from
from finetune_trainer.data.rows import Fault, Place, Row
from finetune_trainer.training_series import PREFIX, Workers, series

COMMANDS = [(f"{block} {' '.join(command)}", command) for block in (*blocks("sh"), *map(comments, EXAMPLES)) for command in commands(block)]


def test_every_block_is_of_a_kind_that_is_looked_at_here() -> None:
    """One without a language is a drawing."""
    assert languages() == {"", "json", "python", "sh", "yaml"}


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_manifests_are_accepted(block: Block) -> None:
    manifests = read_manifests(block.text)
    assert manifests
    for manifest in manifests:
        if manifest.get("kind") == KIND:
            parse_job(manifest)
        if manifest.get("kind") == PROFILE_KIND:
            parse_profile(manifest)
        if "status" in manifest:
            assert set(manifest["status"]) <= {field.alias or name for name, field in Status.model_fields.items()}
            Status.model_validate(manifest["status"])


@pytest.mark.parametrize("command", [command for _, command in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_commands_are_understood(command: tuple[str, ...]) -> None:
    assert problem(command) is None


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_programs_are_python_that_imports_what_is_installed(block: Block) -> None:
    imports = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    for node in imports:
        for name in [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            assert importlib.util.find_spec(name), f"there is no module {name}"


@pytest.mark.parametrize(
    ("document", "formats"),
    [("README.md", ["messages", "promptCompletion", "text"]), ("docs/tuning.md", ["preference", "preference"])],
)
def test_rows_are_examples(document: str, formats: list[Format]) -> None:
    (block,) = (block for block in blocks("json") if block.document == ROOT / document)
    rows = [Row(Place(document, number), json.loads(line)) for number, line in enumerate(block.text.splitlines(), 1)]
    assert [detect_format(row, {}, preferences="chosen" in row.columns) for row in rows] == formats
    for row, form in zip(rows, formats, strict=True):
        assert not isinstance(example_from(row, form, {}), Fault)


def test_every_job_of_a_method_or_an_objective_is_named_where_one_chooses() -> None:
    document = ROOT / "docs/tuning.md"
    named = {(document.parent / target).resolve() for target in links(document)}
    jobs = {path for path in EXAMPLES if path.parent.name in ("methods", "objectives")}
    assert len(jobs) > 10
    assert jobs <= named
    text = document.read_text(encoding="utf-8")
    for model in (Method, Objective):
        for name, field in model.model_fields.items():
            assert f"| `{field.alias or name}`" in text


def test_every_job_of_a_method_or_an_objective_says_how_it_is_run() -> None:
    for path in EXAMPLES:
        if path.parent.name in ("methods", "objectives"):
            assert [command[:3] for command in commands(comments(path)) if command[0] == "finetune"] == [
                ("finetune", "local", str(path.relative_to(ROOT)))
            ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_metrics_that_are_named_exist(document: Path) -> None:
    operator = set(re.findall(r"^# TYPE (\w+)", Metrics("1", lambda: 0.0, lambda: True).render().decode(), re.MULTILINE))
    told = series(Report(job_uid="uid", attempt=1), Workers())
    trainer = {f"{PREFIX}{each.name}{'_total' if each.kind == 'counter' else ''}" for each in told} | {f"{PREFIX}stage"}
    named = set(re.findall(r"`(finetune_(?:job|namespace|training|operator)_\w+)`", document.read_text(encoding="utf-8")))
    assert named <= operator | trainer


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert found.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(found), f"{target}: there is no such heading"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("make nothing", "no target nothing"),
        ("finetune locally examples/quickstart.yaml", "locally"),
        ("finetune local examples/quickstart.yaml --fast", "--fast"),
        ("finetune local examples/absent.yaml", "absent.yaml"),
        ("finetune local examples/quickstart.yaml --claim quickstart/models=examples/absent", "examples/absent"),
        ("kubectl apply -f examples/absent.yaml", "absent.yaml"),
        ("kubectl wait --for=condition=Done finetunejob/quickstart", "no condition Done"),
        ("kubectl get finetunejob absent", "absent"),
        ("kubectl frobnicate pod quickstart-storage", "frobnicate"),
        ("kubectl cp examples/absent quickstart-storage:/storage", "examples/absent"),
        ("kubectl explain finetunejob.spec.trainings", "trainings"),
        ("helm install x charts/absent --set a=b", "charts/absent"),
        ("helm install x charts/finetune-operator --set trainer.replicas=2", "replicas"),
        ("docker build -t x --target absent .", "no target absent"),
        ("docker build -t x --target trainer --build-arg ABSENT=1 .", "no argument ABSENT"),
        ("python examples/absent.py", "absent.py"),
        ("vllm serve model --lora adapter", "vLLM"),
        ("true && curl https://example.com", "true"),
    ],
)
def test_a_command_that_would_fail_is_found(line: str, words: str) -> None:
    command = next(commands(Block(ROOT / "README.md", 1, line)))
    found = problem(command)
    assert found is not None
    assert words in found


def test_commands_are_taken_apart_as_a_shell_does() -> None:
    text = "make demo  # all\nA=1 kubectl get \\\n  pods | python x.py && make test\n# nothing\n"
    assert list(commands(Block(ROOT / "README.md", 1, text))) == [
        ("make", "demo"),
        ("kubectl", "get", "pods"),
        ("python", "x.py"),
        ("make", "test"),
    ]
