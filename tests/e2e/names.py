"""What the tests install, where, and from what."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/finetune-operator"
CRD = "finetunejobs.finetune.dev"
PROFILE_CRD = "tuningprofiles.finetune.dev"
RELEASE = "finetune-operator"
SYSTEM = "finetune-system"
CLAIM = "quickstart"
"""The volume that the quickstart names."""
CONFIG_MAP = "support-data"
"""The data that the quickstart names."""
MODELS = ROOT / "examples/models"
DATA = ROOT / "examples/data/support"
QUICKSTART = ROOT / "examples/quickstart.yaml"
STORAGE = ROOT / "examples/quickstart-storage.yaml"
STORAGE_POD = "quickstart-storage"
