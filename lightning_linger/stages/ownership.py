"""Whether parameters belong to one call alone, so that they may be changed for it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from lightning_linger.core.graph import Graph, Node, TensorSpec
from lightning_linger.core.sites import Site


class Ownership:
    """Who reads and who holds each parameter of a prepared model.

    Args:
        model: The model.
        graph: Its recorded dataflow.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph = graph
        self._holders: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.numel():
                self._holders[parameter.data_ptr()].append(name)

    def obstacle(self, site: Site, names: tuple[str, ...] = ("weight", "bias")) -> str | None:
        """Say why parameters of a site's module cannot be changed for this site alone, if so.

        Args:
            site: The call.
            names: What it reads, as its module and the arguments of its function name them.
        """
        return next(filter(None, (self._obstacle(site, name) for name in names)), None)

    def _obstacle(self, site: Site, name: str) -> str | None:
        spec = getattr(site.recorded_call, name)
        if spec is None:
            return None
        module: Any = site.owner
        parameter = module._parameters.get(name)
        if not isinstance(spec, TensorSpec) or not spec.constant:
            return f"its {name} is computed"
        if parameter is None or tuple(parameter.shape) != spec.shape:
            return f"its {name} is not the parameter `{name}` of its module"
        readers = self._readers(site.node, spec)
        if len(readers) > 1:
            return f"its {name} is read by {len(readers)} calls"
        holders = self._holders[parameter.data_ptr()]
        if len(holders) > 1:
            return f"its {name} is shared: {', '.join(holders)}"
        return None

    def _readers(self, node: Node, spec: TensorSpec) -> list[str]:
        run = next(run for run in self.graph.runs if any(node is own for own in run.nodes))
        return run.consumers(spec.value)
