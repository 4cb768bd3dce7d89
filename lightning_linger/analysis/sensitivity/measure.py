"""How much a model loses by quantizing one layer, measured layer by layer and width by width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from lightning_linger.analysis.sensitivity.scores import output_score
from lightning_linger.analysis.sensitivity.table import Part, Sensitivities
from lightning_linger.analysis.sensitivity.trials import Mode, Trials, check_trials
from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.simulate.divergence import Forward, forward_of
from lightning_linger.stages.prepare import check_example, no_trace
from lightning_linger.stages.quantize import plan_quantize
from lightning_linger.stages.trial import kept_plan

Metric = Literal["noise", "kl"] | Callable[[nn.Module, Sequence[Any]], float]


def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    metric: Metric = "noise",
    bits: Sequence[int] = (2, 4, 8),
    mode: Mode = "one_at_a_time",
    part: Part = "weights",
    modules: Sequence[str] | None = None,
    config: QuantConfig | None = None,
) -> Sensitivities:
    """Measure what each layer of a prepared model costs at each width, without training.

    Every trial is planned, calibrated and evaluated on all batches, which are kept in memory: pass
    few. Afterwards the model is as it was, to the last bit. Float is what the other stages make of
    the model: folding and limits that are on stay on.

    Args:
        model: A prepared model, planned to be quantized or not.
        loader: Batches: tensors, tuples or lists whose first entry is the input, or mappings of
            keyword inputs.
        metric: ``noise``, the power of what quantization adds to the model's output as a share of
            the power of the float output; ``kl``, the Kullback-Leibler divergence of the decisions
            (softmax over dimension 1) from those in float, in nats; neither needs labels. Or a
            function of the model and the batches that returns a number which is better when it is
            higher, such as an accuracy.
        bits: Widths to measure.
        mode: ``one_at_a_time``: one layer has the width, and the drop is what that costs.
            ``all_but_one``: all layers but one have it, and the drop is what leaving out that one
            wins. Whatever does not have the width has 16 bits, next to float.
        part: What of a layer has the width.
        modules: Globs on dotted paths: only these layers are measured.
        config: How layers are quantized, if the model has no plan; widths in it do not count.

    Returns:
        A row per layer and width. A layer is a module that makes one call, or else the call.

    Raises:
        ConfigError: If an argument is wrong, or the loader gives no batch.
        NonFiniteError: If the metric is not finite.
        UnsupportedError: If the model has nothing of that part.
    """
    batches = list(loader)
    if not batches:
        msg = "the loader gave no batch to measure sensitivities with."
        raise ConfigError(msg)
    for batch in batches:
        check_example(batch)
    forwards = [forward_of(model, batch) for batch in batches]
    score = _applied(metric, model, batches) if callable(metric) else output_score(metric, forwards)
    return measure_sensitivity(model, forwards, score, bits, mode, part, modules, config)


def measure_sensitivity(
    model: nn.Module,
    forwards: Sequence[Forward],
    score: Callable[[], float],
    bits: Sequence[int] = (2, 4, 8),
    mode: Mode = "one_at_a_time",
    part: Part = "weights",
    modules: Sequence[str] | None = None,
    config: QuantConfig | None = None,
) -> Sensitivities:
    """Measure sensitivities of whatever runs the model; see :func:`sensitivity`.

    Args:
        model: A prepared model.
        forwards: Run the model on a batch each, to find ranges.
        score: Evaluates the model as it is at the moment; higher is better. Called in float first.
        bits: Widths.
        mode: What is quantized with the layer.
        part: What of it.
        modules: Globs on dotted paths.
        config: How, if the model has no plan.
    """
    widths = check_trials(bits, mode, part)
    instrumentation = instrumentation_of(model)
    with no_trace(model), kept_plan(model):
        model.eval()
        if "quantize" not in instrumentation.plans:
            plan_quantize(model, config or QuantConfig())
        elif config is not None:
            msg = (
                "the model is planned to be quantized, and measured as that plan has it. Leave "
                "`config` away, or call `linger.strip(model)` and `linger.prepare` to start over."
            )
            raise ConfigError(msg)
        trials = Trials(model, forwards, score, part, modules)
        rows = trials.run(widths, mode)
    logger.info(
        "measured %d layers of %s at %s bits", len(trials.units), type(model).__name__, list(widths)
    )
    return Sensitivities(rows)


def _applied(
    metric: Callable[[nn.Module, list[Any]], float], model: nn.Module, batches: list[Any]
) -> Callable[[], float]:
    return lambda: float(metric(model, batches))
