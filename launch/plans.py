"""Plans as a person names them: by degrees and fields, or by a file that holds one (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..documents import read_yaml
from ..parallel.ir.plan import Plan

SUFFIXES = (".yaml", ".yml")


def read_plan(given: str, **defaults: Any) -> Plan:
    """``tp=4,cp=2,dp_shard=96``, or a YAML file: what ``plan --out`` wrote, or a recipe or resolved run with its plan.

    ``defaults`` are fields that a text leaves out. A file leaves none out, so there they hold in place of its own.
    Raises CinemeshError for a text that is no plan, and for a file that cannot be read or holds none.
    """
    if not given.endswith(SUFFIXES):
        return Plan.parse(given, **defaults)
    remedy = "name a file that cinemesh plan --out wrote, or write tp=4,cp=2,dp_shard=96"
    return replace(Plan.of_file(read_yaml(Path(given), "the plan", remedy)), **defaults)


def plan_override(given: str | None) -> list[str]:
    """``--plan`` of a recipe's command, as ``--set`` takes it: what :func:`read_plan` reads, or ``auto``."""
    return [] if given is None else [f"plan={json.dumps(given)}"]  # a JSON text is a YAML text


def device_override(given: str | None) -> list[str]:
    """``--device`` of a recipe's command, as ``--set`` takes it."""
    return [] if given is None else [f"device={json.dumps(given)}"]


def held_fields(given: Mapping[str, Any]) -> dict[str, object]:
    """Plan fields that are given by hand, as a plan has them; checked on degrees that allow every overlap."""
    plan = Plan.from_dict({"tp": 2, "cp": 2, "dp_shard": 2} | dict(given))
    return {name: getattr(plan, name) for name in given}
