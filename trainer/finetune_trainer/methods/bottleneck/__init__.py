"""Bottleneck layers inside a frozen model (Houlsby et al. 2019; Pfeiffer et al. 2021).

`bottleneck_adapter` is the method as PEFT's own are made, in one file that is published with every adapter, since PEFT has no such
method; `adapter` is how a job uses it.
"""

from finetune_trainer.methods.bottleneck.adapter import BottleneckAdapter

__all__ = ["BottleneckAdapter"]
