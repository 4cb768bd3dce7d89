"""The parameters of a model as they are on their grids."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_linger.core.instrumentation import STATE_PREFIX, instrumentation_of
from lightning_linger.core.switches import RoundedParameter
from lightning_linger.nics_fix.items import BUFFERS
from lightning_linger.stages.checkpoints import recorded_example

SCALE_SUFFIX = "_fp_scale"


@torch.no_grad()
def fix_state_dict(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> OrderedDict[str, Tensor]:
    """Return the ``state_dict`` with the values that an evaluation of the model computes with.

    Every parameter that is rounded stands there rounded, under its own name, and beside it its
    scale as ``<name>_fp_scale``: NICS-fix's half-range 2^x of a weight; of a bias, whose width is
    that of the accumulator, the step. A layer that has taken in a batch norm has the folded weight
    and bias; where it rounds nothing, and before a range is known, values are the float ones.
    ``model.state_dict()`` goes on to hold the float masters.

    The model runs once, as in evaluation; nothing of it changes.

    Args:
        model: A quantized model.
        example_inputs: What to run it on; None takes inputs of the recorded kind.
        example_kwargs: Keyword inputs.
    """
    called, args, kwargs = model, example_inputs or (), example_kwargs or {}
    if example_inputs is None and example_kwargs is None:
        called, args, kwargs = recorded_example(model)
        device = next((x.device for x in model.parameters()), torch.device("cpu"))
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    state = OrderedDict(
        (name, value.detach().clone())
        for name, value in model.state_dict().items()
        if not name.startswith(STATE_PREFIX)
    )
    owners = {
        x.untyped_storage().data_ptr(): name
        for name, x in (*model.named_parameters(), *model.named_buffers())
    }
    instrumentation = instrumentation_of(model)
    for rounded in _rounded_parameters(model, called, args, kwargs):
        source = rounded.source
        name = None if source is None else owners.get(source.untyped_storage().data_ptr())
        if name is None or source is None:
            owner = instrumentation.find(rounded.site).node.owner
            name = f"{owner}.{rounded.name}".lstrip(".")
            state[name] = rounded.values.clone()
        else:
            _write(state[name], source, rounded.values)
        site = instrumentation.find(rounded.site)
        ranges = site.statistics if rounded.name in BUFFERS else site.weights
        bits = site.weights.bits if ranges is None else ranges.bits
        is_bias = rounded.name.endswith("bias")
        scale = rounded.step if is_bias else rounded.step * 2.0 ** (bits - 1)
        state[_scale_name(state, name, rounded)] = scale.clone()
    return state


def _rounded_parameters(
    model: nn.Module, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[RoundedParameter]:
    instrumentation = instrumentation_of(model)
    modes = [(module, module.training) for module in model.modules()]
    found: list[RoundedParameter] = []
    model.eval()
    instrumentation.thaw()
    instrumentation.switches.rounded = found
    try:
        called(*args, **kwargs)
    finally:
        instrumentation.switches.rounded = None
        for module, mode in modes:
            module.training = mode
        instrumentation.thaw()
    return found


def _write(whole: Tensor, part: Tensor, values: Tensor) -> None:
    """Write the values of a part of a parameter, or of all of it, into a copy of the parameter."""
    if part.numel() == whole.numel():
        whole.copy_(values.reshape(whole.shape))
        return
    start = part.storage_offset()
    whole.view(-1)[start : start + part.numel()] = values.reshape(-1).to(whole.dtype)


def _scale_name(state: OrderedDict[str, Tensor], name: str, rounded: RoundedParameter) -> str:
    """Name the scale, apart from those of other parts of one parameter."""
    plain = name + SCALE_SUFFIX
    return plain if plain not in state else f"{name}.{rounded.name}{SCALE_SUFFIX}"
