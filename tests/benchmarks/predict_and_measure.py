"""Step times predicted beside measured: every plan of four gloo processes, on loopback and in a cluster in a box.

    python tests/benchmarks/predict_and_measure.py [--where loopback fast slow] [--shapes small larger]
        [--rounds 8] [--json results.json]

In every place (plain loopback; two servers of two ranks with a fast link; the same with a slow one) the machine is
calibrated as by ``cinemesh calibrate``, on other models than those that are predicted. Then all plans are predicted,
then measured: steps are replayed, plans take turns so that the machine's noise falls on all, and a plan's time is the
lower quartile of its steps, from barrier to barrier. All plans of a shape do the same global batch.

Prints predicted and measured times, their rank correlation (Spearman), the mean error, and the regret: how much slower
than the best measured plan the one is that the planner would choose. Where namespaces are not allowed, the box is
"not measured".
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.box import RANKS, Box, NotAllowed
from benchmarks.step_against_torch import SHAPES as DEEP
from benchmarks.step_against_torch import Shape

from cinemesh.launch.commands.calibrate import TimedSamples, machine_of, measure
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, text_input, training_inputs
from cinemesh.model.runner import StepRunner, data_share
from cinemesh.model.step import Optimizer, build_step
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.fields import AXES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.comm import Communicator
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.perf_model.calibration.calibrate import fit, residuals, write
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.compute import Compute
from cinemesh.perf_model.prices.network import Network
from cinemesh.perf_model.prices.timeline import play, price
from cinemesh.perf_model.search.planner import search
from cinemesh.perf_model.search.request import LatentBucket, Request

LINKS: dict[str, float | None] = {"loopback": None, "fast": 4000.0, "slow": 200.0}  # Mb/s of the link between servers
SHAPES = {name: replace(shape, config=replace(shape.config, layers=2)) for name, shape in DEEP.items()}
SKIPPED = 1  # rounds
TURNED = ("dp_replicate", "dp_shard", "cp", "tp")  # what speaks most crosses the servers


def plans() -> list[Plan]:
    """Every split of four ranks as the planner would run it; the other way round; recomputed; with less overlap."""
    everywhere = Plan(tp=2, cp=2, dp_shard=2, dtype="float32", recompute="none", prefetch=1, grad_units=2)
    degrees = [
        dict(zip(AXES, sizes, strict=True)) for sizes in itertools.product((1, 2, 4), repeat=4) if math.prod(sizes) == 4
    ]
    base = [everywhere.with_degrees(**sizes) for sizes in degrees]
    found = list(base)
    found += [replace(plan, order=TURNED) for plan in base if max(plan.size(axis) for axis in AXES) == 2]
    found += [replace(plan, recompute="full", prefetch=0, grad_units=1) for plan in base]
    found += [replace(plan, recompute="selective", grad_units=1) for plan in base if plan.dp_shard * plan.cp == 4]
    return found


def label(plan: Plan) -> str:
    degrees = " ".join(f"{axis}={plan.size(axis)}" for axis in AXES if plan.size(axis) > 1)
    marks = [plan.recompute, f"prefetch={plan.prefetch}"]
    marks += [f"grad_units={plan.grad_units}"] if plan.dp_shard * plan.cp > 1 else []
    marks += ["turned"] if plan.order == TURNED else []
    return f"{degrees}, {', '.join(map(str, marks))}"


def placed(plan: Plan) -> Plan:
    """The plan with its order reduced to what matters: the axes that have ranks."""
    split = [axis for axis in plan.order if plan.size(axis) > 1]
    return replace(plan, order=(*split, *(axis for axis in AXES if axis not in split)))


# -- predicted --------------------------------------------------------------------------------------------------------


def predict(cluster: Cluster, shape: Shape, plan: Plan) -> tuple[float, float]:
    """Seconds of a step, and of it exposed communication: the program that runs, priced and played."""
    batch = BatchShape(plan.local_batch(shape.samples), shape.latent)
    program = prepare(build_step(shape.config, plan, batch), backend="gloo")
    timeline = play(price(program, Compute(cluster), Network(cluster), cluster))
    return timeline.step_s, timeline.total_exposed_s


def planned(cluster: Cluster, shape: Shape) -> Plan:
    """What the planner chooses."""
    request = Request(
        shape.config,
        (LatentBucket(shape.latent),),
        cluster,
        RANKS,
        global_batch=shape.samples,
        dtype="float32",
        fixed={"micro_batches": 1},
    )
    return search(request).best.plan


# -- measured, in a rank ----------------------------------------------------------------------------------------------


def runner_of(shape: Shape, plan: Plan, mesh: Mesh) -> StepRunner:
    config, samples = shape.config, shape.samples
    batch = BatchShape(plan.local_batch(samples), shape.latent)
    runner = StepRunner(config, plan, batch, Optimizer(), mesh, comm=Communicator(mesh))
    runner.initialise(probe_values(0))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(samples, config.channels, *shape.latent, generator=generator)
    text = {text_input(e.name): torch.randn(e.tokens, samples, e.width, generator=generator) for e in config.encoders}
    mask = torch.ones(samples, config.text_tokens, dtype=torch.bool)
    mask[:, -1] = False
    runner.capture("required")
    whole = {LATENTS: latents, **dict.fromkeys((IDS, PLACES), torch.arange(samples)), MASK: mask, **text}
    runner.load(0, data_share(whole, training_inputs(config, plan, batch), plan, runner.coordinates))
    return runner


def step_times(shape: Shape, rounds: int, meshes: dict[tuple[object, ...], Mesh]) -> list[list[float]]:
    """Seconds of every round's step of every plan. ``meshes``: those made so far, by degrees and order."""
    runners: list[StepRunner] = []
    for plan in plans():
        key = (*(plan.size(axis) for axis in AXES), plan.order)
        if key not in meshes:
            meshes[key] = Mesh(plan)
        runners.append(runner_of(shape, plan, meshes[key]))
    times: list[list[float]] = [[] for _ in runners]
    for round_ in range(rounds + SKIPPED):
        for runner, seconds in zip(runners, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            runner.step(1e-4)
            dist.barrier()
            if round_ >= SKIPPED:
                seconds.append(time.perf_counter() - start)
    return times


def rank_main(arguments: argparse.Namespace) -> None:
    """Calibrate, then step; rank 0 writes both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    samples = measure()
    if samples is not None:
        assert isinstance(samples, TimedSamples)
        machine = machine_of(arguments.name)
        cluster = write(fit(samples, machine), machine, arguments.folder / "cluster.yaml")
        (arguments.folder / "residuals.json").write_text(json.dumps(residuals(samples, cluster)))
    meshes: dict[tuple[object, ...], Mesh] = {}
    for name in arguments.shapes:
        times = step_times(SHAPES[name], arguments.rounds, meshes)
        if dist.get_rank() == 0:
            (arguments.folder / f"{name}.json").write_text(json.dumps(times))
    dist.destroy_process_group()


# -- the whole --------------------------------------------------------------------------------------------------------


def run_place(arguments: argparse.Namespace, name: str, folder: Path) -> None:
    """Raises NotAllowed."""
    command = [__file__, "--rank", "--name", name, "--folder", str(folder), "--rounds", str(arguments.rounds)]
    command += ["--shapes", *arguments.shapes]
    rate = LINKS[name]
    if rate is not None:
        with Box(rate) as box:
            box.run(command)
        return
    local = f"--standalone --nproc-per-node {RANKS}".split()
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *local, *command], check=True, env=environment)


def ranks(values: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) - 1) / 2 for value in values]


def score(predicted: Sequence[float], measured: Sequence[float], chosen: int) -> dict[str, float]:
    """``chosen``: the planner's choice."""
    return {
        "spearman": statistics.correlation(ranks(predicted), ranks(measured)),
        "mean_error": statistics.fmean(abs(p / m - 1.0) for p, m in zip(predicted, measured, strict=True)),
        "regret": measured[chosen] / min(measured) - 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", nargs="+", default=list(LINKS), choices=list(LINKS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", action="store_true", help="this process is a rank")
    parser.add_argument("--name", help="of the place, in a rank")
    parser.add_argument("--folder", type=Path, help="for a rank's results")
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments)
        return
    for name in arguments.where:
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_place(arguments, name, Path(folder))
            except NotAllowed as reason:
                print(f"{name}: not measured: {reason}")
                continue
            results = list(evaluate(arguments, name, Path(folder)))
        if arguments.json:
            keep(arguments.json, results)


def evaluate(arguments: argparse.Namespace, name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One result a shape: predictions from the place's own calibration beside what its ranks measured."""
    cluster = load(str(folder / "cluster.yaml"))
    for shape in arguments.shapes:
        times = json.loads((folder / f"{shape}.json").read_text())
        measured = [statistics.quantiles(seconds, n=4)[0] for seconds in times]
        prices = [predict(cluster, SHAPES[shape], plan) for plan in plans()]
        choice = [placed(plan) for plan in plans()].index(placed(planned(cluster, SHAPES[shape])))
        scores = score([seconds for seconds, _ in prices], measured, choice)
        print(f"\n{name}, {shape}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        print(f"  the planner chooses {label(plans()[choice])}")
        rows = [
            {"plan": label(plan), "predicted_s": predicted, "exposed_s": exposed, "measured_s": seconds}
            for plan, (predicted, exposed), seconds in zip(plans(), prices, measured, strict=True)
        ]
        rows.sort(key=itemgetter("measured_s"))
        for row in rows:
            p, m = row["predicted_s"], row["measured_s"]
            print(f"  {row['plan']:66}{p * 1e3:10.1f}{m * 1e3:10.1f} ms{p / m - 1:+8.1%}", flush=True)
        yield {
            "place": name,
            "mbit": LINKS[name],
            "shape": shape,
            "date": datetime.now().isoformat(timespec="minutes"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "rounds": arguments.rounds,
            **scores,
            "chosen": label(plans()[choice]),
            "residuals": json.loads((folder / "residuals.json").read_text()),
            "rows": rows,
        }


def keep(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results beside those of other places and shapes."""
    before = json.loads(path.read_text()) if path.exists() else []
    new = {(result["place"], result["shape"]) for result in results}
    others = [result for result in before if (result["place"], result["shape"]) not in new]
    path.write_text(json.dumps(others + results, indent=1) + "\n")


if __name__ == "__main__":
    main()
