"""Jobs on this machine, without Kubernetes: the same loop, plan and trainer, with processes in place of pods.

- `state`: the folder that stands in for the cluster's memory and volumes
- `processes`: sessions of processes, known again by a later run
- `cluster`: the port that the loop works on
- `inputs`: the manifest and what it refers to, checked before anything starts
- `view`: what a person sees while the job moves, and at its end
- `run`: the whole run, from manifest to exit code
"""
