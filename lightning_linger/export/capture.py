"""Recording one forward of a prepared model as ONNX nodes with the integer ops kept whole.

``torch.export`` records the forward, ``torch.onnx`` turns what is plain PyTorch into plain ONNX.
The library's own ops become nodes of a private domain that carry every argument; a dialect
translates them afterwards, with the finished graph in view.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import ir
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.export.capture_errors import (
    located,
    quiet,
    quiet_about_flat_weights,
    readable_errors,
)
from lightning_linger.export.captured_nodes import NAMESPACE, OPERAND_OPS, bind, label_of, op_name
from lightning_linger.export.inputs import Inputs, path_name, unique_names
from lightning_linger.export.recording import Branches, Labels, Watch

# Where torch.onnx says which modules a node was called in.
_SCOPES = re.compile(r"'([^']*)'")


@dataclass(frozen=True)
class Captured:
    """One recorded forward.

    Args:
        model: The graph; the library's ops are nodes of :data:`CAPTURE_DOMAIN`.
        sites: Site key of each label (see :class:`Labels`).
        live: How often each site's own op contributes to an output.
        input_names: Of the graph's inputs, in order.
        output_names: Of the graph's outputs, in order.
    """

    model: ir.Model
    sites: dict[str, str]
    live: Counter[str]
    input_names: list[str]
    output_names: list[str]


def capture(
    model: nn.Module,
    instrumentation: Instrumentation,
    inputs: Inputs,
    tensors: Sequence[Tensor],
    opset_version: int,
) -> Captured:
    """Run the model once as it is, then record it.

    The first run fills what evaluation derives from weights, so that it is a constant of the graph,
    and answers the questions that the recording cannot ask: which branch the example takes.

    Args:
        model: A prepared model in evaluation mode, in the number system to record.
        instrumentation: Its instrumentation.
        inputs: The arguments of one forward.
        tensors: What stands in the place of their tensors.
        opset_version: Of the standard ONNX domain.

    Raises:
        FailingForwardError: If the model does not run on the tensors.
        UnsupportedError: If the forward cannot be recorded, or a site is missing in the record.
    """
    forward = _Forward(model, inputs)
    # A part that is compiled would hide its calls.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        example = Watch(Branches())
        with example.watching(instrumentation), located(inputs, tensors):
            forward.run(tensors)
        recording = Watch(example.branches.replay())
        forward.watch = recording
        with (
            recording.watching(instrumentation),
            readable_errors("recorded"),
            quiet_about_flat_weights(),
        ):
            program = torch.export.export(forward, tuple(tensors), strict=False)
    live = _live_sites(program, example.labels, recording.labels)
    with readable_errors("translated to ONNX"), quiet():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=recording.translations(),
            opset_version=opset_version,
            verbose=False,
        )
    if translated is None:  # pragma: no cover - the typing of torch.onnx.export; dynamo returns it
        msg = "torch.onnx.export returned nothing."
        raise UnsupportedError(msg)
    _name_after_modules(translated.model.graph)
    return Captured(
        translated.model, recording.labels.sites, live, inputs.names, forward.output_names
    )


class _Forward(nn.Module):
    """The model as a function of the tensors among its arguments, returning a flat tuple."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.watch: Watch | None = None
        self._inputs = inputs
        self.output_names: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run under the watch, as ``torch.export`` wants it."""
        if self.watch is None:
            return self.run(tensors)
        with self.watch:
            return self.run(tensors)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call the model with tensors in the place of the example's."""
        bound = self._inputs.bind(tensors)
        output = self.model(*bound.args, **bound.kwargs)
        outputs = tree_flatten_with_path(output)[0]
        for path, leaf in outputs:
            if not isinstance(leaf, Tensor | int | float | str | type(None)):
                msg = (
                    f"{type(self.model).__name__}.forward returns a {type(leaf).__name__} at "
                    f"{path_name(path, 'output')!r}. Return tensors in tuples, lists or "
                    "dictionaries."
                )
                raise UnsupportedError(msg)
        tensors_out = [(path, leaf) for path, leaf in outputs if isinstance(leaf, Tensor)]
        self.output_names = unique_names([path_name(path, "output") for path, _ in tensors_out])
        if not tensors_out:
            msg = f"{type(self.model).__name__}.forward returns no tensor: nothing to export."
            raise UnsupportedError(msg)
        return tuple(leaf for _, leaf in tensors_out)


def _live_sites(program: Any, example: Labels, recorded: Labels) -> Counter[str]:
    """Check that every site that ran was recorded once; count those an output depends on."""
    nodes = [node for node in program.graph.nodes if _own_site(node, recorded)]
    found = Counter(str(_own_site(node, recorded)) for node in nodes)
    for ran, there in ((example.ran, recorded.ran), (recorded.own_ops, found)):
        for key in sorted(set(ran) | set(there)):
            if ran[key] != there[key]:
                msg = (
                    f"`{key}` ran {ran[key]} time(s), recorded were {there[key]}. The forward "
                    "depends on something that a recording does not see, such as a counter of its "
                    "own. Make it a function of its inputs."
                )
                raise UnsupportedError(msg)
    output = next(node for node in program.graph.nodes if node.op == "output")
    reached, stack = {output}, [output]
    while stack:
        fresh = [n for n in stack.pop().all_input_nodes if n not in reached]
        reached.update(fresh)
        stack += fresh
    return Counter(str(_own_site(node, recorded)) for node in nodes if node in reached)


def _own_site(node: Any, labels: Labels) -> str | None:
    """Return the site whose own op a recorded node is, None for every other node."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != NAMESPACE:
        return None
    if op_name(node.target) in OPERAND_OPS:
        return None
    platform = bind(node.target, node.args, node.kwargs).get("platform", "")
    return labels.sites.get(label_of(platform)[1])


def _name_after_modules(graph: ir.Graph) -> None:
    """Name what is plain ONNX after the module that called it, as sites are named."""
    taken: Counter[str] = Counter()
    for node in graph:
        scopes = _SCOPES.findall(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        if node.domain != "" or not scopes:
            continue
        module = scopes[-2].partition(".")[2] if len(scopes) > 1 else ""
        name = f"{module}/{scopes[-1].strip('_')}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}/output{index}" if index else node.name


def flat_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested result in the order in which they become graph outputs."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
