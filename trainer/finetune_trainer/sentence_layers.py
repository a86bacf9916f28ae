"""From the hidden states of a text's tokens to one vector, as a folder of sentence-transformers says it is done.

    modules.json                      what follows upon what: the transformer, a pooling, and layers after it
    1_Pooling/config.json             how the tokens' states become one vector
    2_Dense/{config.json, model.safetensors}    a linear layer after that

A folder without modules.json is any model of transformers: the mean of the tokens' states. Only what is named here is known; a module of
another kind is refused, since leaving it out would give other vectors than its author's.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

FORMS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Ways of pooling, in the order in which several are joined."""
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": torch.nn.functional.gelu,
    "SiLU": torch.nn.functional.silu,
}
_FOLDER = re.compile(r"[A-Za-z0-9_-]{1,64}")

Vectors = Callable[[torch.Tensor], torch.Tensor]
"""A layer after the pooling: from [N, H] to [N, H']."""
Fetch = Callable[[str], Path]
"""A file below the model's folder, by its path there. Raises JobError where it is not there."""


@dataclass(frozen=True)
class SentenceLayers:
    """What comes after the transformer."""

    forms: tuple[str, ...] = ("mean",)
    after: tuple[Vectors, ...] = ()
    digest: str = ""
    """Of all that is said of these layers; empty where nothing is."""

    def vectors(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float32 [N, H] of length one, from the tokens' states [N, T, D] and the mask [N, T] of those that are no padding."""
        made = pooled(states.float(), mask, self.forms)
        for layer in self.after:
            made = layer(made)
        return normalize(made, dim=-1)


def pooled(states: torch.Tensor, mask: torch.Tensor, forms: tuple[str, ...]) -> torch.Tensor:
    """[N, D] for each form, joined. Tokens stand first, padding after them; each row has a token."""
    shown = mask.unsqueeze(-1).to(states.dtype)
    counts = shown.sum(1)
    made = []
    for form in forms:
        if form == "cls":
            made.append(states[:, 0])
        elif form == "max":
            made.append(states.masked_fill(shown == 0, -torch.inf).amax(1))
        elif form == "lasttoken":
            made.append(states[torch.arange(len(states), device=states.device), mask.sum(1).long() - 1])
        elif form == "weightedmean":
            weights = shown * torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)[:, None]
            made.append((states * weights).sum(1) / weights.sum(1))
        else:
            made.append((states * shown).sum(1) / (counts if form == "mean" else counts.sqrt()))
    return torch.cat(made, 1)


def read_layers(fetch: Fetch, modules: Any | None) -> SentenceLayers:  # noqa: ANN401 - any JSON
    """The layers that modules.json names (None where there is none).

    Raises ValueError, with a sentence, where they are not known, and what `fetch` raises.
    """
    if modules is None:
        return SentenceLayers()
    names = _named(modules)
    if not names or names[0] != ("Transformer", ""):
        raise ValueError("modules.json does not begin with a Transformer in the folder itself")
    if len(names) < 2 or names[1][0] != "Pooling":
        raise ValueError("modules.json has no Pooling after its Transformer")
    said = _json(fetch(f"{names[1][1]}/config.json"))
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    after: list[Vectors] = []
    for kind, folder in names[2:]:
        digest.update(f"\n{kind}\n".encode())
        if kind == "Normalize":
            after.append(lambda made: normalize(made, dim=-1))
        elif kind == "Dense":
            weights = fetch(f"{folder}/model.safetensors")
            after.append(_dense(_json(fetch(f"{folder}/config.json")), weights))
            digest.update(fetch(f"{folder}/config.json").read_bytes() + weights.read_bytes())
        elif kind != "Dropout":  # which does nothing but in training
            raise ValueError(f"modules.json names a {kind}, which is not known here")
    return SentenceLayers(_forms(said), tuple(after), digest.hexdigest())


def _named(modules: Any) -> list[tuple[str, str]]:  # noqa: ANN401 - any JSON
    """Kind and folder of each module."""
    try:
        names = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in modules]
    except (TypeError, KeyError) as error:
        raise ValueError("modules.json is no list of modules") from error
    for _, folder in names[1:]:
        if not _FOLDER.fullmatch(folder):
            raise ValueError(f"modules.json names the folder {folder!r}, which is none beside it")
    return names


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.parent.name}/{path.name} holds no settings")
    return found


def _forms(said: Mapping[str, Any]) -> tuple[str, ...]:
    """The ways of pooling that a Pooling's settings name: by switches, or since its sixth version by name."""
    named = said.get("pooling_mode")
    if named is None:
        chosen = tuple(form for switch, form in _SWITCHES.items() if said.get(switch)) or ("mean",)
    else:
        chosen = (named,) if isinstance(named, str) else tuple(named) if isinstance(named, list) else (str(named),)
    unknown = [form for form in chosen if form not in FORMS]
    if unknown or not chosen:
        raise ValueError(f"its Pooling's mode is {unknown[0] if unknown else 'none'}; known are {', '.join(FORMS)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError("its Pooling names a mode twice")
    if said.get("include_prompt") is False:
        raise ValueError("its Pooling leaves out the prompt (include_prompt), which is not known here")
    return chosen


def _dense(said: Mapping[str, Any], weights: Path) -> Vectors:
    """A linear layer and its activation."""
    from safetensors.torch import load_file

    activation = str(said.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"its Dense has the activation {activation}; known are {', '.join(_ACTIVATIONS)}")
    if said.get("use_residual") or said.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ValueError("its Dense is of a kind that is not known here")
    found, act = load_file(weights), _ACTIVATIONS[activation]
    if "linear.weight" not in found:
        raise ValueError("its Dense has no linear.weight")
    weight, bias = found["linear.weight"].float(), found.get("linear.bias")
    bias = None if bias is None else bias.float()

    def dense(made: torch.Tensor) -> torch.Tensor:
        place = made.device
        return act(torch.nn.functional.linear(made, weight.to(place), None if bias is None else bias.to(place)))

    return dense
