"""What is kept of a teacher: the largest probabilities of every label, in shards that are whole or not there, computed once."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tests.unit.trainer_run.test_loop import Together
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DistillationObjective, Training
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.examples import Examples, Prepared, join
from finetune_trainer.data.tensors import Layout, MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Context
from finetune_trainer.objectives.distillation import begin_distillation, teacher_cache
from finetune_trainer.objectives.distillation.teacher_cache import COMPLETE, Taking, TeacherCache, fill, is_complete, key, shards_of
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
TAKING = Taking(k=5, temperature=2.0, vocabulary=50)


def llama(seed: int, layout: Layout | None = None) -> CausalModel:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    return CausalModel(model, model, layout or choose_layout(model), True, torch.float32, CPU, tuned=False)


@pytest.fixture(scope="module")
def data() -> Examples:
    generator = np.random.default_rng(4)
    return join([(generator.integers(0, 50, n).astype(np.int32), generator.random(n) < 0.7) for n in generator.integers(3, 20, 30)])


def storage_in(folder: Path) -> Storage:
    return Storage(LocalFileSystem(), str(folder), f"file://{folder}")


class Counting:
    """A teacher that counts how often it is run."""

    def __init__(self, teacher: CausalModel) -> None:
        self.teacher, self.runs = teacher, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def run(self, *arguments: Any, **named: Any) -> Any:
        self.runs += 1
        return self.teacher.run(*arguments, **named)


def by_transformers(teacher: CausalModel, data: Examples, index: int) -> torch.Tensor:
    """Probabilities at temperature 2 at the labels of one example, [L, 50]."""
    torch.manual_seed(9)
    alone = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    alone.load_state_dict(teacher.module.state_dict())
    tokens, labelled = (torch.tensor(np.array(part)) for part in data.example(index))
    with torch.no_grad():
        logits = alone(input_ids=tokens.long()[None]).logits[0, labelled[1:].nonzero()[:, 0]]
    return (logits / 2).softmax(-1)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_largest_of_every_label_are_kept(data: Examples, tmp_path: Path, layout: Layout) -> None:
    teacher = llama(1, layout if layout == "padded" else None)
    assert teacher.layout == layout
    storage = storage_in(tmp_path)
    assert not is_complete(storage)
    assert fill(storage, teacher, data, Worker(), TAKING) == len(shards_of(data)) > 1
    assert is_complete(storage)
    cache = TeacherCache(storage, data)
    for index in (0, 7, 29):
        expected = by_transformers(teacher, data, index)
        values, ids = expected.topk(5, dim=1)
        kept = cache.of((index,), CPU)
        assert torch.equal(kept.ids, ids)
        torch.testing.assert_close(kept.log_probabilities.exp()[:, :5], values, rtol=3e-3, atol=1e-4)
        torch.testing.assert_close(kept.log_probabilities.exp().sum(1), torch.ones(len(ids)))
    both = cache.of((7, 0), CPU)
    assert torch.equal(both.ids, torch.cat([cache.of((7,), CPU).ids, cache.of((0,), CPU).ids]))


def test_the_bytes_of_a_label_are_what_the_documentation_says(data: Examples, tmp_path: Path) -> None:
    fill(storage_in(tmp_path), llama(1), data, Worker(), TAKING)
    arrays = [np.load(path) for path in tmp_path.glob("shard-*/*.npy")]
    assert sum(array.nbytes for array in arrays) == int(data.label_counts().sum()) * (6 * 5 + 2)


def test_any_number_of_workers_shares_the_work(data: Examples, tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=60)
    workers = [Worker(rank=rank, world=2, all_reduce=lambda _: barrier.wait() and None) for rank in range(2)]
    teachers = [Counting(llama(1)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(fill, storage_in(tmp_path / "two"), *pair, TAKING) for pair in zip(teachers, [data] * 2, workers, strict=True)]
        counts = [each.result() for each in made]
    fill(storage_in(tmp_path / "one"), llama(1), data, Worker(), TAKING)
    assert sum(counts) == len(shards_of(data))
    assert min(counts) >= len(shards_of(data)) // 2
    one, two = (TeacherCache(storage_in(tmp_path / name), data) for name in ("one", "two"))
    everything = tuple(range(len(data)))
    assert torch.equal(one.of(everything, CPU).ids, two.of(everything, CPU).ids)
    torch.testing.assert_close(one.of(everything, CPU).log_probabilities, two.of(everything, CPU).log_probabilities)


def test_only_what_is_missing_is_computed_again(data: Examples, tmp_path: Path) -> None:
    """Killed in the middle: two shards are gone, one of them half written."""
    storage = storage_in(tmp_path)
    fill(storage, llama(1), data, Worker(), TAKING)
    before = TeacherCache(storage, data).of(tuple(range(len(data))), CPU)
    (tmp_path / COMPLETE).unlink()
    (tmp_path / "shard-00000" / "manifest.json").unlink()
    storage.remove("shard-00002")
    assert not is_complete(storage)
    teacher = Counting(llama(1))
    assert fill(storage, teacher, data, Worker(), TAKING) == 2
    assert teacher.runs == 2
    assert torch.equal(TeacherCache(storage, data).of(tuple(range(len(data))), CPU).ids, before.ids)


def test_an_object_store_keeps_the_same(data: Examples, tmp_path: Path) -> None:
    remote = Storage(MemoryFileSystem(), f"/{tmp_path.name}", "s3://bucket/teacher")
    fill(remote, llama(1), data, Worker(), TAKING)
    fill(storage_in(tmp_path), llama(1), data, Worker(), TAKING)
    one, other = (TeacherCache(storage, data).of((3, 4), CPU) for storage in (remote, storage_in(tmp_path)))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.log_probabilities, other.log_probabilities)


def test_a_vocabulary_smaller_than_k(data: Examples, tmp_path: Path) -> None:
    fill(storage_in(tmp_path), llama(1), data, Worker(), Taking(k=64, temperature=2.0, vocabulary=48))
    kept = TeacherCache(storage_in(tmp_path), data).of((0,), CPU)
    assert kept.ids.shape[1] == 48
    assert kept.ids.max() < 48
    assert kept.log_probabilities[:, -1].exp().max() == 0


def test_shards_follow_from_the_labels_alone(data: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARDS", 4)
    counts = data.label_counts()
    shards = shards_of(data)
    assert [start for start, _ in shards[1:]] == [end for _, end in shards[:-1]]
    assert (shards[0][0], shards[-1][1]) == (0, len(data))
    assert max(int(counts[start:end].sum()) for start, end in shards) <= -(-int(counts.sum()) // 4)
    monkeypatch.setattr(teacher_cache, "SHARD_LABELS", 1)
    assert shards_of(data) == [(index, index + 1) for index in range(len(data))]


def test_the_key_covers_all_that_the_numbers_follow_from() -> None:
    base = {"teacher": "sha256:a", "data": "sha256:b", "taking": TAKING, "precision": torch.float32}
    others = [{"teacher": "sha256:c"}, {"data": "sha256:c"}, {"precision": torch.bfloat16}]
    others += [{"taking": Taking(*values)} for values in ((6, 2.0, 50), (5, 1.0, 50), (5, 2.0, 51))]
    keys = {key(**(base | other)) for other in ({}, *others)}
    assert len(keys) == len(others) + 1
    assert key(**base) == key(**base)


def begin(data: Examples, student: CausalModel, teacher: CausalModel | None, kept: Storage | None, top_k: str) -> Any:
    text = '{"teacher": {"source": "pvc://models/teacher"}, "response": {"temperature": 2%s}}'
    spec = DistillationObjective.model_validate_json(text % top_k)
    context = Context(student, Prepared(data, data, None, 0, "sha256:1"), Training(), storage_in(Path("/nowhere")), Worker(), teacher, kept)
    return begin_distillation(spec, context)


def test_a_student_learns_the_same_from_what_is_kept(data: Examples, tmp_path: Path) -> None:
    """All 50 tokens kept: the loss is that beside the live teacher, to the rounding of what is kept. The teacher's memory is given back."""
    student, teacher = llama(2), llama(1)
    batch = collate(data, [(3, 4), (11,)], "flat")
    live = begin(data, student, teacher, None, "").loss(student, batch).total
    kept = begin(data, student, teacher, storage_in(tmp_path), ', "topK": 50').loss(student, batch).total
    torch.testing.assert_close(kept, live, rtol=2e-3, atol=0)
    assert {parameter.device.type for parameter in teacher.transformer.parameters()} == {"meta"}
    again = begin(data, student, None, storage_in(tmp_path), ', "topK": 50').loss(student, batch).total
    assert torch.equal(again, kept)
    few = begin(data, student, llama(1), storage_in(tmp_path / "few"), ', "topK": 5').loss(student, batch).total
    assert few < live


@pytest.mark.parametrize("where", ["file system", "object store"])
@pytest.mark.parametrize("damage", ["gone", "cut", "without its manifest", "without its arrays"])
def test_what_is_damaged_is_computed_again(data: Examples, tmp_path: Path, where: str, damage: str) -> None:
    """Somebody made room on the disk, or a disk lost its end: the next job notices, and mends it."""
    local = where == "file system"
    storage = storage_in(tmp_path) if local else Storage(MemoryFileSystem(), f"/{tmp_path.name}", "s3://bucket/teacher")
    fill(storage, llama(1), data, Worker(), TAKING)
    before = TeacherCache(storage, data).of(tuple(range(len(data))), CPU)
    path = storage.location("shard-00001/ids.npy").path
    if damage == "gone":
        storage.remove("shard-00001")
    elif damage == "without its arrays":
        for name in ("ids", "log_probabilities"):
            storage.fs.rm_file(storage.location(f"shard-00001/{name}.npy").path)
    elif damage == "cut":
        storage.fs.pipe_file(path, storage.fs.cat_file(path)[:-4])
    else:
        storage.fs.rm_file(path.replace("ids.npy", "manifest.json"))
    assert is_complete(storage) is (damage == "without its manifest")  # the arrays are as they were
    if damage == "without its manifest":
        storage.fs.rm_file(storage.location(COMPLETE).path)
    assert fill(storage, llama(1), data, Worker(), TAKING) == 1
    assert is_complete(storage)
    after = TeacherCache(storage, data).of(tuple(range(len(data))), CPU)
    assert torch.equal(after.ids, before.ids)
    assert torch.equal(after.log_probabilities, before.log_probabilities)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "shards": [[0, 30]]}', '{"shards": "all", "bytes": {}}'])
def test_a_cache_that_says_nothing_is_no_cache(data: Examples, tmp_path: Path, content: str) -> None:
    storage = storage_in(tmp_path)
    (tmp_path / COMPLETE).write_text(content)
    with pytest.raises(JobError) as caught:
        TeacherCache(storage, data)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE
    assert str(tmp_path) in caught.value.message


def test_shards_that_are_not_there_are_told_by_their_place(data: Examples, tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    fill(storage, llama(1), data, Worker(), TAKING)
    storage.remove("shard-00003")
    with pytest.raises(JobError, match=r"what the teacher said cannot be read: .*shard-00003") as caught:
        TeacherCache(storage, data)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_a_teacher_whose_numbers_are_none_is_not_kept(data: Examples, tmp_path: Path) -> None:
    teacher = llama(1)
    with torch.no_grad():
        teacher.transformer.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(JobError, match=r"its probabilities are no numbers \(NaN\).*training\.precision float32") as caught:
        fill(storage_in(tmp_path), teacher, data, Worker(), TAKING)
    assert caught.value.reason == Reason.MODEL_INVALID
    assert not is_complete(storage_in(tmp_path))
    assert list(tmp_path.glob("shard-*")) == []


class Small(Counting):
    """A teacher beside which so many tokens fit into memory."""

    most = 25
    refused = 0

    def run(self, batch: MicroBatch, **named: Any) -> Any:
        self.runs += 1
        if batch.tokens > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError
        return self.teacher.run(batch, **named)


def test_what_does_not_fit_into_memory_is_read_in_halves(data: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty examples of up to 19 tokens: no memory for two of the longer ones. The same is kept, and it is told once."""
    monkeypatch.setattr(teacher_cache, "SHARDS", 1)
    small, told = Small(llama(1)), list[str]()
    fill(storage_in(tmp_path / "small"), small, data, Worker(), TAKING, told.append)
    fill(storage_in(tmp_path / "large"), llama(1), data, Worker(), TAKING)
    assert small.runs > len(data) * 2 // 3
    (warning,) = told
    assert warning.startswith("the training data did not fit into memory beside the teacher: it reads ")
    assert_same_is_kept(data, tmp_path / "small", tmp_path / "large")


def assert_same_is_kept(data: Examples, *folders: Path) -> None:
    made, expected = (TeacherCache(storage_in(folder), data).of(tuple(range(len(data))), CPU) for folder in folders)
    assert torch.equal(made.ids, expected.ids)
    torch.testing.assert_close(made.log_probabilities, expected.log_probabilities, atol=1e-5, rtol=0)


def test_a_worker_that_is_short_beside_its_teacher_is_told_of_by_the_one_that_leads(
    data: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a whole teacher, and shares of its own: the other one goes on as it was."""
    monkeypatch.setattr(teacher_cache, "SHARDS", 4)
    teachers, told = [Counting(llama(1)), Small(llama(1))], [list[str](), list[str]()]
    together = Together(2)

    def filled(rank: int) -> int:
        return fill(storage_in(tmp_path / "two"), teachers[rank], data, together.worker(rank), TAKING, told[rank].append)

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(filled, range(2))) == len(shards_of(data))
    assert told[0] == told[1] != []
    fill(storage_in(tmp_path / "one"), llama(1), data, Worker(), TAKING)
    assert_same_is_kept(data, tmp_path / "two", tmp_path / "one")


def test_once_is_enough_to_learn_how_much_fits(data: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after a shortage is not tried at the size that did not fit."""
    monkeypatch.setattr(teacher_cache, "SHARDS", 2)
    small = Small(llama(1))
    fill(storage_in(tmp_path), small, data, Worker(), TAKING)
    assert 0 < small.refused <= math.ceil(math.log2(data.lengths().sum() / small.most))


def test_a_single_example_that_does_not_fit_is_told(data: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Small, "most", 5)
    with pytest.raises(JobError, match=r"a single example does not fit.* beside the teacher: lower training\.maxSequenceLength") as raised:
        fill(storage_in(tmp_path), Small(llama(1)), data, Worker(), TAKING)
    assert raised.value.reason == Reason.GPU_OUT_OF_MEMORY
