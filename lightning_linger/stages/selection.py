"""Choosing layers: allow-lists, globs, overrides and marks, with one precedence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.instrumentation import STATE_NAME, instrumentation_of
from lightning_linger.core.registry import supported_kinds
from lightning_linger.core.sites import Site

Fields = Mapping[str, Any] | None
TYPE_PREFIX = "type:"

# How reasons begin that say that somebody chose to leave a site out.
CHOICES = ("override", "marked", "not in `types`", "not in `modules`")

QUANT_MARK = "_linger_quant"
NORMALIZE_MARK = "_linger_normalize"


def disable_quant(module: nn.Module) -> nn.Module:
    """Mark a module, with all its descendants, to stay float. Returns the module."""
    return _mark(module, QUANT_MARK, None)


def quant_module(module: nn.Module, **fields: Any) -> nn.Module:
    """Mark a module with fields of :class:`QuantConfig` that replace the global ones."""
    return _mark(module, QUANT_MARK, fields)


def disable_normalize(module: nn.Module) -> nn.Module:
    """Mark a module, with all its descendants, to have no range limits. Returns the module."""
    return _mark(module, NORMALIZE_MARK, None)


def normalize_module(module: nn.Module, **fields: Any) -> nn.Module:
    """Mark a module with fields of :class:`NormalizeConfig` that replace the global ones."""
    return _mark(module, NORMALIZE_MARK, fields)


def _mark(module: nn.Module, name: str, fields: dict[str, Any] | None) -> nn.Module:
    setattr(module, name, fields)
    return module


class Selection:
    """Which sites a stage applies to, and with which fields.

    Args:
        types: Allow-list of module types, their names, or op kinds; None allows all.
        modules: Globs on dotted module paths, e.g. ``net.blocks.*``; None allows all.
        overrides: Maps a glob, or ``type:Linear``, to fields that replace the global ones, or to
            None, which leaves the layer out.
        mark: Name of the attribute under which marks are set on modules.

    Precedence: name over mark over type over global.
    """

    def __init__(
        self,
        types: Sequence[type[nn.Module] | str] | None,
        modules: Sequence[str] | None,
        overrides: Mapping[str, Fields] | None,
        mark: str,
    ) -> None:
        self.types = None if types is None else tuple(types)
        self.modules = None if modules is None else tuple(modules)
        self.overrides = dict(overrides or {})
        self.mark = mark

    def describe(self) -> dict[str, Any]:
        """Return what was chosen; types stand by name, which means the same."""
        types = self.types
        return {
            "types": types and [t if isinstance(t, str) else t.__name__ for t in types],
            "modules": self.modules,
            "overrides": self.overrides or None,
        }

    def marks(self, root: nn.Module) -> dict[str, Fields]:
        """Return the marks on modules by dotted path."""
        return {
            path: module.__dict__[self.mark]
            for path, module in root.named_modules()
            if self.mark in module.__dict__
        }

    def validate(self, root: nn.Module, sites: Iterable[Site]) -> None:
        """Check that every pattern matches something.

        Raises:
            ConfigError: Naming the pattern and its near matches.
        """
        modules = {
            path: module
            for path, module in root.named_modules()
            if path and path.partition(".")[0] != STATE_NAME
        }
        paths = list(modules)
        keys = [site.key for site in sites]
        classes = {base for module in modules.values() for base in type(module).__mro__}
        kinds = {base.__name__ for base in classes} | set(supported_kinds())
        for pattern in (*(self.modules or ()), *self.overrides):
            if pattern.startswith(TYPE_PREFIX):
                _require_known(pattern[len(TYPE_PREFIX) :], kinds, "type", pattern)
            elif not any(fnmatchcase(name, pattern) for name in (*paths, *keys)):
                msg = (
                    f"the pattern {pattern!r} matches no module. Similar: "
                    f"{near_matches(pattern, paths)}. Patterns are globs on the full dotted path."
                )
                raise ConfigError(msg)
        for wanted in self.types or ():
            if isinstance(wanted, str):
                _require_known(wanted, kinds, "type", wanted)

    def resolve(self, root: nn.Module, site: Site) -> tuple[Fields, str | None]:
        """Return the fields that replace the global ones, and why the site is left out if so.

        Returns:
            ``({...}, None)`` for a chosen site, ``(None, reason)`` otherwise.
        """
        found = self._by_name(site)
        if found is not None:
            pattern, fields = found
            return (fields, None) if fields is not None else (None, f"override {pattern!r}")
        marked, fields = self._by_mark(root, site.node.owner)
        if marked:
            return (fields, None) if fields is not None else (None, "marked on the module")
        for pattern, fields in self.overrides.items():
            if pattern.startswith(TYPE_PREFIX) and is_type(site, pattern[len(TYPE_PREFIX) :]):
                return (fields, None) if fields is not None else (None, f"override {pattern!r}")
        if self.types is not None and not any(is_type(site, wanted) for wanted in self.types):
            return None, "not in `types`"
        if self.modules is not None and not any(matches(site, p) for p in self.modules):
            return None, "not in `modules`"
        return {}, None

    def _by_name(self, site: Site) -> tuple[str, Fields] | None:
        matching = [
            (pattern, fields)
            for pattern, fields in self.overrides.items()
            if not pattern.startswith(TYPE_PREFIX) and matches(site, pattern)
        ]
        # The longest pattern is the most specific one.
        return max(matching, key=lambda item: len(item[0])) if matching else None

    def _by_mark(self, root: nn.Module, path: str) -> tuple[bool, Fields]:
        while True:
            module = root.get_submodule(path)
            if self.mark in module.__dict__:
                return True, getattr(module, self.mark)
            if not path:
                return False, None
            path = path.rpartition(".")[0]


def sites_within(model: nn.Module, modules: Sequence[str] | None) -> list[Site]:
    """Return the sites of a prepared model that some globs mean, in execution order.

    Args:
        model: The model.
        modules: Globs on dotted paths or site keys; None means all.

    Raises:
        ConfigError: If a glob matches nothing.
    """
    sites = instrumentation_of(model).sites
    Selection(None, modules, None, QUANT_MARK).validate(model, sites)
    if modules is None:
        return sites
    return [site for site in sites if any(matches(site, pattern) for pattern in modules)]


def matches(site: Site, pattern: str) -> bool:
    """Whether a glob matches a site's key, its module's path, or a path above it."""
    return fnmatchcase(site.key, pattern) or covers(pattern, site.node.owner)


def covers(pattern: str, path: str) -> bool:
    """Whether a glob matches a dotted path, or one above it."""
    while path:
        if fnmatchcase(path, pattern):
            return True
        path = path.rpartition(".")[0]
    return False


def is_type(site: Site, wanted: type[nn.Module] | str) -> bool:
    """Whether a site's module is of a type, by class or name, or its op of a kind."""
    if isinstance(wanted, str):
        names = {base.__name__ for base in type(site.owner).__mro__}
        return wanted == site.op.kind or wanted in names
    return isinstance(site.owner, wanted)


def _require_known(name: str, kinds: Iterable[str], what: str, pattern: str) -> None:
    if name not in set(kinds):
        msg = (
            f"{pattern!r} names no {what} of this model. Similar: {near_matches(name, kinds)}. "
            f"Op kinds: {supported_kinds()}."
        )
        raise ConfigError(msg)
