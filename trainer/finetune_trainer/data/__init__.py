"""From a file of rows to the tensors of a step.

    inputs ---> formats -----> encoding -----> writing -----> examples ------> batches -------> tensors
    rows of     checked        token ids       appended to    flat arrays      which rows in    input ids, targets,
    any file    rows: chat,    and which of    files, then    on disk, one     which step, on   positions, document
    or hub      prompt, text   them are        split          digest           which worker     boundaries
    data set                   labels

`prepare` is the way from the first to the examples; `reading` takes each row along it. `inputs` has the rows of files from `rows` (JSON
from `json_values`), those of a hub data set from `hub`; `encoding` has the tokenizer's own part in `tokenising`.

What is left out stands in `left_out`; what is held out of the training data is chosen in `held_out`. `duplicates` and `leakage` compare
examples by the hashes of `runs` of their tokens. `cases` are the texts of what is measured, as it is asked.

Left of `examples` is the head's work, done once, where every fault of the data comes to light; right of it the workers'. They share
nothing but the folder that `examples` describes, and `batches`, which both compute from the same numbers.
"""
