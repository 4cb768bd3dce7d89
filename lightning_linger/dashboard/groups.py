"""Layers in groups that fit one chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LARGEST = 12
SMALLEST = 6


@dataclass(frozen=True)
class Group:
    """Neighbouring layers.

    Args:
        title: The modules they belong to.
        sites: Site keys, in execution order.
    """

    title: str
    sites: tuple[str, ...]


def group_layers(sites: Sequence[str]) -> list[Group]:
    """Divide sites by the modules they belong to.

    A module of more than ``LARGEST`` sites is divided by its submodules; neighbours of together no
    more than ``SMALLEST`` sites share a group.

    Args:
        sites: Site keys, in execution order.
    """
    groups: list[Group] = []
    for group in _divided(list(sites), depth=1):
        last = groups[-1] if groups else None
        if last is not None and len(last.sites) + len(group.sites) <= SMALLEST:
            titles = dict.fromkeys([*last.title.split(", "), group.title])
            groups[-1] = Group(", ".join(titles), last.sites + group.sites)
        else:
            groups.append(group)
    return groups


def _divided(sites: list[str], depth: int) -> list[Group]:
    by_module: dict[str, list[str]] = {}
    for site in sites:
        by_module.setdefault(_module(site, depth), []).append(site)
    groups = []
    for title, members in by_module.items():
        divisible = any(len(_path(site)) > depth for site in members)
        if len(members) > LARGEST and divisible:
            groups += _divided(members, depth + 1)
        else:
            groups.append(Group(title, tuple(members)))
    return groups


def _module(site: str, depth: int) -> str:
    return ".".join(_path(site)[:depth]) or "model"


def _path(site: str) -> list[str]:
    path = site.rsplit("/", 2)[0].partition("@")[0]
    return path.split(".") if path else []
