"""`helm test` on a real cluster: the installation looks at itself, by a pod that may do next to nothing, and leaves nothing behind."""

import helm_python
import pytest
from tests.e2e.kubectl import Kubectl, wait_until
from tests.e2e.names import RELEASE, SYSTEM

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_helm_test_passes_and_leaves_nothing(release: Kubectl) -> None:
    with helm_python.Config(namespace=SYSTEM) as helm:
        helm.test(RELEASE, timeout=180)
    names = "pods,serviceaccounts,roles,rolebindings"
    wait_until("what the test made is gone", lambda: not [name for name in release.names(names) if name.endswith(f"{RELEASE}-test")], 60)
    assert release.names("finetunejobs") == []
