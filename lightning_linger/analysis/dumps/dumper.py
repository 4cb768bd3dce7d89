"""Writing down every op of forward, loss and backward, with what it takes and gives."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_linger.analysis.dumps.folders import DUMP_FILE, FORMAT, OpFolder, create_folder
from lightning_linger.analysis.dumps.modules import ModuleStack
from lightning_linger.analysis.dumps.references import (
    run_in_double,
    run_site_in_float,
    run_site_in_integers,
)
from lightning_linger.analysis.dumps.values import (
    LEVELS,
    Description,
    Level,
    describe,
    describe_codes,
)
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.functions import canonical_of
from lightning_linger.core.locations import caller_location
from lightning_linger.core.site_calls import SiteCall, run_site

# Moving values between tensors or to Python computes nothing; autograd detaches what it keeps.
NOT_DUMPED = {
    *("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"),
    *("detach", "alias", "lift_fresh", "_local_scalar_dense"),
    # Memory without values, which differs from run to run.
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}

ARGUMENT = "arg_"
RESULT = "result"
CODES = "_codes"
FLOAT, INTEGER = "reference_float", "reference_integer"


class Dumper:
    """Writes every op that runs inside it into folders: forward, loss and backward.

    ``path/1_conv2d/`` holds a text file and numpy arrays for each argument (``arg_weight.txt``,
    ``arg_weight.npy``) and for the ``result``. What an op calls stands in folders inside its own;
    numbers count per folder, in execution order. Codes of quantized tensors stand beside their real
    values (``result_codes``). ``op.json`` says which module, site and line of the program called.

    The run itself is not changed: results, gradients and random numbers are the same bits as
    without the dumper. Copies between tensors and
    new memory without values are left out.

    Args:
        path: Folder of the dump. One that exists is never written into: the next free of
            ``path1``, ``path2``, ... is taken; in a run of several processes each has its own,
            ``path_rank0``, ... Folders above it are made.
        enable: False does nothing at all.
        level: What is written of a tensor: 0 the first ten values, 1 the sum of magnitudes, 2
            everything.
        compare: Run a reference beside each op, on copies of its arguments, and store its result
            too: at a site of a quantized model the op in float (``reference_float``) and, in
            evaluation, on integers (``reference_integer``); elsewhere the op on the CPU in double
            precision (``reference_float``). Ops that write into an argument or draw random numbers
            have none, and an op that fails has none; :attr:`failed_references` counts these.
        pattern: A glob on ``module.path/op``, on the path or on the op alone; other ops are counted
            but not written.

    Attributes:
        folder: Where the dump is, None while there is none.
        failed_references: How many references failed.

    Raises:
        ConfigError: If an argument is wrong, or on entry, if the folder cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "dump",
        enable: bool = True,
        level: Level = 0,
        compare: bool = False,
        pattern: str = "*",
    ) -> None:
        if level not in LEVELS or isinstance(level, bool):
            msg = f"`level` is 0 (first values), 1 (sums) or 2 (everything). Found: {level!r}."
            raise ConfigError(msg)
        if not pattern:
            msg = "`pattern` is empty and matches nothing. Pass '*' for every op."
            raise ConfigError(msg)
        self.path = Path(path or "dump")
        self.enable = enable
        self.level = level
        self.compare = compare
        self.pattern = pattern
        self.folder: Path | None = None
        self.failed_references = 0
        self._running: contextlib.ExitStack | None = None

    def __enter__(self) -> Dumper:
        if self._running is not None:
            msg = "this Dumper is running already. Make one for each `with`."
            raise ConfigError(msg)
        self._running = contextlib.ExitStack()
        if self.enable:
            self.folder = create_folder(self.path)
            self.failed_references = 0
            recording = _Recording(self, OpFolder(None, self.folder, {}))
            self._running.callback(self._write_summary, self.folder)
            self._running.enter_context(recording.modules)
            self._running.enter_context(_DispatchMode(recording))
            self._running.enter_context(_FunctionMode(recording))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.__exit__(kind, error, traceback)

    def _write_summary(self, folder: Path) -> None:
        summary = {
            "format": FORMAT,
            "level": self.level,
            "compare": self.compare,
            "pattern": self.pattern,
            "failed_references": self.failed_references,
        }
        (folder / DUMP_FILE).write_text(json.dumps(summary, indent=1) + "\n")

    def wants(self, module: str, op: str) -> bool:
        """Whether an op of a module is to be written."""
        return any(fnmatchcase(x, self.pattern) for x in (f"{module}/{op}", module, op))


Values = dict[str, Description]


@dataclass
class _Leaf:
    """One op of the dispatcher, described."""

    op: str
    info: dict[str, Any]
    wanted: bool
    values: Values = field(default_factory=dict)


@dataclass
class _Function:
    """A torch function that is running. It gets a folder once the dispatcher runs an op for it."""

    op: str
    module: str
    arguments: dict[str, Any]
    site_call: SiteCall | None = None
    folder: OpFolder | None = None
    only: _Leaf | None = None
    leaves: int = 0
    values: Values = field(default_factory=dict)


class _Recording:
    """Turns what the two modes see into folders."""

    def __init__(self, dumper: Dumper, root: OpFolder) -> None:
        self.dumper = dumper
        self.modules = ModuleStack()
        self._root = root
        self._function: _Function | None = None

    # --- torch functions ------------------------------------------------------------------------

    @contextlib.contextmanager
    def function(self, function: _Function) -> Iterator[None]:
        """Run a torch function; what the dispatcher sees until it ends belongs to it."""
        before, self._function = self._function, function
        try:
            yield
        finally:
            self._function = before
            if function.folder is not None:
                with self._aside():
                    self._finish(function)

    def returned(self, function: _Function, result: Any) -> None:
        """Note the result of a function."""
        if function.folder is not None and function.folder.wanted:
            with self._aside():
                self._add(function.values, RESULT, result)

    def _start(self, function: _Function) -> OpFolder:
        """Give a function its folder. No op has run in it yet: its arguments are as they came."""
        info = {**self._info(function.op), "module": function.module}
        site_call = function.site_call
        if site_call is not None:
            info |= {"site": site_call.site.key, "system": site_call.system}
        function.folder = self._root.child(
            function.op, info, self.dumper.wants(function.module, function.op)
        )
        if not function.folder.wanted:
            return function.folder
        for name, value in function.arguments.items():
            self._add(function.values, ARGUMENT + name, value)
        if site_call is not None and self.dumper.compare and not site_call.overwrites:
            for name, run in ((FLOAT, run_site_in_float), (INTEGER, run_site_in_integers)):
                self._refer(function.values, function.folder.info, name, run, site_call)
        return function.folder

    def _finish(self, function: _Function) -> None:
        folder, only = function.folder, function.only
        if folder is None:
            return
        if only is not None:
            if only.op.rstrip("_") != function.op.rstrip("_"):
                self._write_leaf(folder, only)
            elif function.site_call is None:
                function.values = only.values
                folder.info = {**only.info, **folder.info}
        self._write(folder, function.values)

    # --- ops of the dispatcher ------------------------------------------------------------------

    def leaf(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op of the dispatcher and write it down."""
        op = func._schema.name.rpartition("::")[2]
        if op in NOT_DUMPED:
            return func(*args, **kwargs)
        function = self._function
        with self._aside():
            folder = self._root
            if function is not None:
                folder = function.folder or self._start(function)
            wanted = self.dumper.wants(self.modules.path, op) or (
                function is not None and folder.wanted
            )
            leaf = _Leaf(op, self._info(op) | {"overload": str(func)}, wanted)
            if leaf.wanted:
                for name, value in _named(func._schema, args, kwargs).items():
                    self._add(leaf.values, ARGUMENT + name, value)
                if self.dumper.compare and (function is None or function.site_call is None):
                    self._refer(leaf.values, leaf.info, FLOAT, run_in_double, func, args, kwargs)
        try:
            result = func(*args, **kwargs)
            if leaf.wanted:
                with self._aside():
                    self._add(leaf.values, RESULT, result)
        finally:
            # Of an op that fails, too: its arguments may tell why.
            with self._aside():
                if function is None:
                    self._write_leaf(folder, leaf)
                else:
                    self._add_leaf(function, folder, leaf)
        return result

    def _add_leaf(self, function: _Function, folder: OpFolder, leaf: _Leaf) -> None:
        # A function that runs one op of its own name is that op and gets no folder inside.
        function.leaves += 1
        if function.leaves == 1:
            function.only = leaf
            return
        if function.only is not None:
            self._write_leaf(folder, function.only)
            function.only = None
        self._write_leaf(folder, leaf)

    # --- writing --------------------------------------------------------------------------------

    def _write_leaf(self, parent: OpFolder, leaf: _Leaf) -> None:
        self._write(parent.child(leaf.op, leaf.info, leaf.wanted), leaf.values)

    def _write(self, folder: OpFolder, values: Values) -> None:
        for name, description in values.items():
            folder.write(name, description)
        folder.close()

    def _add(self, values: Values, name: str, value: Any) -> None:
        values[name] = describe(value, self.dumper.level)
        codes = describe_codes(value, self.dumper.level)
        if codes is not None:
            values[name + CODES] = codes

    def _refer(self, values: Values, info: dict[str, Any], name: str, run: Any, *args: Any) -> None:
        try:
            result = run(*args)
        except Exception as error:  # whatever a kernel raises: the run goes on without it
            self.dumper.failed_references += 1
            info[f"no_{name}"] = f"{type(error).__name__}: {error}"
            return
        if result is not None:
            self._add(values, name, result)

    def _info(self, op: str) -> dict[str, Any]:
        return {"op": op, "module": self.modules.path, "location": caller_location()}

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Work that no mode, neither this dumper's nor one around it, takes for a part of the run.

        Autocast is off, and autograd does not follow.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch._C.DisableTorchFunction())
            stack.enter_context(no_dispatch())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield


class _FunctionMode(TorchFunctionMode):
    """Sees the functions a program calls: the names that its author knows."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording
        recording.modules.function_mode = self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        module = self.recording.modules.path
        if func is run_site:
            site_call: SiteCall = args[0]
            bound = site_call.bound()._asdict()
            function = _Function(site_call.site.op.kind, module, bound, site_call)
        else:
            function = _Function(_function_name(func), module, _arguments(func, args, kwargs))
        with self.recording.function(function):
            result = func(*args, **kwargs)
            self.recording.returned(function, result)
        return result


class _DispatchMode(TorchDispatchMode):
    """Sees the ops that run, backward's too."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.recording.leaf(func, args, kwargs or {})


def _function_name(func: Any) -> str:
    name = str(getattr(func, "__name__", type(func).__name__))
    if name.startswith("__"):
        canonical = canonical_of(func)
        if canonical is not None and canonical.op:
            name = canonical.op + ("_" if canonical.inplace else "")
        elif name in ("__get__", "__set__"):
            name = str(getattr(getattr(func, "__self__", None), "__name__", name))
    return "".join(x if x.isalnum() or x in "_." else "_" for x in name)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a torch function, as far as its signature can be had."""
    names: list[str] = []
    schema = getattr(torch.ops.aten, _function_name(func), None)
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        if schema is not None and hasattr(schema, "default"):
            names = [argument.name for argument in schema.default._schema.arguments]
    if len(names) < len(args) or any(name in kwargs for name in names[: len(args)]):
        names = [str(position) for position in range(len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _named(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name every argument of an op of the dispatcher, with those left at their default."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named
