"""The operator: watches FineTuneJobs, runs their pods, writes their status.

One loop does everything: read what is there, decide (pure), write the status, then bring the objects in line.

- `settings`: what the operator's environment says, read once
- `manifest`: manifests as kubectl reads them, and errors that name line, field and remedy
- `observed`: raw objects as plain values (pure)
- `lifecycle`: job, observation and clock give the status (pure); `failures`, `reported`, `conditions`, `pace` and `times` are its parts
- `plan`: job and status give the objects that should exist (pure), `pods` the pods among them; `transitions` the Events
- `port`: what the loop needs of the world; `cluster` is the Kubernetes API, `local` this machine, with processes in place of pods
- `reconcile`, `queue`: the loop, and whose turn it is; `survey`: all jobs at once, and which of them rest (`resting`, pure)
- `metrics`, `handlers`, `cli`: Prometheus, kopf (with `watching`, its settings) and the command line
"""
