"""From a file of rows to the tensors of a step.

    inputs ---> formats -----> encoding -----> writing -----> examples ------> batches -------> tensors
    rows of     checked        token ids       appended to    flat arrays      which rows in    input ids, targets,
    any file    rows: chat,    and which of    files, then    on disk, one     which step, on   positions, document
    or hub      prompt, text   them are        split          digest           which worker     boundaries
    data set                   labels

`prepare` is the way from the first to the examples. `inputs` has the rows of files from `rows` (JSON from `json_values`), those of a hub
data set from `hub`; `encoding` has the tokenizer's own part in `tokenising`.

Left of `examples` is the head's work, done once, where every fault of the data comes to light; right of it the workers'. They share
nothing but the folder that `examples` describes, and `batches`, which both compute from the same numbers.
"""
