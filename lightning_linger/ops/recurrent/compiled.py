"""The steps of a recurrent layer as one compiled function each: the same integers, fewer calls.

A step is a few dozen small operations on integers, and most of its time goes into calling them. It
is recorded once per layer shape and grid, with everything that training changes (weights, biases,
ratios) as an operand, and compiled by ``torch.compile``. Nothing in it depends on an order of
summation: sums of products are whole numbers that their dtype holds. Inductor contracts no product
and sum into one operation by its default (``cpp.enable_floating_point_contract_flag``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_linger.core.logs import logger
from lightning_linger.ops.recurrent.cells import Cell

# A variant takes seconds to compile and little memory.
_MOST_VARIANTS = 64

States = tuple[Tensor, ...]
# ``step(t, input, states) -> states``; the first state is the output.
Step = Callable[[int, Tensor, States], States]


class _Kept:
    """Takes what a step leaves for backward, in the place of a trace."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def keep(self, t: int, **values: Tensor) -> None:
        self.values.update(values)


@dataclass(frozen=True)
class _Variant:
    """A compiled step.

    Args:
        run: Takes the operands, the projected input and the states; returns the states and what is
            kept.
        kept: Names of what is kept.
    """

    run: Callable[..., Sequence[Tensor]]
    kept: tuple[str, ...]


class CompiledSteps:
    """Compiles steps, and remembers them by what they are specialized to.

    A layer whose step cannot be compiled runs as it is; the log says why, once for each reason. So
    does one whose hidden state has a free step, outside of integer execution.
    """

    def __init__(self) -> None:
        self._variants: OrderedDict[Hashable, _Variant | None] = OrderedDict()
        self._said: set[str] = set()

    def __len__(self) -> int:
        """Return how many steps are compiled."""
        return sum(variant is not None for variant in self._variants.values())

    @property
    def failed(self) -> int:
        """How many steps could not be compiled."""
        return len(self._variants) - len(self)

    def of(self, cell: Cell, gx: Tensor, states: States) -> Step:
        """Return the step of a cell for operands like these: compiled, or else its own."""
        if cell.trace is not None and cell.hidden.fraction is None:
            return cell.step  # a free step is another one after every training step
        tensors = cell.held_tensors()
        operands = (*tensors.values(), gx, *states)
        like = tuple((x.dtype, tuple(x.shape), x.stride(), x.device) for x in operands)
        key = (cell.signature(), tuple(tensors), like, cell.trace is None)
        if key not in self._variants:
            self._variants[key] = self._variant(cell, list(tensors), operands)
            if len(self._variants) > _MOST_VARIANTS:
                self._variants.popitem(last=False)
        self._variants.move_to_end(key)
        variant = self._variants[key]
        return cell.step if variant is None else _bound(variant, cell, tuple(tensors.values()))

    def _variant(
        self, cell: Cell, names: Sequence[str], operands: Sequence[Tensor]
    ) -> _Variant | None:
        kept = _Kept()

        def step(*given: Tensor) -> list[Tensor]:
            tensors, (gx, *states) = given[: len(names)], given[len(names) :]
            moved = cell.holding(dict(zip(names, tensors, strict=True)))
            # It is asked for nothing but to keep values.
            moved.trace = None if cell.trace is None else kept  # type: ignore[assignment]
            return [*moved.step(0, gx, tuple(states)), *kept.values.values()]

        try:
            with torch.no_grad():
                recorded = make_fx(step)(*operands)
                run = torch.compile(recorded, fullgraph=True, dynamic=False)
                run(*operands)
        except Exception as error:  # whatever a compiler raises: nothing depends on it
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if reason not in self._said:
                self._said.add(reason)
                logger.warning("recurrent layers run without being compiled: %s", reason)
            return None
        return _Variant(run, tuple(kept.values))


def _bound(variant: _Variant, cell: Cell, tensors: States) -> Step:
    def step(t: int, gx: Tensor, states: States) -> States:
        with torch.no_grad():
            results = tuple(variant.run(*tensors, gx, *states))
        count = len(states)
        if cell.trace is not None:
            cell.trace.keep(t, **dict(zip(variant.kept, results[count:], strict=True)))
        return results[:count]

    return step


# Like a table of curves, what is compiled once serves all layers of the process.
STEPS = CompiledSteps()
