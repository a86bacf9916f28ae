"""The trainer: one package that is the head (checks, serves the report, publishes) and the workers (compute).

    head     __main__ -> head -> run:   prepare  ->  train, evaluate  ->  publish          no GPU, alive all the way
                                        data        |              ^     export
                                        model_files v              |
    workers                             loop: batch -> loss -> gradients -> step -> checkpoint ... result

What is trained on, and how; in the order of its dependence:

- `errors`: JobError, the one error that says why a job cannot go on
- `sources`: URIs of a job -> file systems and paths; Secrets and ConfigMaps as mounted files
- `data`: rows of any file -> token ids and labels -> batches that follow from (seed, epoch) -> tensors
- `attention`: examples in one flat row that do not see each other
- `model_files`, `model`: the base model's files and tokenizer, checked on the head; the model, loaded on the workers
- `methods`: which parameters train, what of them is saved and published
- `objectives`: what is minimised

How it runs:

- `environment`, `interruption`: what the operator tells a pod at its start, and when it is to stop
- `storage`, `manifest`: folders that are complete and proven, or not there
- `data_cache`: prepared data in the storage, found again by what it was made from
- `loop`, with `worker`, `optimisation`, `checkpoint`, `evaluation`, `result`: the training, in plain torch, without a word of Ray
- `worker_group`, `ray_cluster`: the loop on many workers, again after some were lost
- `progress`, `following`, `report`, `console`, `failures`: from the workers to the head, and from the head to everyone else
- `export`, `model_card`: the published folder
- `run`, `head`, `__main__`: the stages in order, the head's process, the entry
"""
