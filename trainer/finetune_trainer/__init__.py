"""The trainer: one package that is the head (checks, serves the report, evaluates, publishes) and the workers (compute).

The matter of the training, in the order of its dependence:

- `errors`: JobError, the one error that says why a job cannot go on
- `sources`: URIs of a job -> file systems and paths; Secrets and ConfigMaps as mounted files
- `data`: rows of any file -> token ids and labels -> batches that follow from (seed, epoch) -> tensors
- `attention`: examples in one flat row that do not see each other
- `model_files`, `model`: the base model's files and tokenizer, checked on the head; the model, loaded on the workers
- `methods`: which parameters train, what of them is saved and published
- `objectives`: what is minimised
"""
