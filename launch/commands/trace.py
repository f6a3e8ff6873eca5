"""``cinemesh trace``: run a small plan on gloo processes and show when every op and collective ran, and should have.

The same as ``cinemesh profile``, of a plan alone: on a model's usual sample, with noise in the place of data.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import CinemeshError
from ...files import check_output_file
from ...model.step import build_step, check
from ...parallel.passes.pipeline import prepare
from ...perf_model.clusters.cluster import Cluster, load
from ...perf_model.prices.played import PlayedStep, play_program
from ..models import read_model
from ..plans import read_plan
from ..preflight import check_host_memory
from ..proof.parity import OPTIMIZER, Case
from ..proof.traced import traced
from ..written import wrote
from .profile_shown import ToldProfile, print_json


def predict(case: Case, cluster: Cluster) -> PlayedStep:
    """The program that the ranks run, played on a cluster."""
    built = build_step(case.config, case.plan, case.batch, OPTIMIZER, seed=case.seed)
    return play_program(prepare(built, backend="gloo"), case.batch, cluster)


def run(*, plan: str, model: str, out: Path, steps: int, max_procs: int, cluster: str, as_json: bool) -> None:
    """Trace, write ``out`` and print the table.

    Raises CinemeshError when the plan does not suit model or machine, and for an ``out`` that cannot be written.
    """
    check_output_file(out, "--out")
    chosen, priced_on = read_plan(plan, dtype="float32"), load(cluster)
    if priced_on.gloo is None:
        raise CinemeshError(
            f"--cluster {cluster} has GPUs, and a trace runs on CPU processes",
            remedy="leave it out, or give the file that cinemesh calibrate wrote",
        )
    if chosen.world_size > max_procs:
        raise CinemeshError(
            f"{chosen.equation()} processes > --max-procs {max_procs}", remedy="trace a smaller plan, or allow as many"
        )
    named = read_model(model)
    case = Case(chosen, named.config, 1, named.latent(), steps)
    check(case.config, chosen, case.batch)
    whole = predict(case, priced_on)
    check_host_memory([whole.program], chosen.world_size)
    told = ToldProfile.of(f"{model} under {chosen.equation()}", priced_on, whole, traced(case))
    told.write_trace(out)
    spans = sum(len(rank.spans) for rank in told.by_rank)
    wrote(out, "open it at https://ui.perfetto.dev", f"{spans} spans of {len(told.by_rank)} ranks")
    if as_json:
        print_json(told)
    else:
        told.show()
