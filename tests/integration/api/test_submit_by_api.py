"""`finetune submit` against an API server: what it would store, and that a dry run stores nothing."""

import asyncio
from pathlib import Path

import pytest
import yaml
from tests.integration.api.apiserver import ApiServer
from tests.integration.api.stages import Stage
from tests.unit.operator_edges.job_file import JOB
from typer.testing import CliRunner

from finetune_operator.cli import app

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture
def submit(server: ApiServer, tmp_path: Path):
    """Runs `finetune submit` with this text and gives exit code and output."""

    def run(text: str, *options: str) -> tuple[int, str]:
        file = tmp_path / "job.yaml"
        file.write_text(text)
        done = CliRunner().invoke(app, ("submit", str(file), *options), env={"KUBECONFIG": str(server.admin_kubeconfig)})
        return done.exit_code, done.output

    return lambda *arguments: asyncio.to_thread(run, *arguments)


async def test_a_dry_run_stores_nothing_and_shows_what_submitting_stores(submit, stage: Stage) -> None:
    here = ("-n", stage.namespace)

    code, output = await submit(JOB, *here, "--dry-run")
    assert code == 0, output
    assert f"# bot would be submitted in namespace {stage.namespace} (nothing is stored)" in output
    assert await stage.kube.get("FineTuneJob", stage.namespace, "bot") is None

    assert await submit(JOB, *here) == (0, f"bot submitted in namespace {stage.namespace}\n")
    stored = await stage.kube.get("FineTuneJob", stage.namespace, "bot")
    assert stored is not None
    shown = yaml.safe_load(output)
    assert (shown["spec"], shown["metadata"]) == (stored["spec"], {"name": "bot", "namespace": stage.namespace})
    assert shown["spec"]["method"]["lora"]["rank"] == 16, "a default that the file does not say"

    code, output = await submit(JOB + "  suspend: true\n", *here, "--dry-run")
    assert (code, yaml.safe_load(output)["spec"]["suspend"]) == (0, True)
    assert "# bot would be applied in" in output
    assert await stage.kube.get("FineTuneJob", stage.namespace, "bot") == stored


async def test_a_dry_run_ends_with_the_servers_refusal(submit) -> None:
    code, output = await submit(JOB, "-n", "absent", "--dry-run")
    assert (code, output) == (1, 'finetune: cannot patch FineTuneJob absent/bot: namespaces "absent" not found\n')
