"""The loop: read what is there, decide, write the status, bring the objects in line."""

from finetune_operator.port import Cluster, Conflict, Event, JobKey, RawJob, Refused

__all__ = ["Cluster", "Conflict", "Event", "JobKey", "RawJob", "Refused"]
