"""Every machine of a job looked at together: one software, one time, no slow rank, no slow link.

Ranks tell what their machines are through the job's store: those that could not make one group are told apart. Then
each multiplies at the same time as the others, and groups within and between servers gather at once. The fastest of
several tries counts, since others only ever add to a time; a rank or a group is slow beside the median of its kind.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...documents import parse_json
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import Communicator, barrier, gather_objects
from ...parallel.runtime.mesh import Mesh, group_ranks
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.compute import Compute
from ...perf_model.prices.network import Network, ring_group
from ..cluster.environment import processes_here
from ..cluster.meeting import job_store
from ..cluster.processes import joined, rank_main
from ..jobs.job import FILES_BESIDE
from ..options import Device
from .checks import CLOCK_MOST_S, Check, Wanted, check, fit
from .facts import machine_facts, machine_host
from .groups import by_value, ranks_text

SIDE = {"cpu": 512, "cuda": 8192}  # of the square product: milliseconds on either
PRODUCTS = {"cpu": 10, "cuda": 1}  # of a try: on CPUs longer than the turn of another process, or a try may miss it
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
GATHERED_BYTES = {"cpu": 2**20, "cuda": 2**28}  # of an all-gather: long enough for its rate, not its latency, to count
TRIES = 15
LOOKS_AGAIN = 4  # at who is slow: one that is keeps being so
CLOCK_ROUNDS = 5
SLOWER = {"cpu": 1.5, "cuda": 1.1}  # than the median: CPU processes share cores with whatever else runs
PRICED = 1.5  # times the cluster file's price: it is no more exact for one small product or exchange
DOCTOR = "cinemesh/doctor"  # in the store


@dataclass(frozen=True)
class TakenTimes:
    """Seconds of the same work, by who did it: one rank, or the ranks of one group."""

    what: str
    remedy: str
    seconds: Mapping[tuple[int, ...], float]
    price_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RankTold:
    """What one rank tells of its machine. ``checks``: of the first rank of a machine alone."""

    host: str
    software: dict[str, str]
    checks: list[Check]


Say = Callable[[Sequence[RankTold], Sequence[Check]], None]  # of every machine, and what was found of all together


def run_on_ranks(device: Device, directory: Path, cluster: Cluster | None, say: Say) -> int:
    """On every rank of a job; the exit code, the same on all. ``say`` is called on rank 0.

    Raises CinemeshError as :func:`processes.joined`.
    """
    return rank_main(lambda: _work(device, directory, cluster, say))


def _work(device: Device, directory: Path, cluster: Cluster | None, say: Say) -> int:
    store, rank, world = job_store()
    local = processes_here(world)
    here = machine_facts(directory)
    wanted = Wanted(device=device, ranks_of_a_node=local, files=world + FILES_BESIDE, cluster=cluster)
    mine = RankTold(host=here.host, software=here.software, checks=check(here, wanted) if rank % local == 0 else [])
    store.set(f"{DOCTOR}/{rank}", json.dumps(asdict(mine)))
    everyones: list[RankTold] = []
    if rank == 0:
        everyones = [_read(store.get(f"{DOCTOR}/{other}")) for other in range(world)]
        found = one_software([told.software for told in everyones])
        store.set(f"{DOCTOR}/software", json.dumps(found.verdict))
    else:
        found = Check("one software", parse_json(store.get(f"{DOCTOR}/software").decode(), "what rank 0 said", ""), "")
    shared = [found]
    if fit(shared) and world > 1:  # ranks of other software may never meet
        shared += _measured(device, cluster, world, local)
    machines = [told for told in everyones if told.checks]
    sound = fit([*shared, *(one for told in machines for one in told.checks)])
    if rank == 0:
        say(machines, shared)
        store.set(f"{DOCTOR}/fit", json.dumps(sound))
    else:
        sound = parse_json(store.get(f"{DOCTOR}/fit").decode(), "what rank 0 said", "")
    store.set(f"{DOCTOR}/heard/{rank}", "")
    if rank == 0:  # which may keep the store
        store.wait([f"{DOCTOR}/heard/{other}" for other in range(world)])
    return 0 if sound else 1


def _read(text: bytes) -> RankTold:
    values: dict[str, Any] = parse_json(text.decode(), "what a rank said of its machine", "")
    checks = [Check(**one) for one in values["checks"]]
    return RankTold(host=values["host"], software=values["software"], checks=checks)


def one_software(of_ranks: Sequence[Mapping[str, str]]) -> Check:
    """Whether all ranks run the same; what differs, with the ranks of each."""
    names = dict.fromkeys(name for of in of_ranks for name in of)
    differing: list[str] = []
    for name in names:
        values = by_value({rank: of.get(name, "none") for rank, of in enumerate(of_ranks)})
        if len(values) > 1:
            differing.append(f"{name} " + ", ".join(f"{value} on ranks {ranks}" for value, ranks in values.items()))
    if differing:
        return Check("one software", "fault", "; ".join(differing), "install one release of each on all nodes")
    return Check("one software", "ok", f"the same on {len(of_ranks)} ranks")


def _measured(device: Device, cluster: Cluster | None, world: int, local: int) -> list[Check]:
    with joined(Plan(dp_replicate=world), device) as place:
        return look_together(place.device, cluster, world, local)


def look_together(device: str, cluster: Cluster | None, world: int, local: int) -> list[Check]:
    """What shows when ``world`` ranks, ``local`` on each host, are at the same work; collective, alike on all ranks."""
    kind = "cpu" if device == "cpu" else "cuda"
    hosts: Any = gather_objects(machine_host())
    measures: list[Callable[[], TakenTimes]] = [lambda: _products(device, cluster)]
    for what, plan, axes in link_plans(world, local):
        measures.append(partial(_gathers, device, cluster, what, plan, axes))
    return [one_time(_clock_rounds(), hosts), *(_slow_each_time(measure, kind, hosts) for measure in measures)]


def _slow_each_time(measure: Callable[[], TakenTimes], kind: str, hosts: Sequence[str]) -> Check:
    """Who is slow is looked at again, with all others: what somebody else did there for a moment is gone then."""
    times = measure()
    for _ in range(LOOKS_AGAIN):
        if slow(times, kind, hosts).verdict != "fault":
            break
        later = measure().seconds
        times = replace(times, seconds={who: min(seconds, later[who]) for who, seconds in times.seconds.items()})
    return slow(times, kind, hosts)


def _clock_rounds() -> list[list[float]]:
    """What every rank's clock says when all leave a barrier, several times."""
    rounds: list[list[float]] = []
    for _ in range(CLOCK_ROUNDS):
        barrier()
        said: Any = gather_objects(time.time())
        rounds.append(said)
    return rounds


def one_time(rounds: Sequence[Sequence[float]], hosts: Sequence[str]) -> Check:
    """Whether the clocks of all hosts agree: by the round in which a rank left its barrier nearest to the others."""
    aheads = [[said - statistics.median(one) for said in one] for one in rounds]
    ahead = [min(of, key=abs) for of in zip(*aheads, strict=True)]
    wrong = {host: skew for host, skew in zip(hosts, ahead, strict=True) if abs(skew) > CLOCK_MOST_S}
    if wrong:
        said = ", ".join(f"{host} {skew:+.1f} s" for host, skew in wrong.items())
        return Check("one time", "fault", f"against most others: {said}", "see to NTP there: chronyc tracking")
    return Check("one time", "ok", f"clocks within {max(map(abs, ahead)):.3f} s of their median")


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several tries, all ranks at it at once."""
    work()
    found: list[float] = []
    for _ in range(TRIES):
        barrier()
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def _products(device: str, cluster: Cluster | None) -> TakenTimes:
    kind = "cpu" if device == "cpu" else "cuda"
    side, dtype = SIDE[kind], DTYPE[kind]
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def work() -> None:
        for _ in range(PRODUCTS[kind]):
            torch.mm(a, b, out=out)

    everyones: Any = gather_objects(_fastest(work, device) / PRODUCTS[kind])
    price = None
    if cluster is not None and cluster.device == kind:
        price = Compute(cluster).matmul_s(side, side, side, str(dtype).removeprefix("torch."))
    remedy = "see to its clocks, its cooling and what else runs there"
    return TakenTimes("product", remedy, {(rank,): seconds for rank, seconds in enumerate(everyones)}, price)


def link_plans(world: int, local: int) -> Iterator[tuple[str, Plan, Axes]]:
    """Groups that gather at once: all ranks of a server; one rank of each of two servers, neighbours and far ones."""
    servers = world // local
    if local > 1:
        yield "links within a server", Plan(tp=local, dp_replicate=servers), ("tp",)
    if servers % 2 == 0:
        yield "links between servers", Plan(tp=local, cp=2, dp_replicate=servers // 2), ("cp",)
        if servers > 2:  # a slow server is in a slow pair both times
            far = Plan(tp=local, cp=2, dp_replicate=servers // 2, order=("tp", "dp_replicate", "cp", "dp_shard"))
            yield "links between far servers", far, ("cp",)
    elif servers > 1:
        yield "links between servers", Plan(tp=local, dp_replicate=servers), ("dp_replicate",)


def _gathers(device: str, cluster: Cluster | None, what: str, plan: Plan, axes: Axes) -> TakenTimes:
    """Of one of :func:`link_plans`."""
    kind, mesh = "cpu" if device == "cpu" else "cuda", Mesh(plan)
    size, ranks, world = GATHERED_BYTES[kind], plan.size(axes[0]), plan.world_size
    part = torch.zeros(size // ranks, dtype=torch.uint8, device=device)
    whole = torch.zeros(part.numel() * ranks, dtype=torch.uint8, device=device)
    collective = Communicator(mesh).bind("all_gather", axes, part, whole, None)

    def work() -> None:
        collective.issue()
        collective.wait()

    everyones: Any = gather_objects(_fastest(work, device))
    mesh.close()
    groups = {tuple(group_ranks(plan, axes, rank)) for rank in range(world)}
    price = None
    if cluster is not None and cluster.device == kind and cluster.gpus >= world:
        apart = 1 if axes == ("tp",) else cluster.gpus_per_server
        price = Network(cluster).collective("all_gather", size, ring_group(cluster, ranks, apart)).seconds
    remedy = "see to the link, its cable or switch, and what else it carries"
    return TakenTimes(what, remedy, {group: max(everyones[r] for r in group) for group in sorted(groups)}, price)


def slow(times: TakenTimes, kind: str, hosts: Sequence[str]) -> Check:
    """Who takes longer than the others, with the hosts; or all longer than the cluster file says."""
    usual = statistics.median_low(times.seconds.values())
    late = {who: seconds for who, seconds in times.seconds.items() if seconds > SLOWER[kind] * usual}
    if late:
        said = ", ".join(
            f"{'ranks' if len(who) > 1 else 'rank'} {ranks_text(who)} on "
            f"{', '.join(dict.fromkeys(hosts[rank] for rank in who))}: {1e3 * seconds:.3g} ms"
            for who, seconds in late.items()
        )
        return Check(times.what, "fault", f"{said}, where {1e3 * usual:.3g} ms are usual", times.remedy)
    told = f"{1e3 * usual:.3g} ms"
    if times.price_s is None:
        return Check(times.what, "ok", f"{told}, none {SLOWER[kind]:g} times as long")
    told += f", the cluster file says {1e3 * times.price_s:.3g} ms"
    if usual > PRICED * times.price_s:
        return Check(times.what, "warning", told, "this is another machine, or all of it is slow: cinemesh calibrate")
    return Check(times.what, "ok", told)
