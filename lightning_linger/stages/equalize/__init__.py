"""Cross-layer equalization: channels of neighbouring layers brought to like ranges."""

from lightning_linger.stages.equalize.algorithm import Equalization, EqualizationRow, equalize
from lightning_linger.stages.equalize.pairs import EqualizationFactors

__all__ = ["Equalization", "EqualizationFactors", "EqualizationRow", "equalize"]
