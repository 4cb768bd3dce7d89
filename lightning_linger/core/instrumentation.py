"""All state that is added to a model lives in one submodule; around its forwards runs one mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_linger.core.calls import ModuleCall, Tap
from lightning_linger.core.errors import ConfigError, NotReadyError
from lightning_linger.core.frames import Activation, Frame
from lightning_linger.core.function_mode import FunctionMode
from lightning_linger.core.graph import Graph
from lightning_linger.core.noise import Noise
from lightning_linger.core.payload import real_values
from lightning_linger.core.ranges import LearnedScale
from lightning_linger.core.recipe import (
    FORMAT_VERSION,
    changes,
    decode,
    encode,
    graph_to_plain,
    plain_data,
    value_to_plain,
)
from lightning_linger.core.recorder import Recorder
from lightning_linger.core.registry import op_of
from lightning_linger.core.sharding import class_name, gathers_parameters
from lightning_linger.core.sites import Site
from lightning_linger.core.state import switch_back, what_is_on
from lightning_linger.core.switches import Switches
from lightning_linger.core.tags import tag_of, with_tag
from lightning_linger.core.widths import Widths, set_widths, widths_of

STATE_NAME = "_linger"
STATE_PREFIX = STATE_NAME + "."
EXTRA_STATE = "_extra_state"
# Bytes for what changes at a site during a run, where a recipe has to keep its size.
ROOM_PER_SITE = 1024
# A module without parameters whose call is to be seen wherever it is made.
POINT_MARK = "_linger_point"


class Instrumentation(nn.Module):
    """Sites, quantizers and learned scales of a model, and the function mode that finds them.

    Attributes:
        switches: What is on.
        sites: The sites by key; every key of the ``state_dict`` below starts with ``_linger.``.
        graph: The recorded dataflow.
        noise: Random numbers of stochastic rounding, None without.
        learned: The learned ranges, which are submodules of sites.
        tap: Called after each site ran, None to call nothing.
        calls: Collects the outermost module calls, the first one only while every stage is off;
            None to collect nothing.
        paused: Whether what runs now gathers or shards parameters, and is not the model's.
        exchanges: Collects the outermost calls and what they return, while a stage is on; None to
            collect nothing.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.switches = Switches()
        self.graph = Graph([])
        self.tap: Tap | None = None
        self.calls: list[ModuleCall] | None = None
        self.exchanges: list[tuple[ModuleCall, Any]] | None = None
        self._running: ModuleCall | None = None
        self.recorder: Recorder | None = None
        self.stack: list[Activation] = []
        self.paused = False
        self.site = nn.ModuleDict()
        self.noise: Noise | None = None
        self.learned: list[LearnedScale] = []
        self._learned_versions: list[tuple[int, int]] = []
        self._mode: Any = FunctionMode(self)
        # What each stage was planned with, in the order of planning, and the marks it found.
        self.plans: dict[str, Any] = {}
        self.marks: dict[str, Any] = {}
        # Widths that sites were planned with and no longer have, by key.
        self._planned_widths: dict[str, Widths] = {}
        # How often widths have been set: who shows them looks again only then.
        self.width_changes = 0
        # What has changed the parameters once and for all, e.g. `equalize`, in order.
        self.applied: list[str] = []
        # Whether the state of a model that was planned otherwise may be loaded.
        self.accepts_changes = False
        # Whether checkpoints are loaded tensor by tensor, into tensors of the size they were saved.
        self.sharded = False
        # The first call of a recorded forward: which module, with what kind of inputs.
        self.example: dict[str, Any] | None = None
        # The dataflow and the classes of the modules, as they are written into checkpoints.
        self._recorded: dict[str, Any] = {}
        self._frames: dict[str, Frame] = {}
        self._handles: list[Any] = []
        for path, module in root.named_modules():
            entry = (
                module is root
                or next(module.parameters(), None) is not None
                or getattr(module, POINT_MARK, False)
            )
            frame = Frame(self, path, entry)
            self._frames[path] = frame
            self._handles += [
                module.register_forward_pre_hook(frame.enter, with_kwargs=True),
                module.register_forward_hook(frame.exit, always_call=True),
            ]
            if gathers_parameters(module):
                before, after = frame.before_gathering, frame.before_sharding
                self._handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
                    module.register_forward_hook(after, prepend=True),
                ]
        register: Any = self.register_load_state_dict_pre_hook
        register(_keep_what_is_missing)
        self.train(root.training)

    def forward(self, x: Any) -> Any:
        """Pass: a root that runs all its children one after the other (`nn.Sequential`) may."""
        return x

    @property
    def engaged(self) -> bool:
        """Whether a forward has to run under the mode."""
        return self.recorder is not None or self.switches.any_stage

    @property
    def sites(self) -> list[Site]:
        """The sites in execution order."""
        return [site for site in self.site.values() if isinstance(site, Site)]

    def find(self, key: str) -> Site:
        """Return the site of a key."""
        site: Any = self.site[_module_name(key)]
        assert isinstance(site, Site)  # `create_sites` puts nothing else there
        return site

    def __contains__(self, key: str) -> bool:
        """Whether there is a site of this key."""
        return _module_name(key) in self.site

    def thaw(self) -> None:
        """Forget everything that evaluation derived from weights and ranges."""
        for site in self.sites:
            site.thaw()
            for quantizer in site.quantizers():
                quantizer.thaw()

    def get_extra_state(self) -> Tensor:
        """Return what is on, and where quantizers are, as JSON in a uint8 tensor."""
        planned = {
            "format": FORMAT_VERSION,
            "quantizers": self._quantizer_names(),
            "plans": self.plans,
            "marks": self.marks,
            "example": self.example,
            **self._recorded,
        }
        # Folding and widths change during a run, and a sharded state has to keep its size.
        now = {**what_is_on(self), "layers": self._layers()}
        return encode(planned, now, ROOM_PER_SITE * len(self.site) if self.sharded else None)

    def set_extra_state(self, state: Any) -> None:
        """Switch on what was on, after checking that it was planned in the same way."""
        recipe = decode(state)
        if not self.accepts_changes:
            self._require_same(recipe)
        switch_back(self, recipe)
        self.thaw()

    @property
    def changed_widths(self) -> dict[str, Widths]:
        """The widths of sites that are not those they were planned with, by key."""
        return {key: widths_of(self.find(key)) for key in self._planned_widths}

    @property
    def original_widths(self) -> dict[str, Widths]:
        """The widths that those sites were planned with."""
        return dict(self._planned_widths)

    def planned_widths(self, site: Site) -> Widths:
        """Return the widths that a quantized site was planned with."""
        return self._planned_widths.get(site.key, widths_of(site))

    def change_widths(self, widths: Mapping[str, Widths]) -> None:
        """Give quantized sites other widths, in place; checkpoints know them from then on.

        Args:
            widths: By site key; others keep theirs.

        Raises:
            ConfigError: If a width is not allowed.
        """
        self.width_changes += 1
        for key, changed in widths.items():
            site = self.find(key)
            planned = self.planned_widths(site)
            set_widths(site, changed)
            self._planned_widths.pop(key, None)
            if changed != planned:
                self._planned_widths[key] = planned

    def _require_same(self, recipe: Mapping[str, Any]) -> None:
        changed = changes(recipe["plans"], self.plans)
        here, there = set(self._quantizer_names()), set(recipe["quantizers"])
        if there and here != there:
            changed.append(
                f"quantizers only in the checkpoint: {sorted(there - here)[:5]}, only here: "
                f"{sorted(here - there)[:5]}"
            )
        if changed:
            msg = (
                f"the checkpoint was trained with other settings: {'; '.join(changed)}. Use those "
                "of the checkpoint, or let `linger.load_checkpoint` take them from it. To go on "
                "with other ones, pass `allow_changes=True` to the callback they belong to."
            )
            raise ConfigError(msg)

    def note_plan(self, stage: str, plan: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
        """Remember what a stage was planned with.

        Args:
            stage: Its name.
            plan: Its settings.
            marks: Marks on modules that it read, by dotted path.
        """
        # The latest plan stands last: what is planned first, the next one builds on.
        if stage == "quantize":
            self._planned_widths = {}
        self.plans.pop(stage, None)
        self.plans[stage] = plain_data(plan)
        self.marks[stage] = plain_data(marks)

    def _quantizer_names(self) -> list[str]:
        return [q.name for site in self.sites for q in site.quantizers()]

    def _layers(self) -> dict[str, Any]:
        """Return how each layer is quantized, for who reads a state without its model."""
        return {
            site.key: {
                "platform": site.config.platform,
                "weight_bits": site.weights.bits,
                "activation_bits": site.config.activation_bits,
                "granularity": site.granularity,
                "weight_range": site.config.weight_range,
                "folded": site.active_fold is not None,
                "firstconv": site.raw_images is not None,
            }
            for site in self.sites
            if site.config is not None and site.weights.grid is not None
        }

    def detach_hooks(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def create_sites(self, graph: Graph, root: nn.Module) -> None:
        """Make one site per recorded call that has a quantized meaning."""
        self.graph = graph
        owners = sorted({node.owner for node in graph if node.owner})
        self._recorded = {
            "graph": graph_to_plain(graph),
            "owners": {path: class_name(root.get_submodule(path)) for path in owners},
        }
        for node in graph:
            op = op_of(node.op)
            if op is None or not op.has_site:
                continue
            site = Site(node, op, root.get_submodule(node.owner), self.switches)
            self.site[_module_name(node.key)] = site
            frame = self._frames[node.owner]
            while len(frame.sites) <= node.invocation:
                frame.sites.append({})
            frame.sites[node.invocation].setdefault(node.op, []).append(site)
        self.train(root.training)

    def note_example(self, path: str, call: ModuleCall) -> None:
        """Remember what kind of inputs the recorded call of the module at a path had."""
        self.example = {
            "module": path,
            "args": value_to_plain(call.args),
            "kwargs": value_to_plain(call.kwargs),
        }

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter the mode, at the outermost call of an instrumented module."""
        if self.exchanges is not None:
            self._running = ModuleCall(module, args, kwargs)
        self.switches.recomputing = (
            not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        )
        if self.noise is not None and self.noise.training and not self.switches.recomputing:
            self.noise.advance()
        if self.learned and not self.training and not torch.compiler.is_compiling():
            self._follow_learned()
        self._mode.__enter__()

    def _follow_learned(self) -> None:
        """Forget what evaluation derived where learned ranges have changed since (averaging)."""
        versions = [(p.data_ptr(), p._version) for x in self.learned for p in x.parameters()]
        if versions != self._learned_versions:
            self._learned_versions = versions
            self.thaw()

    def end(self, output: Any, path: str) -> Any:
        """Leave the mode. Integers become real values, which keep their tag."""
        self._mode.__exit__(None, None, None)
        for frame in self._frames.values():
            frame.invocations = 0
        if self.exchanges is not None and self._running is not None:
            self.exchanges.append((self._running, output))
        self._running = None
        if self.recorder is not None:
            self.recorder.returned(output, whole=path == "")
            return None
        if self.switches.system == "integer" and self.switches.quantize:
            return tree_map_only(Tensor, _real_with_tag, output)
        return None


def _keep_what_is_missing(
    module: Instrumentation, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Let a checkpoint of an earlier stage load: what it does not know keeps its present value."""
    recipe = state_dict.get(prefix + EXTRA_STATE)
    present = module.state_dict()
    if module.accepts_changes:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if key.removeprefix(prefix) not in present:
                del state_dict[key]
    elif recipe is not None and decode(recipe)["quantizers"]:
        return
    for name, value in present.items():
        if name != EXTRA_STATE or recipe is None:
            state_dict.setdefault(prefix + name, value)


def _real_with_tag(x: Tensor) -> Tensor:
    tag = tag_of(x)
    if tag is None or x.dtype.is_floating_point:
        return x
    return with_tag(real_values(x), tag)


def _module_name(key: str) -> str:
    return key.replace(".", ":")


def instrumentation_of(model: nn.Module) -> Instrumentation:
    """Return the instrumentation of a prepared model.

    Raises:
        NotReadyError: If the model was never prepared.
    """
    found = getattr(model, STATE_NAME, None)
    if not isinstance(found, Instrumentation):
        msg = (
            f"{type(model).__name__} is not prepared. Call `linger.prepare(model, example_inputs)` "
            "first, or add the callbacks to a Trainer."
        )
        raise NotReadyError(msg)
    return found


def is_prepared(model: nn.Module) -> bool:
    """Whether the model carries an instrumentation."""
    return isinstance(getattr(model, STATE_NAME, None), Instrumentation)
