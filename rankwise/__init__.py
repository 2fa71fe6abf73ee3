"""rankwise: LoRA ranks per layer under a budget, compared honestly, taken home as a plan."""

from rankwise.errors import RankwiseError

__all__ = ["RankwiseError"]
