"""``cinemesh kernels``: what would run for a model and plan, and why the others would not (torch-free)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...errors import CinemeshError
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.passes.pipeline import prepare
from ..card import card_here
from ..examples import PAPER
from ..models import read_model
from ..plans import read_plan
from . import choices, compile_check

DEFAULT_PLANS = {"movie-gen-30b": PAPER}  # others: one GPU


@dataclass(frozen=True)
class Tuning:
    """``out``: of the table, None for the package's own; ``seconds``: at most, None for as long as it takes."""

    out: Path | None
    seconds: float | None

    @classmethod
    def asked(cls, tune: bool, out: Path | None, seconds: float | None) -> Tuning | None:
        """Raises CinemeshError for options of a tuning that is not asked for."""
        if not tune and (out is not None or seconds is not None):
            raise CinemeshError("--out and --seconds are those of --tune", remedy="add it, or leave them out")
        return cls(out, seconds) if tune else None


def run(
    *,
    model: str,
    plan: str | None,
    latent: str | None,
    batch: int,
    device: str | None,
    target: str | None,
    tune: Tuning | None,
    as_json: bool,
) -> None:
    """Body of the command; one of: the table of choices, the compile check, the tuning of this GPU's tiles."""
    named = read_model(model)
    config, shape = named.config, named.latent(latent)
    if target and tune:
        raise CinemeshError("--compile needs no GPU and --tune one", remedy="give one of the two")
    if target:
        given = read_plan(plan) if plan else None
        compile_check.run(config, given, BatchShape(batch, shape), target=target, as_json=as_json)
        return
    chosen = read_plan(DEFAULT_PLANS.get(model, "") if plan is None else plan)
    program = prepare(build_step(config, chosen, BatchShape(batch, shape)), backend="nccl")
    if tune:
        from .tune import run as measure

        measure(program, tune.out, tune.seconds)
        return
    where, origin = (device, "asked for") if device else _device_here()
    found = list(choices.lines(program, where))
    if as_json:
        print(json.dumps(choices.as_json(found, where, origin, model, chosen), indent=1))
        return
    choices.show(found, where, origin, model, chosen)


def _device_here() -> tuple[str, str]:
    """(``sm_90``, where that comes from): the first GPU of this machine, an H100 where there is none."""
    card = card_here()
    if card is None:
        return "sm_90", "an H100 is assumed: no GPU here; --device names another"
    return card.device, f"{card.name} of this machine"
