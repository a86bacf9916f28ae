"""What people do to jobs in a cluster, a module for each command: submit, follow, read logs, suspend, resume, retry, cancel.

The same program is `finetune` and the kubectl plugin `kubectl finetune`. Texts of jobs and pods are a tenant's: they are scrubbed before
they come to a terminal.
"""
