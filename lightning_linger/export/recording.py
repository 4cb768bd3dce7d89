"""What a recording has to watch: which site calls which op, and which branches are taken."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_linger.core.calls import Event
from lightning_linger.core.errors import QuantizationWarning, UnsupportedError
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.locations import caller_location
from lightning_linger.export.captured_nodes import (
    NAMESPACE,
    OPERAND_OPS,
    bind,
    labelled,
    op_name,
    translation,
)


class Branches:
    """Decisions by the values of a tensor (``if x.sum() > 0:``), by the line that takes them."""

    def __init__(self, answers: dict[str, list[bool]] | None = None) -> None:
        self._recorded = answers
        self.answers: dict[str, list[bool]] = {}

    @property
    def replaying(self) -> bool:
        """Whether the answers are those of an example that ran before."""
        return self._recorded is not None

    def replay(self) -> Branches:
        """Return branches that answer as these were answered."""
        return Branches(self.answers)

    def restart(self) -> None:
        """Start a forward: a recording may run it more than once."""
        self.answers = {}

    def ask(self, x: Tensor) -> bool:
        """Decide: by the value while the example runs, as the example did afterwards."""
        location = caller_location()
        given = self.answers.setdefault(location, [])
        if self._recorded is None:
            answer = bool(x)
            if not given:
                file, _, line = location.rpartition(":")
                warnings.warn_explicit(
                    f"{location} decides by the values of a tensor. The exported graph holds the "
                    f"branch that the example inputs take ({answer}) and no other.",
                    QuantizationWarning,
                    file,
                    int(line) if line.isdigit() else 0,
                )
        else:
            known = self._recorded.get(location, [])
            if len(given) >= len(known):
                msg = (
                    f"{location} decides by the values of a tensor, and not as often as it did for "
                    "the example inputs. Replace the branch by tensor arithmetic (torch.where)."
                )
                raise UnsupportedError(msg)
            answer = known[len(given)]
        given.append(answer)
        return answer


@dataclass
class Labels:
    """Which site called which op.

    Every recorded op takes the name of its platform. A running number behind that name survives
    whatever a graph capture does to the graph, and tells sites apart that are alike in all else.
    """

    sites: dict[str, str] = field(default_factory=dict)
    pending: list[tuple[str, str]] = field(default_factory=list)
    ran: Counter[str] = field(default_factory=Counter)
    own_ops: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def restart(self) -> None:
        """Start a forward."""
        self.pending.clear()
        self.ran.clear()
        self.own_ops.clear()

    def next(self, op: str, platform: str) -> str:
        """Return the platform's name with the next label."""
        self.count += 1
        label = str(self.count)
        self.pending.append((label, op))
        return labelled(platform, label)

    def tap(self, event: Event) -> None:
        """Give the ops called since the last site to this one."""
        key = event.site.key
        self.ran[key] += 1
        for label, op in self.pending:
            self.sites[label] = key
            self.own_ops[key] += op not in OPERAND_OPS
        self.pending.clear()


class Watch(TorchFunctionMode):
    """Sees every op below the instrumentation: labels the library's, and answers branches."""

    def __init__(self, branches: Branches) -> None:
        super().__init__()
        self.branches = branches
        self.labels = Labels()
        self.seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def watching(self, instrumentation: Instrumentation) -> Iterator[None]:
        """Learn from the instrumentation which site runs; run the example under the watch."""
        before = instrumentation.tap
        instrumentation.tap = self.labels.tap
        try:
            if self.branches.replaying:
                yield
            else:
                with self:
                    yield
        finally:
            instrumentation.tap = before

    def __enter__(self) -> Any:
        self.branches.restart()
        self.labels.restart()
        return super().__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.__bool__:
            return self.branches.ask(args[0])
        if isinstance(func, torch._ops.OpOverload) and func.namespace == NAMESPACE:
            self.seen[op_name(func)] = func
            args, kwargs = self._labelled(func, args, kwargs)
        return func(*args, **kwargs)

    def _labelled(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        op = op_name(func)
        arguments = bind(func, args, kwargs)
        # The example runs in earnest, on the platform by its own name. A dequantized value belongs
        # to no site; alike ones may be merged.
        if not self.branches.replaying or op == "dequantize" or "platform" not in arguments:
            return args, kwargs
        return (), {**arguments, "platform": self.labels.next(op, arguments["platform"])}

    def translations(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """Return the translation of each of the library's ops to a captured node."""
        return {func: translation(func) for func in self.seen.values()}
