"""``export_onnx``: a prepared model as an ONNX file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxscript import ir
from torch import nn

from lightning_linger.core.errors import ConfigError, NotReadyError, UnsupportedError
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.sites import Site
from lightning_linger.export.capture import capture
from lightning_linger.export.dialect import Dialect
from lightning_linger.export.dialects import dialect_of, variant_of
from lightning_linger.export.dynamic import DynamicAxes, check_axes, open_axes, resized
from lightning_linger.export.ends import give_codes, take_codes
from lightning_linger.export.files import check_target
from lightning_linger.export.finishing import finish, remove_unused
from lightning_linger.export.inputs import Inputs
from lightning_linger.export.lowering import Lowered, lower
from lightning_linger.export.metadata import describe
from lightning_linger.export.written import write_model
from lightning_linger.simulate.integer import integer
from lightning_linger.stages.prepare import check_example, no_trace


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    dialect: str = "linger",
    kwargs: dict[str, Any] | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
    integer_inputs: bool = False,
    integer_outputs: bool = False,
    opset_version: int | None = None,
    signed: bool = False,
    int4_weights: bool = False,
    external_data: bool | None = None,
) -> Path:
    """Write a prepared model to an ONNX file.

    While the quantize stage is on, the file holds the integer model, in the words of the dialect.
    While it is off, it holds plain ONNX of what the model computes now. The model is left as it
    was, bit for bit, and can be trained on.

    Args:
        model: A prepared model, in any mode.
        args: Positional inputs of one forward. Their shapes are the shapes of the graph, and a
            Python branch that depends on values goes the way they take, with a warning.
        path: The file to write; its folder has to exist. The file appears whole or not at all.
        dialect: ``linger`` (or ``linger3``), ``linger1`` for the older names of the same ops, or
            ``qdq``.
        kwargs: Keyword inputs.
        input_names: Of the graph's inputs, one per tensor; None takes the names in ``forward``.
        output_names: Of the graph's outputs, in the order in which ``forward`` returns them.
        dynamic_axes: Sizes to leave open, by input and axis: ``{"x": {0: "batch"}}``. The model is
            recorded again at twice each size; what cannot be open is refused. The engine's packer
            needs fixed sizes: leave this out for it.
        integer_inputs: Take codes in the place of real values; their steps and zero points are in
            the metadata ``lightning_linger.inputs``.
        integer_outputs: Give codes, described in ``lightning_linger.outputs``.
        opset_version: Of standard ONNX, for ``qdq``: 18 or more, 21 or more where codes have 16
            bits; None takes 21.
        signed: Write activations as int8 and int16 in the place of uint8 and uint16, in ``qdq``.
            onnxruntime runs them with its integer kernels on x86 only if the session says
            ``session.qdqisint8allowed = 1``, and then its sums and products may round the other way
            next to a tie, unless scales are powers of two.
        int4_weights: Write weights of up to 4 bits as int4, in ``qdq``. onnxruntime has no integer
            kernels for them; results are equal where scales are powers of two.
        external_data: Write the weights to a file of their own, ``<name>.<digest>.data`` beside
            the path; None does so where ONNX asks for it, above 2 GB.

    Returns:
        The path of the file. Inputs are named as in ``forward``, outputs come in the order in
        which ``forward`` returns them.

    Raises:
        ConfigError: If the dialect, an option, the path or the inputs are wrong.
        NotReadyError: If the model is not prepared, or a quantized site has seen no data, or codes
            are asked for while the quantize stage is off.
        UnsupportedError: If the dialect cannot express the model; names the site. If an input is
            read, or an output computed, in real values where codes are asked for.
    """
    chosen = variant_of(dialect_of(dialect), opset_version, signed, int4_weights)
    target = check_target(path)
    instrumentation = instrumentation_of(model)
    check_example((args, kwargs))
    quantized = instrumentation.switches.quantize
    if (integer_inputs or integer_outputs) and not quantized:
        msg = "codes have no scale before the quantize stage. Quantize the model, then export it."
        raise NotReadyError(msg)
    inputs = Inputs(model, args, kwargs or {})
    names = _chosen_names("input_names", input_names, inputs.names)
    sizes = check_axes(dynamic_axes or {}, names, inputs.tensors)
    sites = [site for site in instrumentation.sites if site.quantized and quantized]

    def build(wanted: Mapping[str, int]) -> ir.Model:
        tensors = resized(inputs.tensors, names, dynamic_axes or {}, wanted)
        with integer(model) if quantized else contextlib.nullcontext():
            captured = capture(model, instrumentation, inputs, tensors, chosen.opset_version)
        lowered = lower(captured, chosen) if quantized else Lowered({}, {})
        graph, ends = captured.model.graph, {}
        outputs = _chosen_names("output_names", output_names, captured.output_names)
        if integer_inputs:
            ends["inputs"] = take_codes(graph, names, chosen.boundary)
        if integer_outputs:
            ends["outputs"] = give_codes(graph, outputs, chosen.boundary)
        finish(captured.model, names, outputs, chosen)
        made = {value for node in graph for value in node.outputs}
        results = {site: v.name for site, v in lowered.results.items() if v in made}
        described = {"steps": lowered.steps, "results": results, **ends}
        describe(captured.model, sites, chosen, described)
        return captured.model

    with _in_evaluation(model, instrumentation):
        _require_ready(instrumentation, sites)
        require_dialect(sites, chosen)
        exported = open_axes(build, sizes) if sizes else build({})
    remove_unused(exported.graph)
    write_model(exported, target, external_data)
    logger.info("wrote %s in dialect %s", target, dialect)
    return target


def require_dialect(sites: Sequence[Site], dialect: Dialect) -> None:
    """Refuse targets that do not read a dialect, and those that no ONNX file is made for.

    Args:
        sites: Quantized ones; their ranges need not be known.
        dialect: The dialect.

    Raises:
        UnsupportedError: Names the site.
    """
    for site in sites:
        if site.platform is not None and not site.platform.dialect:
            msg = (
                f"`{site.key}` is quantized for platform {site.platform_name!r}: no ONNX operator "
                "rounds as its kernels do, so that a file would compute something else. Give "
                "TFLite's converter the scales and zero points of `linger.summary`, or quantize "
                "for 'onnxruntime' and export with dialect='qdq'."
            )
            raise UnsupportedError(msg)
    dialect.check(sites)


def _chosen_names(what: str, chosen: Sequence[str] | None, own: list[str]) -> list[str]:
    if chosen is None:
        return own
    names = list(chosen)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong or len(names) != len(own) or len(set(names)) != len(names):
        msg = f"`{what}` takes {len(own)} different names, for {own}. Found: {names}."
        raise ConfigError(msg)
    return names


@contextlib.contextmanager
def _in_evaluation(model: nn.Module, instrumentation: Instrumentation) -> Iterator[None]:
    """Put the model into evaluation mode, and afterwards back to what it was, in every bit."""
    with no_trace(model):
        model.eval()
        instrumentation.thaw()
        try:
            yield
        finally:
            instrumentation.thaw()


def _require_ready(instrumentation: Instrumentation, sites: list[Site]) -> None:
    # The first recorded run is the one in evaluation mode.
    evaluated = {node.key for node in instrumentation.graph.runs[0].nodes}
    missing = [site.key for site in sites if not site.ready and site.key in evaluated]
    if missing:
        named = ", ".join(f"`{key}`" for key in missing)
        msg = (
            f"{len(missing)} quantized site(s) have seen no range yet: {named}. Train for at least "
            "one step with the quantize stage on, or run `linger.calibrate(model, loader)`, or "
            "leave them in float with `overrides`."
        )
        raise NotReadyError(msg)
