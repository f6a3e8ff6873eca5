"""``cinemesh calibrate``: a cluster file, of this machine or of what was measured on GPUs (torch-free).

``calibrate.py`` measures this machine; the rest is read from files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import CinemeshError
from ...files import check_output_file
from ...perf_model.calibration import card, links, nccl_logs
from ..options import DEFAULT_CLUSTER, Device
from ..written import command, wrote
from .links import show_levels, show_links


@dataclass(frozen=True)
class CalibrateOrder:
    """Where to write, and of what: one of ``card``, ``nccl_tests``, ``acceptance``, ``profile``, or this machine."""

    out: Path
    nproc: int | None
    card: Path | None
    table: Path | None
    nccl_tests: Sequence[Path]
    acceptance: Path | None
    profile: Path | None
    base: str | None
    device: Device

    def check(self) -> None:
        """Raises CinemeshError for options that do not go together, and files that cannot be written."""
        if self.out.suffix not in (".yaml", ".yml"):
            raise CinemeshError(
                f"--out {self.out}: a cluster file ends in .yaml", remedy="write for example --out local.yaml"
            )
        check_output_file(self.out, "--out")
        measured = {
            "--card": self.card,
            "--nccl-tests": self.nccl_tests,
            "--acceptance": self.acceptance,
            "--profile": self.profile,
        }
        given = [name for name, of in measured.items() if of]
        if len(given) > 1:
            raise CinemeshError(
                f"calibrate: {' and '.join(given)} are given", remedy="take one, then the other with --base"
            )
        if self.table is not None:
            if self.card is None:
                raise CinemeshError("--table is made of --card", remedy="add it, or leave --table out")
            check_output_file(self.table, "--table")


def run(order: CalibrateOrder) -> int:
    """Write the cluster file. The exit code."""
    order.check()
    base, out = order.base or DEFAULT_CLUSTER, order.out
    if order.profile is not None:
        show_levels(order.profile, order.base, out)
    elif order.card is not None:
        cluster = card.write(order.card, base, out)
        if order.table is not None:
            card.write_table(order.card, order.table)
            wrote(order.table, "put it into kernels/tuning under the card's name")
        wrote(out, command("plan", gpus=cluster.gpus, cluster=out), cluster.about)
    elif order.nccl_tests:
        show_links(out, *nccl_logs.write(order.nccl_tests, base, out))
    elif order.acceptance is not None:
        show_links(out, *links.write_measured(order.acceptance, base, out))
    else:
        from .calibrate import run as measure

        return measure(out=out, nproc=order.nproc, device=order.device, base=base)
    return 0
