"""`python -m finetune_trainer head` and `python -m finetune_trainer worker`: what the pods run; `chat` is what `finetune chat` runs."""

import os
import sys
import warnings

from finetune_trainer.environment import environment_from


def main(arguments: list[str]) -> int:
    """Run a role. Returns the exit code: 0 succeeded, 1 failed, 143 interrupted, 2 called wrongly."""
    if arguments[:1] == ["chat"]:
        warnings.simplefilter("ignore")
        from finetune_trainer.chat import main as chat

        return chat(arguments[1:])
    if arguments not in (["head"], ["worker"]):
        print("usage: python -m finetune_trainer head|worker|chat", file=sys.stderr)  # noqa: T201
        return 2
    try:
        environment = environment_from(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    if arguments == ["worker"]:
        from finetune_trainer.ray_cluster import become_worker

        become_worker(environment, environment.job())
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    from finetune_trainer.head import run_head

    return run_head(environment)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's and the server's threads need not be waited for: everything is written
