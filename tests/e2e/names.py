"""What the tests install, where, and from what."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/finetune-operator"
CRD = "finetunejobs.finetune.dev"
RELEASE = "finetune-operator"
SYSTEM = "finetune-system"
CLAIM = "models"
"""The volume of the quickstart."""
MODEL = ROOT / "examples/models/tiny-llama"
DATA = ROOT / "examples/data/support"
QUICKSTART = ROOT / "examples/quickstart.yaml"
