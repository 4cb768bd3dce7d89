"""The structure of a prepared model as plain data, which rides inside its ``state_dict``.

A recipe holds the recorded dataflow, what the stages planned with and what is on: enough to make a
float model of the same class into the prepared one, without data and without running it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.graph import Graph, Node, Run, TensorSpec

FORMAT_VERSION = 2

# Whole numbers decide shapes and branches (lengths, indices): of small inputs they are kept.
_KEPT_ELEMENTS = 1024

_SINGLETONS = (torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Unreadable:
    """An argument that has no form as plain data.

    Args:
        text: What it was.
    """

    text: str


def encode(planned: Mapping[str, Any], now: Mapping[str, Any], room: int | None = None) -> Tensor:
    """Return a recipe as JSON in a uint8 tensor.

    Args:
        planned: What stays the same during a run.
        now: What changes.
        room: Bytes that what changes takes at most; the rest is filled up with blanks, so that the
            tensor keeps its size. None to take no more than needed.
    """
    text = json.dumps({**planned, **now})
    if room is not None:
        text = text.ljust(len(json.dumps(planned)) + room)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode(state: Tensor) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        ConfigError: If it is damaged, or was written in another format.
    """
    try:
        recipe = json.loads(bytes(state.tolist()))
        found = recipe["format"]
    except (ValueError, TypeError, KeyError) as error:
        msg = "the quantization state of the checkpoint is damaged. Load another checkpoint."
        raise ConfigError(msg) from error
    if found != FORMAT_VERSION:
        msg = (
            f"the checkpoint has format {found} of the quantization state, this version reads "
            f"{FORMAT_VERSION}. Load it with the version that wrote it."
        )
        raise ConfigError(msg)
    return dict(recipe)


def plain_data(value: Any) -> Any:
    """Return settings as they are after a round trip through JSON."""
    return json.loads(json.dumps(value, default=repr))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Describe where two nested settings differ, e.g. ``quantize.weight_bits: 8, here 4``."""
    found = []
    for name in sorted({*there, *here}):
        one, other = there.get(name, _ABSENT), here.get(name, _ABSENT)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{name}.{line}" for line in differences(one, other)]
        elif one != other:
            found.append(f"{name}: {_shown(one)}, here {_shown(other)}")
    return found


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Describe which plans of a checkpoint are missing or different here; new ones are no change.

    Args:
        there: Settings per stage in the checkpoint.
        here: Settings per stage of the model.
    """
    missing = [f"the stage {stage!r} is missing here" for stage in there if stage not in here]
    both = [stage for stage in there if stage in here]
    return missing + differences({s: there[s] for s in both}, {s: here[s] for s in both})


_ABSENT = object()


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)


# --- the dataflow -------------------------------------------------------------------------------


def graph_to_plain(graph: Graph) -> dict[str, Any]:
    """Return a recorded dataflow as plain data."""
    nodes: dict[str, int] = {}
    runs = []
    for run in graph.runs:
        # Both runs hold mostly the same calls.
        indices = [nodes.setdefault(json.dumps(_node_to_plain(n)), len(nodes)) for n in run.nodes]
        runs.append(
            {
                "nodes": indices,
                "given": sorted(run.given),
                "returned": run.returned,
                "aliased": sorted(run.aliased),
            }
        )
    return {"nodes": [json.loads(text) for text in nodes], "runs": runs}


def graph_from_plain(plain: Mapping[str, Any]) -> Graph:
    """Read a recorded dataflow."""
    nodes = [_node_from_plain(node) for node in plain["nodes"]]
    return Graph(
        Run(
            nodes=[nodes[i] for i in run["nodes"]],
            given=set(run["given"]),
            returned=list(run["returned"]),
            aliased=set(run["aliased"]),
        )
        for run in plain["runs"]
    )


def _node_to_plain(node: Node) -> dict[str, Any]:
    return {
        **{name: getattr(node, name) for name in _PLAIN_FIELDS},
        "args": value_to_plain(node.args),
        "kwargs": value_to_plain(node.kwargs),
        "inputs": value_to_plain(node.inputs),
        "outputs": value_to_plain(node.outputs),
    }


def _node_from_plain(plain: Mapping[str, Any]) -> Node:
    return Node(
        **{name: plain[name] for name in _PLAIN_FIELDS},
        args=value_from_plain(plain["args"]),
        kwargs=value_from_plain(plain["kwargs"]),
        inputs=value_from_plain(plain["inputs"]),
        outputs=value_from_plain(plain["outputs"]),
    )


_PLAIN_FIELDS = ("key", "op", "function", "owner", "invocation", "written", "location")


# --- values -------------------------------------------------------------------------------------


def value_to_plain(value: Any) -> Any:
    """Return an argument as plain data: plain values and lists as they are, the rest by kind."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, TensorSpec):
        return {"spec": [value.value, list(value.shape), value.floating, value.constant]}
    if isinstance(value, Tensor):
        return {"input": _input_to_plain(value)}
    if isinstance(value, list):
        return [value_to_plain(item) for item in value]
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, tuple):
        return {"tuple": [value_to_plain(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: value_to_plain(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [value_to_plain(x) for x in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, _SINGLETONS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"unreadable": f"{type(value).__name__} {value!r}"[:80]}


def value_from_plain(plain: Any) -> Any:
    """Read an argument."""
    if isinstance(plain, list):
        return [value_from_plain(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    return _READERS[kind](content)


def _read_singleton(name: str) -> Any:
    found = getattr(torch, name, None)
    return found if isinstance(found, _SINGLETONS) else Unreadable(f"torch.{name}")


def _input_to_plain(x: Tensor) -> dict[str, Any]:
    plain = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
    whole = not (x.dtype.is_floating_point or x.dtype.is_complex)
    if whole and x.numel() <= _KEPT_ELEMENTS:
        plain["values"] = x.tolist()
    return plain


def _input_from_plain(plain: Mapping[str, Any]) -> Tensor:
    dtype = _read_singleton(plain["dtype"])
    if "values" in plain:
        return torch.tensor(plain["values"], dtype=dtype).reshape(plain["shape"])
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(plain["shape"], generator=generator).to(dtype)
    return torch.zeros(plain["shape"], dtype=dtype)


_READERS: dict[str, Callable[[Any], Any]] = {
    "spec": lambda x: TensorSpec(x[0], tuple(x[1]), x[2], x[3]),
    "input": _input_from_plain,
    "size": torch.Size,
    "tuple": lambda x: tuple(value_from_plain(item) for item in x),
    "dict": lambda x: {key: value_from_plain(item) for key, item in x.items()},
    "slice": lambda x: slice(*(value_from_plain(item) for item in x)),
    "ellipsis": lambda _: Ellipsis,
    "torch": _read_singleton,
    "device": torch.device,
    "unreadable": Unreadable,
}


def unreadable_in(values: Iterable[Any]) -> Unreadable | None:
    """Return an argument that has no form as plain data, if there is one."""
    for value in values:
        if isinstance(value, Unreadable):
            return value
        if isinstance(value, Mapping):
            inside = unreadable_in(value.values())
        else:
            inside = unreadable_in(value) if isinstance(value, list | tuple) else None
        if inside is not None:
            return inside
    return None
