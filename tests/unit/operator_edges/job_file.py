"""A job's manifest as a person writes it; method.lora stands in line 7."""

JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: bot}
spec:
  model: {source: hf://org/model}
  data: {train: {source: pvc://data/train.jsonl}}
  method: {lora: {}}
  output: {storage: pvc://models/bot}
"""
