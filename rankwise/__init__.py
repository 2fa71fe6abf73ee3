"""rankwise: LoRA ranks per layer under a budget, compared honestly, taken home as a plan."""

from rankwise.config import ScaleRule, StudyConfig
from rankwise.errors import RankwiseError
from rankwise.explaining import explain
from rankwise.exporting import export
from rankwise.planning import plan, stability
from rankwise.plans import RankPlan

__all__ = ["RankPlan", "RankwiseError", "ScaleRule", "StudyConfig", "explain", "export", "plan", "stability"]
