"""All of a job's data, checked, tokenised, split and counted: the head's work, done once."""

from typing import TYPE_CHECKING

from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.examples import Prepared
from finetune_trainer.sources import Mounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_data(job: FineTuneJob, tokenizer: "PreTrainedTokenizerBase", mounts: Mounts) -> Prepared:
    """Read, check and tokenise every split; hold out the validation fraction. Write it with `examples.write_prepared`.

    Raises JobError (DatasetNotFound, DatasetInvalid, AuthenticationFailed, ...) with the first bad rows by file, line and field and their number.
    """
    raise NotImplementedError
