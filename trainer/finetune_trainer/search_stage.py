"""The stage Search: trials of other values, the best of which the training goes on with."""

from finetune_api.search import SearchPlan
from finetune_api.status import SearchSummary
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.crew import Crew
from finetune_trainer.goal import SuiteGoal
from finetune_trainer.measuring import Measuring
from finetune_trainer.search_space import told
from finetune_trainer.trials import Trial


def search(attempt: Attempt, preparation: Preparation, crew: Crew, plan: SearchPlan) -> tuple[Preparation, tuple[Trial, ...]]:
    """The job with the best trial's values, and all trials. Raises JobError (SearchFailed, WorkersLost, ...)."""
    from finetune_trainer.search import Search

    searching = Search(preparation.job, preparation.for_workers, attempt.own)
    wanted = 0 if searching.over else attempt.job.spec.compute.workers.max
    attempt.reporter.start_stage("Search", f"trying {searching.total} combinations of values", workers_wanted=wanted)

    def tell(summary: SearchSummary) -> None:
        ended = summary.completed + summary.failed + summary.pruned
        best = f", the best {plan.goal.metric} is {summary.best.value:.4g}" if summary.best else ""
        attempt.reporter.announce(search=summary, message=f"{ended} of {summary.trials} trials have ended{best}")

    def work(group: str, nodes: int) -> None:
        is_suite = plan.goal.metric in attempt.job.spec.evaluation.metric_names
        measure = SuiteGoal(plan.goal.metric, preparation.for_workers, group) if is_suite else None
        searching.run(attempt.environment, nodes, group, tell, measure)

    if not searching.over:
        if any(suite.judge is not None and plan.goal.metric in suite.metric_names for suite in attempt.job.spec.evaluation.suites):
            # Every trial is judged against the untuned model's answers: else trials side by side would each ask for them.
            Measuring(attempt, preparation, crew).ask_baseline("Search")
        crew.run(work, lambda: searching.over or None, lambda: sum(trial.ended for trial in searching.trials.all()))
    best = searching.result().best
    attempt.reporter.announce(search=searching.summary())
    count = len(searching.trials.all())
    attempt.console.say(f"search: trial {best.number} of {count} is the best, {plan.goal.metric} {best.value:.4g}: {told(best.values)}")
    return preparation.with_values(best.values), searching.trials.all()
