"""torch.compile of the decoder's layers, where it helps and can be done.

Each layer is compiled by itself and with open shapes, so that the many layers and the many lengths share one compilation. Attention over
flat rows is left out: how many documents a row has would be compiled into it. That it cannot be done here (no compiler in the image) is
never a reason to fail; nor is a layer that fails later (see `remedy`).
"""

import torch

from finetune_api.v1alpha1 import Spec
from finetune_trainer.attention import compile_around_flat_attention, probe
from finetune_trainer.model import CausalModel
from finetune_trainer.remedy import uncompile, uncompiled_because
from finetune_trainer.sharding import decoder_layers

DOCUMENTS = [[3, 4, 5, 6], [3, 4, 5]]


def compile_layers(model: CausalModel, spec: Spec) -> tuple[str, ...]:
    """Compile the model's layers in place where training.compile asks for it, auto on a GPU. Returns warnings."""
    wanted = spec.training.compile
    distillation = spec.objective.distillation
    maps = distillation is not None and distillation.feature is not None and distillation.feature.attention
    if wanted == "never" or maps or (wanted == "auto" and model.device.type != "cuda"):
        return ()  # attention maps are caught inside of the layers, where a compiled one does not look
    compile_around_flat_attention()
    layers = decoder_layers(model.transformer)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        with torch.no_grad():
            model.run(probe(DOCUMENTS if model.layout == "flat" else DOCUMENTS[:1], model.layout).to(model.device))
    except Exception as error:
        uncompile(model)
        return (uncompiled_because(error),)
    finally:
        model.settle()
    return ()
