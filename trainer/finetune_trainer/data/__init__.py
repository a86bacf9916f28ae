"""From a file of rows to the tensors of a step.

    rows -----> formats -----> encoding -----> prepare -----> examples ------> batches -------> tensors
    parsed      checked        token ids       all splits,    flat arrays      which rows in    input ids, targets,
    rows of     rows: chat,    and which of    counted and    on disk, one     which step, on   positions, document
    any file    prompt, text   them are        split          digest           which worker     boundaries
                               labels

Left of `examples` is the head's work, done once, where every fault of the data comes to light; right of it the workers'. They share
nothing but the folder that `examples` describes, and `batches`, which both compute from the same numbers.
"""
