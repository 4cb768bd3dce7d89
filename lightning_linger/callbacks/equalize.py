"""Cross-layer equalization, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks.algorithm import AlgorithmCallback
from lightning_linger.stages.equalize import EqualizationFactors, equalize
from lightning_linger.stages.forwards import Forward


class EqualizeCallback(AlgorithmCallback):
    """Rescales channels between neighbouring layers before quantization starts.

    With factors that are powers of two the float model computes the same bits as before. What an
    optimizer remembers of rescaled parameters starts anew.

    Args:
        at_epoch: At the start of this epoch; None, without ``at_step``, at the end of ``fit``,
            right before `CalibrateCallback`.
        at_step: Before this optimizer step, instead.
        factors: ``power_of_two``, or ``free``, which changes the float function by rounding.
        absorb_bias: Also move high biases on to the next layer, see :func:`linger.equalize`.
        modules: Globs on dotted paths: pairs of which both layers match; None takes all.
    """

    name = "equalize"
    order = 0
    needs_ranges = False

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        factors: EqualizationFactors = "power_of_two",
        absorb_bias: bool = False,
        modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__(at_epoch, at_step, batches=1)
        self.factors = factors
        self.absorb_bias = absorb_bias
        self.modules = modules

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing to refuse: no data is needed."""

    def apply(self, trainer: Any, module: Any, forwards: Sequence[Forward]) -> None:
        """Equalize, and let optimizers forget the moments of what was rescaled."""
        versions = {parameter: parameter._version for parameter in module.parameters()}
        equalize(module, self.factors, self.absorb_bias, self.modules)
        rescaled = [p for p, version in versions.items() if p._version != version]
        for optimizer in trainer.optimizers:
            for parameter in rescaled:
                optimizer.state.pop(parameter, None)
