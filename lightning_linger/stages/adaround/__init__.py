"""AdaRound: which weights to round up and which down, learned from the layer's output."""

from lightning_linger.stages.adaround.algorithm import AdaRounding, adaround, adaround_by
from lightning_linger.stages.adaround.config import AdaRoundConfig
from lightning_linger.stages.adaround.layer import AdaRoundRow

__all__ = ["AdaRoundConfig", "AdaRoundRow", "AdaRounding", "adaround", "adaround_by"]
