"""Documents in which what a text says can be found: read, cut into passages, indexed by words, by meaning, or by both."""

from finetune_trainer.retrieval.knowledge import Knowledge, files_of, open_knowledge, read_passages
from finetune_trainer.retrieval.passages import Passage

__all__ = ["Knowledge", "Passage", "files_of", "open_knowledge", "read_passages"]
