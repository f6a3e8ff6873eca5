"""Stage 2: small steps of every way to split, on all ranks, against plain autograd in float64; and the wire's ledger.

As ``cinemesh verify`` proves a plan, within the same derived bounds. On GPUs in float32, and the composition of all
ways in bf16 too.
"""

from __future__ import annotations

from typing import Any

from ...parallel.ir.plan import Plan
from ..cluster.processes import Joined
from ..proof.bounds import QUANTITIES
from ..proof.parity import Case
from ..proof.verify import Report, verify_in
from .here import SAID, Here, mesh_of
from .steps import device_kind, plans_of, proof_case

STEPS = 2  # the second has moments and moved weights


def run(here: Here) -> None:
    """Every plan against float64."""
    with here.joined() as place:
        plans = plans_of(here.world, here.local)
        tried: list[tuple[str, Plan, str | None]] = [(name, plan, None) for name, plan in plans.items()]
        if device_kind(place.device) == "cuda":
            tried.append((*tried[-1][:2], "bf16"))
        rows: list[dict[str, Any]] = []
        for name, plan, dtype in tried:
            case = proof_case(plan, place.device, STEPS, dtype)
            here.at(f"{name}: {plan.equation()} in {case.plan.dtype}")
            report = _verified(place, case)
            if report is None:  # not on rank 0
                continue
            rows.append({"name": name, **report.to_dict()})
            if not report.ok:
                here.fault(f"{name} ({report.plan}, {report.dtype}): {wrong_of(report)}")
            worst = max(row["worst"]["gradient"] for row in rows)
            good = sum(row["ok"] for row in rows)
            here.note(plans=rows, **{SAID: f"{good} of {len(rows)} plans ok, worst gradient error {worst:.1e}"})


def _verified(place: Joined, case: Case) -> Report | None:
    with mesh_of(case.plan, place) as mesh:
        return verify_in(case, mesh, device=place.device, silent=True)


def wrong_of(report: Report) -> str:
    """What of a report does not hold."""
    found = [
        f"{what} error {report.worst[what]:.1e} > {report.bounds[what]:.1e} at {report.where[what]}"
        for what in QUANTITIES
        if not report.worst[what] <= report.bounds[what]
    ]
    if report.ledger_difference is not None:
        found.append(f"collectives: {report.ledger_difference}")
    if not report.live_bytes_equal:
        found.append("live bytes are not those of the program")
    if not report.replicas_equal:
        found.append("replicas differ bitwise")
    if report.peak_bytes_ran > report.peak_bytes_predicted + report.workspace_bytes:
        found.append(f"{report.peak_bytes_ran} B ran, {report.peak_bytes_predicted} B predicted")
    return "; ".join(found) or ", ".join(report.remarks)
