"""The recorded dataflow of a model: which call feeds which."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

OUTPUT = "<output>"


@dataclass(frozen=True)
class TensorSpec:
    """What is kept of a tensor argument after recording.

    Args:
        value: Identity of the value within its run; equal where the same tensor flows.
        shape: Its shape.
        floating: Whether its dtype is floating point.
        constant: Whether it is a parameter or buffer of the model, not a function of the input.
    """

    value: int
    shape: tuple[int, ...]
    floating: bool
    constant: bool


@dataclass(frozen=True)
class Node:
    """One recorded call.

    Args:
        key: Site key, ``module.path/op/k`` (``module.path@2/op/k`` in the third call of a reused
            module).
        op: Canonical op name, or the function's own name where the library has no op for it.
        function: Name of the torch function.
        owner: Dotted path of the module whose forward made the call.
        invocation: Which call of that module in this forward, from 0.
        args: Positional arguments with every tensor replaced by its :class:`TensorSpec`.
        kwargs: Keyword arguments, likewise.
        inputs: Specs of all tensors among the arguments, in order.
        written: The value that the call overwrites, if any.
        outputs: Specs of all tensors among the results, in order.
        location: ``file:line`` of the model code that made the call.
    """

    key: str
    op: str
    function: str
    owner: str
    invocation: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    written: int | None
    outputs: tuple[TensorSpec, ...]
    location: str


@dataclass
class Run:
    """One recorded forward.

    Args:
        nodes: The calls in execution order.
        given: The values that outermost module calls were given.
        returned: The values that outermost module calls returned, in order.
        aliased: Keys of in-place calls whose operand is read later through its old name.
    """

    nodes: list[Node] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    returned: list[int] = field(default_factory=list)
    aliased: set[str] = field(default_factory=set)

    def consumers(self, value: int) -> list[str]:
        """Return the keys of the nodes that read a value, ``OUTPUT`` where it is returned."""
        keys = [node.key for node in self.nodes if any(spec.value == value for spec in node.inputs)]
        return keys + [OUTPUT] * (value in self.returned)


class Graph:
    """The union of several recorded forwards (training and evaluation mode may differ)."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self._nodes: dict[str, Node] = {}
        for run in self.runs:
            for node in run.nodes:
                self._nodes.setdefault(node.key, node)

    def __iter__(self) -> Iterator[Node]:
        """Iterate over the distinct nodes in execution order."""
        return iter(self._nodes.values())

    def __contains__(self, key: str) -> bool:
        """Whether a node of this key was recorded."""
        return key in self._nodes

    def __getitem__(self, key: str) -> Node:
        """Return the node of a key."""
        return self._nodes[key]

    def sole_consumer(self, key: str) -> Node | None:
        """Return the only node that reads the result of ``key`` in every run, if there is one."""
        found: set[str] = set()
        for run in self.runs:
            for node in run.nodes:
                if node.key == key:
                    consumers = [c for out in node.outputs for c in run.consumers(out.value)]
                    if len(consumers) != 1:
                        return None
                    found.add(consumers[0])
        if len(found) != 1 or found == {OUTPUT}:
            return None
        return self._nodes[found.pop()]

    def is_aliased(self, key: str) -> bool:
        """Whether ``key`` works in place on a value that is read later through its old name."""
        return any(key in run.aliased for run in self.runs)
