"""The course of a training, step by step, beside TRL's SFTTrainer: the same files, seed, order of the data, optimiser and schedule.

Each trainer reads the rows, makes tokens and labels of them, loads the model and makes the new weights by itself. Rows are not packed,
since TRL has no packing that leaves the examples of a batch as they are.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fsspec.implementations.local import LocalFileSystem
from peft import LoraConfig
from test_encoding import MARKED
from tests.prepared_data import prepare_data
from tiny_models import byte_tokenizer, job_manifest, tiny_llama_config, write_jsonl
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data.batches import plan_batches
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.placement import placed
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker


def turns_of(*rows: dict[str, str]) -> list[dict[str, str]]:
    """A conversation of these questions and answers."""
    named = (("user", "prompt"), ("assistant", "completion"))
    return [{"role": role, "content": row[key]} for row in rows for role, key in named]


SEED, BATCH, EPOCHS, DECAY = 7, 4, 2, 0.1
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAIRS = [{"prompt": f"{number * 37} ends in ", "completion": f"{WORDS[number * 37 % 10]}{'!' * (number % 4)}"} for number in range(24)]
CHATS = [{"messages": turns_of(row, PAIRS[index - 1])} for index, row in enumerate(PAIRS)]
CURVES = ("loss", "grad_norm", "learning_rate")
Curves = dict[str, list[float]]


class Listener:
    """Notes what is told of each step."""

    stop_requested = False
    regroup_requested = False

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}

    def post(self, progress: WorkerProgress) -> None:
        self.by_step[progress.step] = {metric.name: metric.value for metric in progress.metrics}


@dataclass(frozen=True)
class Case:
    """The same training, as a job has it and as TRL has it."""

    method: dict[str, Any]
    loss_on: str
    rate: float
    rows: list[dict[str, Any]]
    lora: LoraConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def job(self, folder: Path) -> FineTuneJob:
        training = {"epochs": EPOCHS, "globalBatchSize": BATCH, "packing": False, "seed": SEED, "precision": "float32"}
        training |= {"learningRate": self.rate, "scheduler": "cosine", "warmupRatio": 0, "weightDecay": DECAY, "maxGradNorm": 1.0}
        rows = {"source": f"file://{folder}/rows.jsonl"}
        data, objective = {"train": rows, "validation": rows}, {"sft": {"lossOn": self.loss_on}}
        return parse_job(job_manifest(data=data, method=self.method, objective=objective, training=training), local=True)


def ours(folder: Path, case: Case, files: ModelFiles) -> tuple[Curves, list[int]]:
    """The curves, and the rows in the order in which they were taken."""
    job = case.job(folder)
    data = prepare_data(job, AutoTokenizer.from_pretrained(files.folder), Mounts(folder, local=True))
    plan, listener = plan_batches(data.train, job.spec.training), Listener()
    task = Task(job, files.base, {}, Storage(LocalFileSystem(), str(folder / "out"), "file:///out"))
    assert train(task, Models(placed(files, job, Worker())[0]), data, Worker(), listener)
    told = [listener.by_step[step] for step in range(1, plan.total_steps + 1)]
    names = ("train/loss", "train/gradNorm", "train/learningRate")
    curves = {curve: [metrics[name] for metrics in told] for curve, name in zip(CURVES, names, strict=True)}
    return curves, [index for step in range(plan.total_steps) for row in plan.batch(step).rows for index in row]


def theirs(folder: Path, case: Case, files: ModelFiles, order: list[int]) -> Curves:
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,  # the order holds all epochs
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH,
        learning_rate=case.rate,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=DECAY,
        max_grad_norm=1.0,
        seed=SEED,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **case.options,
    )
    rows = Dataset.from_list([case.rows[index] for index in order])
    trainer = SFTTrainer(model=str(files.folder), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=case.lora)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {curve: [float(entry[curve]) for entry in steps] for curve in CURVES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A model whose weights are large enough for gradients of all sizes, some of them to be clipped."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(initializer_range=0.1)).save_pretrained(folder)
    byte_tokenizer(MARKED).save_pretrained(folder)
    return ModelFiles(folder, BaseModel("tests/tiny", None, "float32"), "sha256:0", ("model.safetensors",))


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
CASES = {
    "full, completion": Case({"full": {}}, "completion", 3e-3, PAIRS),
    "full, all": Case({"full": {}}, "all", 3e-3, PAIRS, options={"completion_only_loss": False}),
    "full, assistant": Case({"full": {}}, "assistant", 3e-3, CHATS, options={"assistant_only_loss": True}),
    "lora, completion": Case({"lora": {"rank": 4, "alpha": 8}}, "completion", 1e-2, PAIRS, LORA),
    "lora, all of a conversation": Case({"lora": {"rank": 4, "alpha": 8}}, "all", 1e-2, CHATS, LORA),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_step_is_trls(tmp_path: Path, files: ModelFiles, case: Case) -> None:
    write_jsonl(tmp_path / "rows.jsonl", *case.rows)
    curves, order = ours(tmp_path, case, files)
    expected = theirs(tmp_path, case, files, order)
    assert len(expected["loss"]) == len(order) // BATCH == 12
    assert expected["loss"][-1] < expected["loss"][0] - 0.1
    for curve in CURVES:
        assert curves[curve] == pytest.approx(expected[curve], abs=2e-5), curve
