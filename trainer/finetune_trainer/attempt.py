"""One attempt of one job, as the head sees it, and what it has found out before it asked for workers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.report import Outcome
from finetune_api.scrub import scrub
from finetune_api.status import TEXT_MAX, Resolved
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.console import Console
from finetune_trainer.environment import Environment, own_folder, scratch_folder
from finetune_trainer.following import Following
from finetune_trainer.interruption import Interruption
from finetune_trainer.manifest import digest_of
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.ray_cluster import RayHead
from finetune_trainer.report import Reporter
from finetune_trainer.search_space import Values, config_of, with_values
from finetune_trainer.sources import Mounts, resolve_storage
from finetune_trainer.storage import Storage, storage_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT = "report.json"


@dataclass
class Attempt:
    """One attempt of one job, as the head sees it."""

    environment: Environment
    job: FineTuneJob
    reporter: Reporter
    console: Console
    ray_head: RayHead
    following: Following
    interruption: Interruption

    @property
    def mounts(self) -> Mounts:
        """The pod's volumes, and what the job's profile says of its Secrets."""
        return self.environment.mounts()

    @property
    def storage(self) -> Storage:
        """output.storage."""
        return storage_at(resolve_storage(self.job.spec.output, self.mounts))

    @property
    def own(self) -> Storage:
        """The job's own folder in output.storage."""
        return self.storage.at(own_folder(self.job))

    @property
    def scratch(self) -> Path:
        """A folder on this machine that goes with the attempt."""
        return scratch_folder(self.job.metadata.uid, self.environment.attempt)

    @property
    def cache(self) -> Path:
        """Where what is fetched from elsewhere is put."""
        return self.scratch / "cache"

    def tell(self, text: str) -> None:
        """Tell people how far a long stage is: in the log, and in the status."""
        self.console.say(text)
        self.reporter.update(message=text[:TEXT_MAX])

    def keep_report(self, outcome: Outcome | None = None) -> None:
        """Leave the report in the storage, for people and for the next attempt. It is not worth failing for."""
        report = self.reporter.report
        try:
            self.own.write_json(REPORT, report.model_copy(update={"outcome": outcome or report.outcome}).to_json())
        except Exception as error:
            self.console.say(f"the report could not be kept in the storage: {scrub(str(error))}")


@dataclass(frozen=True)
class Preparation:
    """What is known before a worker is asked for."""

    job: FineTuneJob
    """The job; after a search with the values that it has found."""
    base: BaseModel
    tokenizer: "PreTrainedTokenizerBase"
    longest: int | None
    """Tokens that the model takes; None where it does not say."""
    resolved: Resolved
    config: dict[str, Any]
    """Everything that the result follows from."""
    data: str
    """Folder of the prepared data in output.storage."""
    values: Values | None = None
    """What a search has found."""

    @property
    def for_workers(self) -> dict[str, Any]:
        """What a group of workers is told (see worker_group). No secret is in it."""
        told = {"revision": self.resolved.model_revision, "config": self.config, "data": self.data}
        return told | ({"values": dict(self.values)} if self.values else {})

    def with_values(self, values: Values) -> "Preparation":
        """The same for the job with other values."""
        job = with_values(self.job, values)
        config = config_of(self.config, job)
        resolved = self.resolved.model_copy(update={"config_digest": digest_of(config)})
        return replace(self, job=job, config=config, resolved=resolved, values=values)
