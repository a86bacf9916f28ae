"""Models are loaded one after the other, in tests whose workers are threads of one process.

transformers switches the tying of weights off for the whole process while it loads a model (initialization.no_tie_weights). Two that load
at once can leave it off for good, and what is loaded later lacks a head. A worker of a job has a process of its own.
"""

import threading
from typing import Any

from transformers import PreTrainedModel

_lock = threading.RLock()
_load = PreTrainedModel.from_pretrained.__func__


def _loaded_alone(cls: type[PreTrainedModel], *given: Any, **named: Any) -> Any:
    with _lock:
        return _load(cls, *given, **named)


def one_at_a_time() -> None:
    """Have every model of this process loaded so, from now on."""
    PreTrainedModel.from_pretrained = classmethod(_loaded_alone)
