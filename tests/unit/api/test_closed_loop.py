"""What the rules of the closed loop say in Python alone, and what others ask the spec for. CEL's part: the corpus in tests/data/jobs."""

import json
import time

import pytest
from pydantic import ValidationError

from finetune_api.evaluation import GENERATED_METRICS, SCORED_METRICS, EvaluationPlan, LmEval, Suite
from finetune_api.loop_rules import GAP, TEST_METRICS, VALIDATION_METRICS, answered_metrics, goal_metrics, known_metrics
from finetune_api.outcomes import RESULTS_MAX
from finetune_api.patterns import check_pattern
from finetune_api.references import Reference, references_of
from finetune_api.search import SEARCHABLE
from finetune_api.sources import ConfigMapSource, DataSource
from finetune_api.v1alpha1 import Spec, parse_job, stages_of
from finetune_operator.manifest import explain

SUITES = [
    {"name": "task", "source": "test", "metrics": ["loss", "exactMatch"]},
    {"name": "general", "role": "forgetting", "lmEval": {"tasks": ["hellaswag", "arc"]}},
]


def spec_of(**parts: object) -> Spec:
    spec = {
        "model": {"source": "hf://org/model"},
        "data": {"train": {"source": "pvc://data/train.jsonl"}},
        "method": {"lora": {}},
        "output": {"storage": "pvc://models/bot"},
        **parts,
    }
    return parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "a"}, "spec": spec}).spec


def refusal(**parts: object) -> str:
    with pytest.raises(ValidationError) as refused:
        spec_of(**parts)
    (complaint,) = explain(refused.value)
    return complaint


def test_a_job_without_the_loop_has_the_stages_that_every_job_has():
    assert stages_of(spec_of()) == ("Prepare", "Train", "Evaluate", "Publish")


def test_baseline_and_search_come_before_the_training():
    loop = {
        "data": {"train": {"source": "pvc://a/b"}, "test": {"fraction": 0.1}},
        "evaluation": {"suites": SUITES},
        "baseline": {"prompts": [{"name": "zero-shot"}]},
        "search": {"parameters": {"method.lora.rank": {"choice": [8, 16]}}},
    }
    assert stages_of(spec_of(**loop)) == ("Prepare", "Baseline", "Search", "Train", "Evaluate", "Publish")
    del loop["baseline"]
    assert stages_of(spec_of(**loop)) == ("Prepare", "Search", "Train", "Evaluate", "Publish")


def test_the_metrics_that_may_be_named_follow_from_suites_and_test_data():
    spec = spec_of(data={"train": {"source": "pvc://a/b"}, "test": {"fraction": 0.1}}, evaluation={"suites": SUITES})
    answered = {"task/loss", "task/exactMatch"}
    held_out = {"validation/loss", "validation/perplexity", "test/loss", "test/perplexity"}
    assert answered_metrics(spec) == answered
    assert goal_metrics(spec) == answered | held_out
    assert known_metrics(spec) == answered | held_out | {"general/hellaswag", "general/arc", "train/gap"}
    assert known_metrics(spec_of()) == {"validation/loss", "validation/perplexity", "train/gap"}


def test_a_suite_says_whether_answers_must_be_generated_and_where_its_data_is():
    suites = [
        {"name": "plain", "source": "validation", "metrics": list(SCORED_METRICS)},
        {"name": "own", "source": "hf://datasets/a/b", "split": "test", "metrics": ["loss", "f1"]},
        {"name": "small", "configMap": {"name": "sets", "key": "a.jsonl"}, "metrics": ["bleu"]},
    ]
    plain, own, small = spec_of(evaluation={"suites": suites}).evaluation.suites
    assert (plain.generates, own.generates, small.generates) == (False, True, True)
    assert plain.data_source() is None
    assert own.data_source() == DataSource(source="hf://datasets/a/b", split="test")
    assert small.data_source() == DataSource(config_map=ConfigMapSource(name="sets", key="a.jsonl"))
    assert own.metric_names == ("own/loss", "own/f1")


def test_every_metric_is_of_one_kind():
    assert not set(SCORED_METRICS) & set(GENERATED_METRICS)
    assert len(SCORED_METRICS) + len(GENERATED_METRICS) == 15


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "unclosed group"),
        ("(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        (r"(a)\1", "backreferences are not supported"),
        (r"(\w{999}){99}", "Compiled regex exceeds size limit of 10485760 bytes"),
    ],
)
def test_a_pattern_must_be_one_that_can_be_searched_for_in_time(pattern: str, words: str):
    suite = {"name": "task", "source": "validation", "metrics": ["regex"], "pattern": pattern}
    assert refusal(evaluation={"suites": [suite]}).startswith(
        f"spec.evaluation.suites[0].pattern: must be a regular expression without look-around and back references: {words}"
    )


def search(path: str, values: object) -> dict[str, object]:
    return {"search": {"parameters": {path: values}}}


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("training.learningRate", {"logUniform": [1e-5, 2]}, "training.learningRate does not take 2"),
        ("training.learningRate", {"choice": [1e-4, 0]}, "training.learningRate does not take 0"),
        ("training.learningRate", {"choice": ["fast"]}, "training.learningRate does not take fast"),
        ("training.warmupRatio", {"choice": [True]}, "training.warmupRatio does not take True"),
        ("method.lora.rank", {"choice": [8, 8.5]}, "method.lora.rank does not take 8.5"),
        ("method.lora.rank", {"uniform": [0.5, 8]}, "method.lora.rank does not take 0.5"),
        ("method.lora.rank", {"uniform": [8, 2048]}, "method.lora.rank does not take 2048"),
        ("training.packing", {"uniform": [0, 1]}, "training.packing does not take 0"),
        ("training.packing", {"choice": ["yes please"]}, "training.packing does not take yes please"),
        ("training.scheduler", {"choice": ["cosine", "cosin"]}, "training.scheduler does not take cosin"),
        ("training.microBatchSize", {"choice": [4, "car"]}, "training.microBatchSize does not take car"),
    ],
    ids=json.dumps,
)
def test_a_value_that_its_field_does_not_take_is_refused(path, values, words):
    complaint = refusal(**search(path, values))
    assert complaint.startswith(f"spec.search.parameters: {words}: ")


def test_a_path_that_does_not_exist_is_told_with_what_exists():
    complaint = refusal(**search("training.momentum", {"uniform": [0, 1]}))
    assert complaint.startswith("spec.search.parameters: training.momentum: every key must be the path of a number or a choice in training")


def test_a_path_that_is_misspelt_is_told_with_what_may_be_meant():
    assert refusal(**search("training.learning_rate", {"uniform": [0.1, 1]})).endswith("; training.learningRate would be one")
    assert "would be one" not in refusal(**search("something.else.entirely", {"uniform": [0.1, 1]}))


def test_ends_that_are_whole_numbers_are_integers():
    parameters = {"training.globalBatchSize": {"uniform": [8, 64.0]}, "training.warmupRatio": {"uniform": [0, 0.5]}}
    ranges = spec_of(search={"parameters": parameters}).search.parameters
    assert ranges["training.globalBatchSize"].values == (8, 64)
    assert all(isinstance(end, int) for end in ranges["training.globalBatchSize"].values)
    assert ranges["training.warmupRatio"].values == (0, 0.5)


def test_numbers_and_choices_can_be_searched_for_and_nothing_else():
    assert {
        "training.learningRate",
        "training.scheduler",
        "training.packing",
        "training.microBatchSize",
        "training.earlyStopping.patience",
        "method.lora.rank",
        "method.lora.variant",
        "method.freeze.lastLayers",
        "objective.distillation.response.topK",
        "objective.dpo.beta",
    } <= set(SEARCHABLE)
    for left_out in ("training.seed", "training.maxSequenceLength", "objective.sft.lossOn", "objective.distillation.lossOn"):
        assert left_out not in SEARCHABLE  # what the prepared examples follow from
    for neither in ("method.promptTuning.initText", "method.lora.targetModules", "objective.distillation.teacher.source", "method.lora"):
        assert neither not in SEARCHABLE
    assert not [path for path in SEARCHABLE if ".teacher." in path]


def test_fields_of_whole_numbers_are_known():
    assert [SEARCHABLE[path].whole for path in ("method.lora.rank", "training.learningRate", "training.microBatchSize")] == [
        True,
        False,
        True,
    ]


def test_everything_that_a_spec_refers_to_is_found():
    secret = {"name": "hub"}
    spec = spec_of(
        model={"source": "hf://org/model", "secretRef": secret},
        data={
            "validation": {"fraction": 0.1},
            "test": {"source": "s3://bucket/test.csv", "secretRef": {"name": "s3"}},
            "preparation": {
                "contentPoints": {
                    "knowledgeBase": {"source": "pvc://docs/kb"},
                    "goldenOutputs": {"configMap": {"name": "golden", "key": "golden.jsonl"}},
                    "retriever": {"kind": "hybrid", "encoder": {"source": "pvc://encoders/small"}},
                    "generator": {"endpoint": {"url": "http://writer/v1", "model": "m", "secretRef": {"name": "writer"}}},
                },
            },
        },
        baseline={
            "prompts": [{"name": "rag", "retrieval": {"knowledgeBase": {"source": "pvc://docs/kb"}}}],
            "models": [{"name": "other", "source": "pvc://models/other"}],
        },
        evaluation={
            "suites": [
                {"name": "task", "source": "test", "metrics": ["f1"]},
                {
                    "name": "judged",
                    "source": "pvc://suites/judged.jsonl",
                    "metrics": ["judgeScore"],
                    "judge": {"endpoint": {"url": "http://judge/v1", "model": "m", "secretRef": {"name": "judge"}}},
                },
            ]
        },
    )
    made = "spec.data.preparation.contentPoints"
    golden = ConfigMapSource(name="golden", key="golden.jsonl")
    assert references_of(spec) == (
        Reference("spec.model", "model", "hf://org/model", secret="hub"),
        Reference("spec.data.test", "data", "s3://bucket/test.csv", secret="s3"),
        Reference(f"{made}.knowledgeBase", "data", "pvc://docs/kb"),
        Reference(f"{made}.goldenOutputs", "data", config_map=golden),
        Reference(f"{made}.retriever.encoder", "model", "pvc://encoders/small"),
        Reference(f"{made}.generator.endpoint", "endpoint", "http://writer/v1", secret="writer"),
        Reference("spec.baseline.prompts[0].retrieval.knowledgeBase", "data", "pvc://docs/kb"),
        Reference("spec.baseline.models[0]", "model", "pvc://models/other"),
        Reference("spec.evaluation.suites[1]", "data", "pvc://suites/judged.jsonl"),
        Reference("spec.evaluation.suites[1].judge.endpoint", "endpoint", "http://judge/v1", secret="judge"),
        Reference("spec.output", "storage", "pvc://models/bot"),
    )
    claims = [reference.claim for reference in references_of(spec) if reference.claim]
    assert claims == ["docs", "encoders", "docs", "models", "suites", "models"]


def test_an_operator_that_reads_a_job_again_and_again_compiles_its_patterns_once() -> None:
    large = "(?i)(\\w{50}|\\pL{50}|\\pN{50}){3}"
    with pytest.raises(ValueError, match="size limit"):
        check_pattern(large)
    begun = time.process_time()
    for _ in range(100):
        with pytest.raises(ValueError, match="size limit"):
            check_pattern(large)
        assert check_pattern("\\w{100}")
    assert time.process_time() - begun < 2


def test_a_status_holds_the_results_of_the_largest_job() -> None:
    """Else the trainer fails once everything is trained and measured."""
    lengths = {
        name: next(each.max_length for each in model.model_fields[name].metadata if hasattr(each, "max_length"))
        for model, name in ((EvaluationPlan, "suites"), (Suite, "metrics"), (LmEval, "tasks"))
    }
    of_suites = lengths["suites"] * max(lengths["metrics"], lengths["tasks"])
    of_dpo = 2 * len(("loss", "rewardAccuracy", "rewardMargin"))
    assert of_suites + max(of_dpo, len((*VALIDATION_METRICS, *TEST_METRICS))) + len((GAP,)) <= RESULTS_MAX
