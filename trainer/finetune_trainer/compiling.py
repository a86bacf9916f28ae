"""torch.compile of the decoder's layers, where it helps and can be done.

Each layer is compiled by itself and with open shapes, so that the many layers and the many lengths share one compilation. Attention over
flat rows is left out: how many documents a row has would be compiled into it. That it cannot be done here (no compiler in the image) is
never a reason to fail; nor is a layer that fails later (see `remedy`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.v1alpha1 import Spec
from finetune_trainer.attention import compile_around_flat_attention, probe
from finetune_trainer.model import CausalModel
from finetune_trainer.remedy import FAILED_ELSEWHERE, uncompiled_because
from finetune_trainer.sharding import decoder_layers
from finetune_trainer.worker import Worker

DOCUMENTS = [[3, 4, 5, 6], [3, 4, 5]]


def compile_layers(model: CausalModel, spec: Spec, worker: Worker) -> tuple[str, ...]:
    """Compile the model's layers in place where training.compile asks for it, auto on a GPU. Every worker calls it. Returns warnings.

    Raises what a layer raises as it is, too.
    """
    wanted = spec.training.compile
    distillation = spec.objective.distillation
    maps = distillation is not None and distillation.feature is not None and distillation.feature.attention
    if wanted == "never" or maps or (wanted == "auto" and model.device.type != "cuda"):
        return ()  # attention maps are caught inside of the layers, where a compiled one does not look
    compile_around_flat_attention()
    layers, failures = decoder_layers(model.transformer), list[str]()
    trials = [_Trial(layer.forward, failures) for layer in layers]
    for layer, trial in zip(layers, trials, strict=True):
        layer.forward = trial
    try:
        with torch.no_grad():
            model.run(probe(DOCUMENTS if model.layout == "flat" else DOCUMENTS[:1], model.layout).to(model.device))
    finally:
        for layer in layers:
            del layer.forward
        model.settle()
    if worker.sum(float(bool(failures))) > 0:  # as wherever one falls back later
        return (failures[0] if failures else FAILED_ELSEWHERE,)
    for layer, trial in zip(layers, trials, strict=True):
        if trial.compiled is not None:
            layer.forward = trial.compiled
    return ()


@dataclass
class _Trial:
    """A layer's forward as torch.compile makes it, at its first pass.

    Where that fails the pass goes on with the layer as it is: workers that hold other parts of the model wait for this one's.
    """

    own: Callable[..., Any]
    failures: list[str]
    """Of all layers, in words for the job's owner: after the first one no other is tried."""
    compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - a layer's own
        """What the layer makes of it."""
        if not self.failures:
            try:
                self.compiled = self.compiled or torch.compile(self.own, dynamic=True)
                return self.compiled(*arguments, **named)
            except Exception as error:
                self.failures.append(uncompiled_because(error))
        return self.own(*arguments, **named)
