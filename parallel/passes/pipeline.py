"""All passes, in their order: from a program as it was built to the one that runs or is priced (torch-free).

To look behind one: ``prepare(..., checked=True)``. To add one: docs/extend.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..ir.check import refuse_broken
from ..ir.plan import Plan
from ..ir.program import Program
from .elide import elide
from .fuse import fuse
from .fuse_tp import fuse_tp
from .mark import mark
from .offload import offload
from .prefetch import prefetch
from .prices import RATES, Price
from .recompute import rematerialize
from .schedule import ScheduleWindows
from .staging import stage_for_gloo, stage_symmetric

Pass = Callable[[Program], Program]


def passes(plan: Plan, *, backend: str, price: Price | None = None, marked: bool = False) -> Iterator[Pass]:
    """From a built program to the one that runs or is priced.

    Recompute, fusion, degree-1 aliases, copies to the host, order, staging; ``marked``: marks.

    ``backend`` is ``nccl`` or ``gloo``; gloo's reduce-scatter needs a staging buffer, which is then listed. ``price``
    gives the seconds of a record where the plan asks for overlap; every rank must pass one that says the same. Without
    it, the backend's ``RATES`` do.
    """
    yield from remaking()
    yield from arranging(plan)
    yield from finishing(plan, backend=backend, price=price)
    if marked:
        yield mark


def remaking() -> Iterator[Pass]:
    """The first passes: they do the same whatever the degrees are."""
    yield from (rematerialize, fuse, prefetch)


def arranging(plan: Plan) -> Iterator[Pass]:
    """The passes that look at records alone: they do the same whatever the buffers measure."""
    yield elide
    if plan.offload:
        yield offload
    if plan.fused_tp:
        yield fuse_tp


def finishing(
    plan: Plan, *, backend: str, price: Price | None = None, windows: ScheduleWindows | None = None
) -> Iterator[Pass]:
    """The passes behind these. ``windows``: of an arranged program of the same records."""
    if plan.overlaps:

        def scheduled(program: Program) -> Program:
            return (windows or ScheduleWindows(program)).ordered(program, price or RATES[backend].price)

        yield scheduled
    yield stage_for_gloo if backend == "gloo" else stage_symmetric


def prepare(
    program: Program, *, backend: str, price: Price | None = None, marked: bool = False, checked: bool = False
) -> Program:
    """All ``passes``. With ``checked`` each is looked at: raises BrokenProgram, which is a bug of the pass it names."""
    built = program
    for run in passes(program.plan, backend=backend, price=price, marked=marked):
        program = run(program)
        if checked:
            refuse_broken(run.__name__, program, built)
    return program
