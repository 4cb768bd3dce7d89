"""Recording one forward: which calls the model makes, on which values."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.frames import Activation
from lightning_linger.core.functions import Canonical
from lightning_linger.core.graph import Node, Run, TensorSpec
from lightning_linger.core.locations import (
    caller_location,
    checkpoint_region,
    directly_checkpointed,
)
from lightning_linger.core.registry import op_of
from lightning_linger.core.tags import takes_activations


class WholeModelRan(BaseException):
    """The recorded model has returned; what its caller does next leaves traces only."""


class Recorder:
    """Runs the torch functions of one forward as they are and notes the dataflow.

    Args:
        constants: ``id`` of every parameter and buffer of the model.
        stop_after_whole: Raise :class:`WholeModelRan` once the model itself has returned.
    """

    def __init__(self, constants: set[int], stop_after_whole: bool = False) -> None:
        self.run = Run()
        self._stop_after_whole = stop_after_whole
        self._constants = constants
        self._values: dict[int, int] = {}
        # Tensors are kept alive, so that an `id` is never reused.
        self._alive: list[Tensor] = []
        self._also_alive: list[Tensor] = []
        self._overwritten: dict[int, int] = {}
        # The frames themselves: an `id` would be used again once a frame is gone.
        self._regions: dict[str, FrameType | None] = {}

    def call(
        self,
        func: Any,
        canonical: Canonical | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        activation: Activation,
    ) -> Any:
        """Run one function and note it."""
        if canonical is not None and canonical.query:
            return func(*args, **kwargs)
        function = getattr(func, "__name__", str(func))
        name = canonical.op if canonical is not None and canonical.op else function
        op = op_of(name)
        takes = takes_activations if op is None else op.takes
        if not takes(args, kwargs):
            return func(*args, **kwargs)
        index = activation.count(name)
        key = activation.key(name, index)
        if op is not None and op.has_site:
            self._refuse_lost_checkpoints(key, activation)
        spec_args = tree_map_only(Tensor, self._spec, args)
        spec_kwargs = tree_map_only(Tensor, self._spec, kwargs)
        inputs = tuple(self._spec(x) for x in _tensors((args, kwargs)))
        self._note_aliases(inputs)
        if canonical is not None and canonical.swapped:
            spec_args = (spec_args[1], spec_args[0], *spec_args[2:])
        inplace = bool(kwargs.get("inplace")) or (canonical is not None and canonical.inplace)
        target = kwargs.get("out") if isinstance(kwargs.get("out"), Tensor) else None
        written = self._spec(target).value if target is not None else None
        if inplace and inputs:
            written = inputs[0].value
        result = func(*args, **kwargs)
        if inplace and isinstance(result, Tensor):
            if not inputs[0].constant:
                self._overwritten[inputs[0].value] = len(self.run.nodes)
            # A new object for the new value tells it from the name it had before.
            result = result.view_as(result)
        outputs = tuple(self._new(x) for x in _tensors(result))
        self.run.nodes.append(
            Node(
                key=key,
                op=name,
                function=function,
                owner=activation.path,
                invocation=activation.invocation,
                args=spec_args,
                kwargs=spec_kwargs,
                inputs=inputs,
                written=written,
                outputs=outputs,
                location=caller_location(),
            )
        )
        return result

    def owns(self, module: nn.Module) -> None:
        """Note that a module has parameters: those of a sharded one are there while it runs."""
        parameters = [x for x in module._parameters.values() if x is not None]
        self._also_alive += parameters
        self._constants |= {id(x) for x in parameters}

    def renamed(self, before: Tensor, after: Tensor) -> None:
        """Note that a value goes on as another tensor."""
        self._values[id(after)] = self._spec(before).value
        self._also_alive.append(after)

    def given(self, arguments: Any) -> None:
        """Note what an outermost module call is given."""
        self.run.given |= {self._spec(x).value for x in _tensors(arguments)}

    def returned(self, output: Any, whole: bool) -> None:
        """Note what an outermost module call returned.

        Raises:
            WholeModelRan: If that was the whole model, and nothing after it is of interest.
        """
        returned = tuple(self._spec(x) for x in _tensors(output))
        self._note_aliases(returned)
        self.run.returned += [spec.value for spec in returned]
        if whole and self._stop_after_whole:
            raise WholeModelRan

    def _refuse_lost_checkpoints(self, key: str, activation: Activation) -> None:
        if directly_checkpointed():
            msg = (
                f"`{key}` at {caller_location()} runs directly inside "
                "`torch.utils.checkpoint.checkpoint`, where it cannot be found again during "
                "backward. Checkpoint a module (`checkpoint(self.block, x)`) instead of a function."
            )
            raise UnsupportedError(msg)
        region = checkpoint_region()
        if self._regions.setdefault(activation.path, region) is not region:
            msg = (
                f"`{key}` at {caller_location()}: a module that is called several times in one "
                "forward, not all in the same checkpointed part, cannot be found again during "
                "backward. Use one module per part, or do without `torch.utils.checkpoint`."
            )
            raise UnsupportedError(msg)

    def _note_aliases(self, inputs: tuple[TensorSpec, ...]) -> None:
        for spec in inputs:
            writer = self._overwritten.get(spec.value)
            if writer is not None:
                self.run.aliased.add(self.run.nodes[writer].key)

    def _spec(self, x: Tensor) -> TensorSpec:
        value = self._values.get(id(x))
        if value is None:
            return self._new(x)
        return self._describe(x, value)

    def _new(self, x: Tensor) -> TensorSpec:
        value = len(self._alive)
        self._alive.append(x)
        self._values[id(x)] = value
        return self._describe(x, value)

    def _describe(self, x: Tensor, value: int) -> TensorSpec:
        return TensorSpec(
            value, tuple(x.shape), x.dtype.is_floating_point, id(x) in self._constants
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
