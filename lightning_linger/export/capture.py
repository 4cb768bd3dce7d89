"""Recording one forward of a prepared model as ONNX nodes with the integer ops kept whole.

``torch.export`` records the forward, ``torch.onnx`` turns what is plain PyTorch into plain ONNX.
The library's own ops become nodes of a private domain that carry every argument; a dialect
translates them afterwards, with the finished graph in view.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import ir
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_flatten_with_path

from lightning_linger.core.calls import Event
from lightning_linger.core.errors import (
    LingerError,
    QuantizationWarning,
    UnsupportedError,
)
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.locations import caller_location, raised_at
from lightning_linger.export.inputs import Inputs, path_name, unique_names
from lightning_linger.export.schemas import TENSOR_TYPES

# Domain of the nodes that stand for the library's ops until a dialect has translated them.
CAPTURE_DOMAIN = "lightning_linger.capture"
NAMESPACE = "linger"
ARGUMENTS = "arguments"

# Ops that bring operands to a site; a site itself is its other op.
OPERAND_OPS = ("quantize", "requantize", "dequantize")

_LABEL_MARK = "#"


@dataclass(frozen=True)
class Captured:
    """One recorded forward.

    Args:
        model: The graph; the library's ops are nodes of :data:`CAPTURE_DOMAIN`.
        sites: Site key of each label (see :class:`_Labels`).
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
        example = _Watch(_Branches())
        with example.watching(instrumentation), _located(inputs, tensors):
            forward.run(tensors)
        recording = _Watch(example.branches.replay())
        forward.watch = recording
        with (
            recording.watching(instrumentation),
            _readable_errors("recorded"),
            _quiet_about_flat_weights(),
        ):
            program = torch.export.export(forward, tuple(tensors), strict=False)
    live = _live_sites(program, example.labels, recording.labels)
    with _readable_errors("translated to ONNX"), _quiet():
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


# --- the model as a function of tensors -------------------------------------------------------


class _Forward(nn.Module):
    """The model as a function of the tensors among its arguments, returning a flat tuple."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.watch: _Watch | None = None
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


# --- what a recording has to watch ------------------------------------------------------------


class _Branches:
    """Decisions by the values of a tensor (``if x.sum() > 0:``), by the line that takes them."""

    def __init__(self, answers: dict[str, list[bool]] | None = None) -> None:
        self._recorded = answers
        self.answers: dict[str, list[bool]] = {}

    @property
    def replaying(self) -> bool:
        """Whether the answers are those of an example that ran before."""
        return self._recorded is not None

    def replay(self) -> _Branches:
        """Return branches that answer as these were answered."""
        return _Branches(self.answers)

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
class _Labels:
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
        return f"{platform}{_LABEL_MARK}{label}"

    def tap(self, event: Event) -> None:
        """Give the ops called since the last site to this one."""
        key = event.site.key
        self.ran[key] += 1
        for label, op in self.pending:
            self.sites[label] = key
            self.own_ops[key] += op not in OPERAND_OPS
        self.pending.clear()


class _Watch(TorchFunctionMode):
    """Sees every op below the instrumentation: labels the library's, and answers branches."""

    def __init__(self, branches: _Branches) -> None:
        super().__init__()
        self.branches = branches
        self.labels = _Labels()
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
        return {func: _translation(func) for func in self.seen.values()}


# --- captured nodes ---------------------------------------------------------------------------


def op_name(func: Any) -> str:
    """Return the bare name of one of the library's ops, e.g. ``conv``."""
    return str(func.name()).partition("::")[2].partition(".")[0]


def bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an op by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def label_of(platform: str) -> tuple[str, str]:
    """Split a labelled platform into the platform's name and the label."""
    name, _, label = platform.partition(_LABEL_MARK)
    return name, label


def _takes_tensors(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _translation(func: Any) -> Callable[..., Any]:
    """Return a function for ``torch.onnx`` that records the op with all its arguments."""
    parameter = OpSchema.FormalParameter
    any_number = OpSchema.FormalParameterOption.Variadic
    schema = OpSchema(
        op_name(func),
        CAPTURE_DOMAIN,
        1,
        inputs=[
            parameter("inputs", "T", param_option=any_number, is_homogeneous=False, min_arity=0)
        ],
        outputs=[parameter(f"output{i}", "R") for i in range(len(func._schema.returns))],
        type_constraints=[("T", TENSOR_TYPES, ""), ("R", TENSOR_TYPES, "")],
        attributes=[OpSchema.Attribute(ARGUMENTS, OpSchema.AttrType.STRING, required=True)],
    )
    node = Op(Opset(CAPTURE_DOMAIN, 1), op_name(func), schema)

    def translate(*args: Any, **kwargs: Any) -> Any:
        inputs: list[Any] = []
        values: dict[str, Any] = {}
        for name, value in bind(func, args, kwargs).items():
            argument = next(a for a in func._schema.arguments if a.name == name)
            if not _takes_tensors(argument):
                values[name] = value
            elif isinstance(value, list | tuple):
                values[name] = len(value)
                inputs += value
            else:
                values[name] = None if value is None else 1
                inputs += [] if value is None else [value]
        return node(*inputs, **{ARGUMENTS: json.dumps(values)})

    return translate


def arguments_of(node: ir.Node) -> dict[str, Any]:
    """Return the arguments of a captured node by name; tensors are values of the graph."""
    func = getattr(getattr(torch.ops, NAMESPACE), node.op_type).default
    recorded = json.loads(node.attributes[ARGUMENTS].as_string())
    inputs = iter(node.inputs)
    arguments: dict[str, Any] = {}
    for argument in func._schema.arguments:
        value = recorded.get(argument.name)
        if _takes_tensors(argument) and value is not None:
            is_list = "List" in str(argument.type)
            value = [next(inputs) for _ in range(value)] if is_list else next(inputs)
        arguments[argument.name] = value
    return arguments


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


_SCOPES = re.compile(r"'([^']*)'")


# --- checks and errors ------------------------------------------------------------------------


def _live_sites(program: Any, example: _Labels, recorded: _Labels) -> Counter[str]:
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


def _own_site(node: Any, labels: _Labels) -> str | None:
    """Return the site whose own op a recorded node is, None for every other node."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != NAMESPACE:
        return None
    if op_name(node.target) in OPERAND_OPS:
        return None
    platform = bind(node.target, node.args, node.kwargs).get("platform", "")
    return labels.sites.get(label_of(platform)[1])


class FailingForwardError(UnsupportedError):
    """The model does not run on inputs of these sizes.

    Args:
        shapes: Of the inputs, by name.
        location: The line of the model.
        reason: What torch says.
    """

    def __init__(self, shapes: str, location: str, reason: str) -> None:
        super().__init__(
            f"the forward fails on {shapes}, at {location}: {reason} Where a size of other inputs "
            "is written into the model, as in `view(32, -1)`, write `x.shape[0]` or -1 in its "
            "place."
        )
        self.shapes = shapes
        self.location = location
        self.reason = reason


@contextlib.contextmanager
def _located(inputs: Inputs, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Name the line of the model that an error of torch comes from, and the sizes of the inputs."""
    try:
        yield
    except LingerError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        pairs = zip(inputs.names, tensors, strict=True)
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in pairs)
        reason = str(error).strip().partition("\n")[0].rstrip(".") + "."
        raise FailingForwardError(shapes, raised_at(error), reason) from error


@contextlib.contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    try:
        yield
    except LingerError:
        raise
    except Exception as error:
        reason = str(_root_cause(error)).strip().partition("\n")[0]
        msg = (
            f"the forward cannot be {what}: {reason} Rewrite that part with plain tensor "
            "operations, or move it out of the model."
        )
        raise UnsupportedError(msg) from error


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet_about_flat_weights() -> Iterator[None]:
    # `nn.LSTM` and its relatives keep a list of their weights, which torch.export takes for loose
    # tensors that the forward assigns.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*\b_flat_weights\[")
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # What torch's exporter says about its own internals is not for the user of this library.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx).*")
            yield
    finally:
        logger.setLevel(level)


def flat_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested result in the order in which they become graph outputs."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
