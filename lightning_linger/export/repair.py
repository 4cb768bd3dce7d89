"""Deriving anew where a ``linger`` file enters and leaves integers, from what its ops say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.external import without_external_tensors
from lightning_linger.export.files import check_target
from lightning_linger.export.flow import (
    ABOUT_CODES,
    DEQUANT,
    IDENTITY,
    QUANT,
    REQUANT,
    Codes,
    Engine,
    State,
    engine_of,
    keeps_codes,
    state_of_input,
)
from lightning_linger.export.generations import CHIP_ATTRIBUTES, LINGER3_DOMAIN, ROUNDING
from lightning_linger.export.reading import (
    Source,
    constant_types,
    input_names,
    label_of,
    platform_of,
    read_model,
)
from lightning_linger.export.written import write_proto

_NESTED = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass(frozen=True)
class Repaired:
    """A repaired model.

    Args:
        model: The model; the one that was given if nothing had to be changed.
        changes: What was changed, one sentence each.
    """

    model: onnx.ModelProto
    changes: list[str]


def repair(source: Source) -> Repaired:
    """Derive anew where a file of the ``linger`` dialect enters and leaves integers.

    Every ``Dequant`` and ``Identity`` is taken out, and every ``Quant`` of what are codes already.
    Then codes get a ``Dequant`` where an op or an output needs real values, at the scale that their
    producer says; and real values a ``Quant`` where an op of the engine reads them, at the scale
    that this op says. Where the two scales of a ``Dequant`` and a ``Quant`` behind it differ, a
    ``Requant`` takes their place. Inputs and outputs keep their names and the types that the file
    declares; an output that declares none becomes real.

    Args:
        source: Path of a file in either generation of the dialect, its bytes, or a loaded model,
            which is not changed.

    Raises:
        ConfigError: If there is no such file, or it holds no ONNX model, or a damaged one.
        UnsupportedError: If it holds no op of the dialect, an attribute is wrong, or codes are read
            as real values and nothing says their scale; names the node.
    """
    return _repaired(read_model(source))


def repair_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Repaired:
    """Repair a file and write the result, whole or not at all.

    Weights that the file keeps in files beside it are copied into one beside the target, and stay
    out of both graphs.

    Args:
        source: The file to read.
        target: The file to write; its folder has to exist.

    Returns:
        What was written; its external tensors lie beside the target.

    Raises:
        ConfigError: As :func:`repair`, and if the target cannot be written.
        UnsupportedError: As :func:`repair`.
    """
    path: Path = check_target(target)
    repaired = _repaired(read_model(source, weights=False))
    model = onnx.ModelProto()
    model.CopyFrom(repaired.model)
    write_proto(model, Path(source).parent, path)
    return Repaired(model, repaired.changes)


def _repaired(model: onnx.ModelProto) -> Repaired:
    platform_of(model.graph)
    repairing = _Repair(model)
    repairing.run()
    if not repairing.changes:
        return Repaired(model, [])
    result = repairing.result()
    read_model(result)
    if _is_valid(model) and not _is_valid(result):
        msg = "the repaired graph is not valid ONNX, the given one was. Please report it."
        raise UnsupportedError(msg)
    return Repaired(result, repairing.changes)


class _Repair:
    """One repair: the nodes are gone through once, in their order.

    Args:
        model: The model, which is only read.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = graph = model.graph
        self.changes: list[str] = []
        self.constants = constant_types(graph)
        self.engines = {node.output[0]: engine_of(node) for node in graph.node if node.output}
        self.like = self._example()
        # What follows from constants alone has no state.
        inputs = set(input_names(graph))
        self.states: dict[str, State] = {
            value.name: state_of_input(value) for value in graph.input if value.name in inputs
        }
        self.nodes: list[onnx.NodeProto] = []
        self.taken = {node.name for node in graph.node} | inputs | set(self.constants)
        self.taken |= {name for node in graph.node for name in node.output}
        # What stands for the result of a node that was taken out, and those nodes.
        self.instead: dict[str, str] = {}
        self.removed: dict[str, onnx.NodeProto] = {}
        # What was quantized, and what was made real again.
        self.made: dict[tuple[str, State], str] = {}
        # Values whose type may be another than before, and where their shape is known from.
        self.shaped_like: dict[str, str] = {}
        self.freed: set[str] = set()

    def _example(self) -> onnx.NodeProto:
        """Return a node of the engine, whose words the new ones take over."""
        for node in self.graph.node:
            if any(attribute.type in _NESTED for attribute in node.attribute):
                msg = f"{label_of(node)} holds a graph of its own: not supported here."
                raise UnsupportedError(msg)
        engines = [n for n in self.graph.node if n.output and self.engines[n.output[0]]]
        if not engines:
            msg = "the file holds no op of the linger dialect: there is nothing to derive from."
            raise UnsupportedError(msg)
        words = (*CHIP_ATTRIBUTES, *ROUNDING)
        worded = [node for node in engines if any(a.name in words for a in node.attribute)]
        like: onnx.NodeProto = (worded or engines)[0]
        return like

    # --- the pass ---------------------------------------------------------------------------

    def run(self) -> None:
        """Go through the nodes."""
        for node in self.graph.node:
            engine = self.engines.get(node.output[0]) if node.output else None
            if node.op_type == IDENTITY and len(node.input) == len(node.output) == 1:
                self._take_out(node, self._read(node.input[0]))
            elif engine is None:
                self._standard(node)
            elif engine.op_type == DEQUANT:
                self._dequant(node, engine)
            elif engine.op_type == QUANT:
                self._quant(node, engine)
            else:
                self._engine(node, engine)
        for output in self.graph.output:
            self._output(output)
        self._drop_unused()
        self.changes += [f"removed {n.op_type} `{n.name or v}`" for v, n in self.removed.items()]
        self._report_connections()

    def _read(self, name: str) -> str:
        return self.instead.get(name, name)

    def _dequant(self, node: onnx.NodeProto, engine: Engine) -> None:
        value = self._read(node.input[0])
        state, said = self.states.get(value), engine.codes("scale_o", "")
        if state is not None and state.scale is None and said is not None:
            self.states[value] = Codes(state.bits, said.scale)
        self._take_out(node, value)

    def _quant(self, node: onnx.NodeProto, engine: Engine) -> None:
        value = self._read(node.input[0])
        wanted, state = engine.results[0], self.states.get(value)
        assert wanted is not None
        if state is None and (value, wanted) in self.made:  # a second one of the same
            self._take_out(node, self.made[value, wanted])
        elif state is None:
            self._keep(node, [value], [wanted])
            self.made[value, wanted] = node.output[0]
        elif state.scale in (wanted.scale, None) and state.bits == wanted.bits:
            self.states[value] = wanted
            self._take_out(node, value)
        else:
            self._take_out(node, self._requantized(value, state, wanted, node))

    def _engine(self, node: onnx.NodeProto, engine: Engine) -> None:
        inputs = [self._read(name) for name in node.input]
        for place, wanted in engine.operands.items():
            value = inputs[place]
            if value not in self.states:
                continue
            state = self.states[value]
            if state is None:
                inputs[place] = self._quantized(value, wanted, node)
            elif state.scale is None:
                self.states[value] = Codes(state.bits, wanted.scale)
        self._keep(node, inputs, engine.results)

    def _standard(self, node: onnx.NodeProto) -> None:
        inputs = [self._read(name) for name in node.input]
        states = [self.states.get(name) for name in inputs]
        if keeps_codes(node, states, self.constants):
            self._keep(node, inputs, [states[0]] * len(node.output))
            return
        if node.op_type not in ABOUT_CODES:
            for place, state in enumerate(states):
                # What no op says a scale of are numbers, and no codes.
                if state is not None and state.scale is not None:
                    inputs[place] = self._real(inputs[place], state, node.input[place], node)
            if inputs != [self._read(name) for name in node.input] or self.freed & set(inputs):
                self.freed.update(node.output)
        known = any(name in self.states for name in inputs)
        self._keep(node, inputs, [None] * len(node.output) if known else [])

    # --- nodes ------------------------------------------------------------------------------

    def _keep(self, node: onnx.NodeProto, inputs: list[str], states: Sequence[State]) -> None:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        del kept.input[:]
        kept.input.extend(inputs)
        self.nodes.append(kept)
        self.states.update(zip(node.output, states, strict=False))

    def _take_out(self, node: onnx.NodeProto, instead: str) -> None:
        self.instead[node.output[0]] = instead
        self.removed[node.output[0]] = node

    def _quantized(self, value: str, wanted: Codes, reader: onnx.NodeProto) -> str:
        if (value, wanted) not in self.made:
            name = self._free(f"{reader.name or reader.output[0]}/quantize")
            attributes = {"data_bits": wanted.bits, "scale_x": wanted.scale}
            if self.like.domain == LINGER3_DOMAIN:
                attributes["zero_point"] = 0
            self._insert(QUANT, value, name, attributes, wanted)
            self.made[value, wanted] = name
            self.changes.append(f"inserted Quant `{name}`, {wanted}, for {label_of(reader)}")
        return self.made[value, wanted]

    def _requantized(self, value: str, given: Codes, wanted: Codes, quant: onnx.NodeProto) -> str:
        if given.scale is None:
            msg = f"{label_of(quant)} reads the codes {value!r}, and nothing says their scale."
            raise UnsupportedError(msg)
        if (value, wanted) not in self.made:
            name = self._free(f"{quant.name or quant.output[0]}/requantize")
            attributes: dict[str, int | float | None] = {
                **{"data_bits": given.bits, "scale_x": given.scale},
                **{"o_bits": wanted.bits, "scale_o": wanted.scale},
            }
            self._insert(REQUANT, value, name, attributes, wanted)
            self.made[value, wanted] = name
            self.changes.append(f"inserted Requant `{name}`, from {given} to {wanted}")
        return self.made[value, wanted]

    def _real(self, value: str, state: Codes, read: str, reader: onnx.NodeProto | None) -> str:
        """Return real values of codes, by the Dequant that was there before if there was one.

        Args:
            value: The codes.
            state: What they are.
            read: What the reader read before; an output has to keep its name.
            reader: None if it is an output.
        """
        if (value, None) in self.made and reader is not None:
            return self.made[value, None]
        earlier = self.removed.get(read)
        if earlier is not None and earlier.op_type == DEQUANT:
            del self.removed[read]
            again = onnx.NodeProto()
            again.CopyFrom(earlier)
            again.input[0] = value
            scale = next(a for a in again.attribute if a.name == "scale_o")
            said = onnx.helper.get_attribute_value(scale)
            if said != state.scale:
                scale.CopyFrom(onnx.helper.make_attribute("scale_o", state.scale))
                name = again.name or read
                self.changes.append(
                    f"corrected Dequant `{name}`: scale {said:g} to {state.scale:g}"
                )
            self.nodes.append(again)
            self.states[read] = None
            self.shaped_like[read] = value
            name = read
        else:
            where = f"the output {read!r}" if reader is None else label_of(reader)
            name = self._free(f"{value}/dequantize") if reader is not None else read
            self._insert(DEQUANT, value, name, {"scale_o": state.scale}, None)
            self.changes.append(f"inserted Dequant of `{value}`, {state}, for {where}")
        self.made.setdefault((value, None), name)
        return name

    def _insert(
        self,
        op_type: str,
        source: str,
        output: str,
        attributes: Mapping[str, int | float | None],
        state: State,
    ) -> None:
        node = onnx.helper.make_node(op_type, [source], [output], output, domain=self.like.domain)
        if op_type != DEQUANT:
            words = (*CHIP_ATTRIBUTES, *ROUNDING)
            node.attribute.extend(a for a in self.like.attribute if a.name in words)
        node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in attributes.items())
        self.nodes.append(node)
        self.states[output] = state
        self.shaped_like[output] = source

    def _free(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate

    # --- ends -------------------------------------------------------------------------------

    def _output(self, output: onnx.ValueInfoProto) -> None:
        """Let an output be what the file declares, under its name."""
        value = self._read(output.name)
        if value != output.name and self._is_made(output.name):
            return  # its Dequant is there again
        state, declared = self.states.get(value), output.type.tensor_type.elem_type
        if state is not None and declared in _REAL:
            if state.scale is None:
                msg = f"the output {output.name!r} is codes, and nothing says their scale."
                raise UnsupportedError(msg)
            real = self.made.get((value, None))
            if value == output.name:
                value = self._rename(value, self._free(f"{value}/codes"))
            if real is not None and all(real != found.name for found in self.graph.output):
                self._rename(real, output.name)
            else:
                self._real(value, state, output.name, None)
        elif value != output.name:
            self._bind(value, output.name)

    def _is_made(self, value: str) -> bool:
        return any(value in node.output for node in self.nodes)

    def _rename(self, value: str, name: str) -> str:
        """Give a value another name, wherever it is made and read."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, found in enumerate(names):
                    if found == value:
                        names[index] = name
        if value in self.states:
            self.states[name] = self.states[value]
        self.shaped_like[name] = value
        self.instead = {old: name if new == value else new for old, new in self.instead.items()}
        self.instead[value] = name
        self.made = {
            (name if source == value else source, state): name if made == value else made
            for (source, state), made in self.made.items()
        }
        return name

    def _bind(self, value: str, output: str) -> None:
        """Let a value be an output: under its name, or as a copy if it has to keep its own."""
        if self._is_made(value) and all(value != found.name for found in self.graph.output):
            self._rename(value, output)
            return
        copy = self.removed.get(output)
        if copy is not None and copy.op_type == IDENTITY:
            del self.removed[output]
            self._keep(copy, [value], [])
        else:
            name = self._free(f"{output}/copy")
            self.nodes.append(onnx.helper.make_node(IDENTITY, [value], [output], name))

    def _drop_unused(self) -> None:
        """Drop what enters or leaves integers for nobody."""
        outputs = {found.name for found in self.graph.output}
        while True:
            read = outputs.union(*(node.input for node in self.nodes))
            ends = (QUANT, DEQUANT, REQUANT)
            unused = [n for n in self.nodes if n.op_type in ends and n.output[0] not in read]
            if not unused:
                return
            for node in unused:
                self.nodes.remove(node)
                self.removed[node.output[0]] = node

    def _report_connections(self) -> None:
        """Report what reads something else than before, although that is still there."""
        before = {node.output[0]: node for node in self.graph.node if node.output}
        live = {name for node in self.nodes for name in node.output} | set(self.constants)
        for node in self.nodes:
            earlier = before.get(node.output[0]) if node.output else None
            same = earlier is not None and earlier.op_type == node.op_type
            pairs = zip(earlier.input, node.input, strict=True) if earlier and same else ()
            self.changes += [
                f"connected {label_of(node)} to `{new}` instead of `{old}`"
                for old, new in pairs
                if old != new and old in live
            ]

    def result(self) -> onnx.ModelProto:
        """Return the repaired model."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        ends = (*self.graph.input, *self.graph.output)
        infos = {value.name: value for value in (*self.graph.value_info, *ends)}
        made = {name for node in self.nodes for name in node.output if name} | set(self.constants)
        del graph.value_info[:]
        for name in sorted(made - {value.name for value in ends}):
            source = name
            while source not in infos and source in self.shaped_like:
                source = self.shaped_like[source]
            if source in infos:
                value = graph.value_info.add()
                value.CopyFrom(infos[source])
                value.name = name
                self._type(value)
        if all(found.domain != self.like.domain for found in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(self.like.domain, 1))
        return model

    def _type(self, value: onnx.ValueInfoProto) -> None:
        """Write the type that a value has now."""
        kind, state = value.type.tensor_type, self.states.get(value.name)
        if state is not None:
            kind.elem_type = state.element_type
        elif value.name in self.shaped_like or value.name in self.freed:
            kind.elem_type = onnx.TensorProto.FLOAT


# A type that is not declared is 0.
_REAL = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.FLOAT)


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(without_external_tensors(model), full_check=True)
    except Exception:  # whatever the checker does not like
        return False
    return True
