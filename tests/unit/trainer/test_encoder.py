"""The encoder against pooling that is written out here, token by token, on a BERT that the test makes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel, T5Config, T5EncoderModel

from finetune_api.fields import LOCAL_RUN
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ModelSource
from finetune_trainer import encoder as encoder_module
from finetune_trainer.encoder import Encoder, by_length, load_encoder
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Mounts

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "cats", "dogs", "like", "fish", "and", "query", ":", "Cats"]
TEXTS = ["cats like fish", "dogs", "cats and dogs and cats and dogs like fish", "fish and dogs"]
HIDDEN = 16


def word_tokenizer(pad_side: str = "right") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Sequence([])
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", padding_side=pad_side
    )


def bert(folder: Path, **config: Any) -> BertModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(WORDS), **(sizes | {"max_position_embeddings": 32} | config))).eval()
    with torch.no_grad():  # those of a new model are so small that every text would look alike
        model.embeddings.word_embeddings.weight.mul_(50)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


def load(folder: Path) -> Encoder:
    source = ModelSource.model_validate({"source": f"file://{folder}"}, context=LOCAL_RUN)
    return load_encoder(source, Mounts(folder, local=True), folder / "cache", "here.encoder")


def failure(folder: Path) -> JobError:
    with pytest.raises(JobError) as caught:
        load(folder)
    assert caught.value.message.startswith("here.encoder: ")
    return caught.value


@torch.no_grad()
def states(model: torch.nn.Module, text: str) -> np.ndarray:
    """[T, H] of a text alone, without padding."""
    ids = word_tokenizer()(text)["input_ids"]
    return model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()


def by_hand(rows: np.ndarray, form: str) -> np.ndarray:
    count = len(rows)
    if form == "cls":
        return rows[0]
    if form == "lasttoken":
        return rows[-1]
    if form == "max":
        return np.array([max(row[unit] for row in rows) for unit in range(rows.shape[1])])
    if form == "mean":
        return sum(rows) / count
    if form == "mean_sqrt_len_tokens":
        return sum(rows) / count**0.5
    return sum(row * (place + 1) for place, row in enumerate(rows)) / sum(range(1, count + 1))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def modules(folder: Path, *kinds: str, pooling: dict[str, Any] | None = None) -> None:
    """What sentence-transformers writes beside a model."""
    named = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, kind in enumerate(kinds, 1):
        path = f"{number}_{kind}"
        (folder / path).mkdir()
        named.append({"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(named))
    if "Pooling" in kinds:
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps(pooling if pooling is not None else {"pooling_mode_mean_tokens": True})
        )


def test_the_mean_of_the_tokens_where_nothing_else_is_said(tmp_path: Path) -> None:
    model = bert(tmp_path)
    made = load(tmp_path).embed(TEXTS)
    assert made.dtype == np.float32
    assert made.shape == (4, HIDDEN)
    np.testing.assert_allclose(made, [unit(by_hand(states(model, text), "mean")) for text in TEXTS], atol=1e-6)
    assert abs(made[0] @ made[1]) < 0.99  # the texts are told apart


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("said", "forms"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["cls"]),
        ({"pooling_mode_max_tokens": True}, ["max"]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ["mean_sqrt_len_tokens"]),
        ({"pooling_mode_weightedmean_tokens": True}, ["weightedmean"]),
        ({"pooling_mode_lasttoken": True}, ["lasttoken"]),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ["max", "mean"]),
        ({"pooling_mode": "lasttoken", "embedding_dimension": HIDDEN}, ["lasttoken"]),
        ({"pooling_mode": ["mean", "cls"]}, ["mean", "cls"]),
        ({}, ["mean"]),
    ],
)
def test_every_pooling(tmp_path: Path, said: dict[str, Any], forms: list[str], side: str) -> None:
    model = bert(tmp_path)
    word_tokenizer(side).save_pretrained(tmp_path)
    modules(tmp_path, "Pooling", "Normalize", pooling=said)
    expected = [unit(np.concatenate([by_hand(states(model, text), form) for form in forms])) for text in TEXTS]
    np.testing.assert_allclose(load(tmp_path).embed(TEXTS), expected, atol=1e-6)


def test_a_linear_layer_after_the_pooling(tmp_path: Path) -> None:
    model = bert(tmp_path)
    modules(tmp_path, "Pooling", "Dropout", "Dense")
    said = {"in_features": HIDDEN, "out_features": 5, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "3_Dense" / "config.json").write_text(json.dumps(said))
    weight, bias = torch.randn(5, HIDDEN), torch.randn(5)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "3_Dense" / "model.safetensors")
    dense = [np.tanh(weight.double().numpy() @ by_hand(states(model, text), "mean") + bias.double().numpy()) for text in TEXTS]
    np.testing.assert_allclose(load(tmp_path).embed(TEXTS), [unit(each) for each in dense], atol=1e-6)


def test_what_is_computed_together_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path)
    encoder = load(tmp_path)
    together = encoder.embed(TEXTS)
    monkeypatch.setattr(encoder_module, "BATCH_TOKENS", 1)
    monkeypatch.setattr(encoder_module, "TOKENISED", 3)
    np.testing.assert_allclose(encoder.embed(TEXTS), together, atol=1e-6)


def test_texts_are_computed_beside_those_of_their_length() -> None:
    assert list(by_length([3, 9, 0, 4, 3, 8], 18)) == [[1, 5], [3, 0, 4]]
    assert list(by_length([20, 1], 18)) == [[0], [1]]
    assert list(by_length([0], 18)) == []


def test_a_long_text_is_cut_off_where_the_model_ends(tmp_path: Path) -> None:
    model = bert(tmp_path, max_position_embeddings=8)
    words = ["cats", "like", "fish", "and", "dogs"] * 4
    cut = unit(by_hand(states(model, " ".join(words[:6])), "mean"))  # with its two signs, 8 tokens
    np.testing.assert_allclose(load(tmp_path).embed([" ".join(words)])[0], cut, atol=1e-6)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": false}')
    shorter = unit(by_hand(states(model, " ".join(words[:3])), "mean"))
    np.testing.assert_allclose(load(tmp_path).embed([" ".join(words)])[0], shorter, atol=1e-6)


def test_roberta_has_fewer_positions_than_it_says(tmp_path: Path) -> None:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(WORDS), pad_token_id=0, max_position_embeddings=9, **sizes)
    RobertaModel(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    encoder = load(tmp_path)
    assert encoder.longest == 8
    assert encoder.embed(["cats and dogs " * 9]).shape == (1, HIDDEN)


def test_the_encoder_alone_of_a_model_with_two_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=HIDDEN, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    np.testing.assert_allclose(load(tmp_path).embed(TEXTS), [unit(by_hand(states(model, text), "mean")) for text in TEXTS], atol=1e-5)


def test_a_model_without_a_pooler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path).embed(["cats"]).shape == (1, 8)


def test_what_its_author_wants_before_a_text(tmp_path: Path) -> None:
    model = bert(tmp_path)
    plain = load(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query : ", "passage": "fish "}}))
    encoder = load(tmp_path)
    assert plain.identity != encoder.identity
    np.testing.assert_array_equal(encoder.embed(TEXTS), plain.embed(TEXTS))
    np.testing.assert_array_equal(plain.embed(TEXTS, "query"), plain.embed(TEXTS))
    for purpose, before in (("query", "query : "), ("document", "fish ")):
        expected = [unit(by_hand(states(model, before + text), "mean")) for text in TEXTS]
        np.testing.assert_allclose(encoder.embed(TEXTS, purpose), expected, atol=1e-6)  # type: ignore[arg-type]


def test_small_letters_where_its_author_wants_them(tmp_path: Path) -> None:
    bert(tmp_path)
    assert not np.allclose(*load(tmp_path).embed(["Cats", "cats"]))
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    np.testing.assert_array_equal(*load(tmp_path).embed(["Cats", "cats"]))


def test_texts_without_a_token(tmp_path: Path) -> None:
    bert(tmp_path)
    encoder = load(tmp_path)
    assert encoder.embed([]).shape == (0, HIDDEN)
    encoder.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    np.testing.assert_array_equal(encoder.embed(["", " "]), np.zeros((2, HIDDEN)))
    made = encoder.embed(["", "cats"])
    assert (made[0] == 0).all()
    assert np.linalg.norm(made[1]) == pytest.approx(1)


def test_the_same_files_are_the_same_and_others_are_not(tmp_path: Path) -> None:
    bert(tmp_path)
    modules(tmp_path, "Pooling", "Normalize")
    first = load(tmp_path)
    assert load(tmp_path).identity == first.identity
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert load(tmp_path).identity != first.identity


@pytest.mark.parametrize(
    ("kinds", "pooling", "words"),
    [
        (("Pooling", "CNN"), {}, "modules.json names a CNN, which is not known here"),
        (("Normalize",), {}, "has no Pooling after its Transformer"),
        (("Pooling",), {"pooling_mode": "median"}, "mode is median; known are cls, max"),
        (("Pooling",), {"pooling_mode": []}, "mode is none"),
        (("Pooling",), {"pooling_mode": 7}, "mode is 7; known are"),
        (("Pooling",), {"pooling_mode": [["mean"]]}, "mode is ['mean']; known are"),
        (("Pooling",), {"pooling_mode": ["mean", "mean"]}, "names a mode twice"),
        (("Pooling",), {"include_prompt": False}, "include_prompt"),
    ],
)
def test_modules_that_would_be_computed_otherwise_are_refused(tmp_path: Path, kinds: Any, pooling: Any, words: str) -> None:
    bert(tmp_path)
    modules(tmp_path, *kinds, pooling=pooling)
    error = failure(tmp_path)
    assert error.reason == Reason.MODEL_INVALID
    assert words in error.message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("modules.json", "[{", "modules.json is not JSON"),
        ("modules.json", '{"a": 1}', "modules.json is no list of modules"),
        ("modules.json", "[]", "does not begin with a Transformer"),
        ("1_Pooling/config.json", "[]", "1_Pooling/config.json holds no settings"),
        ("1_Pooling/config.json", None, "1_Pooling/config.json does not exist"),
        (
            "modules.json",
            '[{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "../1_Pooling"}]',
            "names the folder '../1_Pooling'",
        ),
        ("tokenizer.json", "{}", "has no tokenizer that can be loaded"),
        ("config.json", '{"model_type": "clip"}', "(clip) is no encoder of texts"),
        ("config.json", '{"model_type": "new", "auto_map": {"AutoModel": "code.Model"}}', "has no configuration that transformers knows"),
    ],
)
def test_a_folder_that_is_broken(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    bert(tmp_path)
    modules(tmp_path, "Pooling")
    path = tmp_path / name
    path.unlink() if content is None else path.write_text(content)
    error = failure(tmp_path)
    assert error.reason == Reason.MODEL_INVALID
    assert words in error.message


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    model = bert(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if name != "encoder.layer.1.output.dense.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the weight encoder.layer.1.output.dense.weight" in failure(tmp_path).message


def test_a_model_that_gives_no_numbers(tmp_path: Path) -> None:
    model = bert(tmp_path)
    model.embeddings.word_embeddings.weight.data[4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(JobError, match="something that is no number") as caught:
        load(tmp_path).embed(["cats"])
    assert caught.value.reason == Reason.MODEL_INVALID


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    bert(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert failure(tmp_path).reason == Reason.UNSAFE_MODEL_FORMAT
