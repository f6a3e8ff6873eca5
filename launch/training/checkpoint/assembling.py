"""A manifest put together: what is known when a save begins, and what the writers of its parts say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ....model.config import ModelConfig
from ....parallel.ir.plan import Plan
from . import writing
from .digests import digest
from .layout import Layout
from .manifest import Manifest, ShardFile, code_here
from .writing import Written


def described(
    config: ModelConfig, plan: Plan, states: Mapping[str, str], *, step: int, updates: int, note: dict[str, Any]
) -> dict[str, Any]:
    """Of a manifest all that does not wait for the files. ``states``: dtype by state."""
    return {
        "step": step,
        "updates": updates,
        "model": asdict(config),
        "plan": plan.to_dict(),
        "code": code_here(),
        "note": note,
        "states": dict(states),
        "block_elements": writing.BLOCK_ELEMENTS,
    }


def assembled(about: dict[str, Any], layout: Layout, written: list[Written]) -> Manifest:
    """The manifest of all parts; ``about`` has what is not theirs."""
    sums = [sum(of) for of in zip(*(one.sums for one in written), strict=True)]
    digests = {state: digest(of) for state, of in zip(about["states"], sums, strict=True)}
    files: dict[str, ShardFile] = {}
    for one in written:
        before = files.get(one.file.name)
        files[one.file.name] = replace(one.file, parts=(*before.parts, *one.file.parts)) if before else one.file
    return Manifest(**about, digests=digests, layout=layout, files=tuple(files.values()))
