"""What is wrong with a machine, by what it is: each rule with its number (torch-free)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...perf_model.clusters.cluster import Cluster
from ..jobs.job import FILES_BESIDE, SHM_BYTES
from ..options import Device

if TYPE_CHECKING:
    from .facts import MachineFacts

CheckVerdict = Literal["ok", "warning", "fault"]
SHM_NAME = "/dev/shm"  # nosec B108  named, not written
SHM_LEAST = 2**24  # free of /dev/shm, on CPUs too: below, it is full
DISK_LEAST = 1e9  # free where runs write: below, a run ends at its first checkpoint
CLOCK_MOST_S = 1.0  # between two clocks: logs and time limits of one job are told apart by seconds
OCCUPIED = 0.1  # of a GPU's memory: so much more is a process left behind
CAP_LEAST = 0.99  # of the usual power cap


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what there is to do about it."""

    name: str
    verdict: CheckVerdict
    said: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a job needs. ``files``: a process may have to open; ``cluster``: whose GPUs and NICs these should be."""

    device: Device
    ranks_of_a_node: int
    files: int = FILES_BESIDE
    cluster: Cluster | None = None


def check(facts: MachineFacts, wanted: Wanted) -> list[Check]:
    """Everything that one machine tells of itself."""
    gpus = wanted.device == "cuda" or (wanted.device == "auto" and bool(facts.cards))
    rules: list[Callable[[MachineFacts, Wanted], Iterator[Check]]] = [_software, _room, _files, _clock, _disk]
    if gpus:
        rules[1:1] = [_count, _health, _clocks, _links, _peers, _ports]
    else:
        rules.insert(1, _none)
    return [found for rule in rules for found in rule(facts, wanted)]


def fit(checks: Sequence[Check]) -> bool:
    """Whether nothing is at fault."""
    return all(one.verdict != "fault" for one in checks)


def _software(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    yield Check("software", "ok", ", ".join(f"{name} {of}" for name, of in facts.software.items()))
    if facts.overlap_lost:
        yield Check("overlap", "warning", facts.overlap_lost, "install a newer NCCL or driver")


def _none(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    why = facts.no_cards or "the job computes on the CPU"
    yield Check("GPUs", "ok", f"none is looked at: {why}; {facts.cores} CPU cores")


def _count(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    names = sorted({card.name for card in facts.cards})
    said = f"{len(facts.cards)} x {', '.join(names)}" if names else facts.no_cards
    if len(facts.cards) < wanted.ranks_of_a_node:
        yield Check("GPUs", "fault", f"{said}: {wanted.ranks_of_a_node} are needed", "see to driver and cards")
    elif len(names) > 1:
        yield Check("GPUs", "fault", f"{said}: the slowest sets the pace", "take the node out")
    else:
        yield Check("GPUs", "ok", said)


def _health(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    errors = [f"GPU {card.index}: {card.ecc_errors}" for card in facts.cards if card.ecc_errors]
    failed = [f"GPU {card.index}" for card in facts.cards if card.rows_failed]
    told = [card for card in facts.cards if card.ecc_on is not None]
    off = [f"GPU {card.index}" for card in told if not card.ecc_on]
    if errors:
        yield Check("ECC", "fault", f"uncorrected errors: {', '.join(errors)}", "reset the GPU, or have it replaced")
    elif failed:
        yield Check("ECC", "fault", f"rows to be replaced: {', '.join(failed)}", "reset the GPU, or have it replaced")
    elif off:
        yield Check("ECC", "warning", f"off on {', '.join(off)}: a flipped bit goes unseen", "nvidia-smi -e 1")
    elif told:
        yield Check("ECC", "ok", "on, no uncorrected error")
    else:
        yield Check("ECC", "ok", "not told")
    held = [card for card in facts.cards if card.used_bytes > OCCUPIED * card.memory_bytes]
    if held:
        said = ", ".join(f"{card.used_bytes / 1e9:.1f} GB of GPU {card.index}" for card in held)
        yield Check("memory", "fault", f"other processes hold {said}", "end them: nvidia-smi names them")


def _clocks(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    slowed = [f"GPU {card.index}: {', '.join(card.slowed)}" for card in facts.cards if card.slowed]
    capped = [
        f"GPU {card.index}: {card.power_cap_w:.0f} of {card.usual_cap_w:.0f} W"
        for card in facts.cards
        if card.power_cap_w is not None
        and card.usual_cap_w is not None
        and card.power_cap_w < CAP_LEAST * card.usual_cap_w
    ]
    if slowed:
        yield Check("clocks", "fault", f"held down by {'; '.join(slowed)}", "see to cooling and power")
    else:
        most = sorted({card.most_clock_mhz for card in facts.cards if card.most_clock_mhz is not None})
        hottest = max((card.temperature_c for card in facts.cards if card.temperature_c is not None), default=None)
        heat = "" if hottest is None else f", at most {hottest} C now"
        yield Check("clocks", "ok", f"up to {', '.join(map(str, most)) or 'an untold number of'} MHz{heat}")
    caps = sorted({card.power_cap_w for card in facts.cards if card.power_cap_w is not None})
    if capped:
        yield Check("power cap", "warning", f"below the usual: {', '.join(capped)}", "nvidia-smi -pl")
    elif len(caps) > 1:
        yield Check("power cap", "warning", f"{', '.join(f'{cap:.0f}' for cap in caps)} W: the lowest sets the pace")
    elif caps:
        yield Check("power cap", "ok", f"{caps[0]:.0f} W")


def _links(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    told = [card for card in facts.cards if card.links is not None]
    down = [f"GPU {c.index}: {c.links[0]} of {c.links[1]}" for c in told if c.links and 0 < c.links[0] < c.links[1]]
    if down:
        yield Check("NVLink", "fault", f"links up: {', '.join(down)}", "reset the GPUs, or have the server repaired")
    elif told and told[0].links is not None:
        yield Check("NVLink", "ok", f"{told[0].links[0]} links up a GPU")
    else:
        yield Check("NVLink", "ok", "none is told of")


def _peers(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    if facts.strangers:
        remedy = "NCCL copies through host memory: see to IOMMU and ACS"
        yield Check("peer access", "warning", f"none between GPUs {', '.join(facts.strangers)}", remedy)
    elif len(facts.cards) > 1:
        yield Check("peer access", "ok", "between all GPUs")


def _ports(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    up = [name for name, state in facts.ports.items() if state == "ACTIVE"]
    down = [f"{name} {state}" for name, state in facts.ports.items() if state != "ACTIVE"]
    needed = wanted.cluster.topology.nics_per_server if wanted.cluster is not None else 0
    several = wanted.cluster is not None and wanted.cluster.topology.servers > 1
    said = f"{len(up)} ports up" + (f", down: {', '.join(down)}" if down else "")
    if several and len(up) < needed:
        yield Check("NICs", "fault", f"{said}: {needed} are needed", "see to cables and subnet manager")
    elif down:
        yield Check("NICs", "warning", said, "see to cables, where these are of the fast network")
    else:
        yield Check("NICs", "ok", said if facts.ports else "no InfiniBand or RoCE adapter")


def _room(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    least = wanted.ranks_of_a_node * SHM_BYTES if facts.cards and wanted.device != "cpu" else SHM_LEAST
    if facts.shm_bytes < least:
        free = "is not there" if facts.shm_bytes < 0 else f"has {facts.shm_bytes / 2**20:,.0f} MiB free"
        remedy = "remove what jobs have left there; of a container: --shm-size, or a volume of medium Memory"
        yield Check(SHM_NAME, "fault", f"{free}, {least / 2**20:,.0f} MiB are needed", remedy)
    else:
        yield Check(SHM_NAME, "ok", f"{facts.shm_bytes / 1e9:.1f} GB free")
    yield Check("host memory", "ok", f"{facts.memory_bytes / 1e9:.1f} GB to be had")


def _files(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    if 0 <= facts.open_files < wanted.files:
        said = f"a process may open {facts.open_files:,}, {wanted.files:,} are needed"
        yield Check("open files", "fault", said, 'ulimit -S -n "$(ulimit -H -n)", or raise it in limits.conf')
    else:
        yield Check("open files", "ok", f"a process may open {facts.open_files:,}")


def _clock(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    if facts.clock_ahead_s is None:
        return
    if abs(facts.clock_ahead_s) > CLOCK_MOST_S:
        said = f"{facts.clock_ahead_s:+.1f} s against that of the files in {facts.directory}"
        yield Check("clock", "fault", said, "see to NTP: chronyc tracking")
    else:
        yield Check("clock", "ok", f"agrees with that of the files in {facts.directory}")


def _disk(facts: MachineFacts, wanted: Wanted) -> Iterator[Check]:
    if facts.disk_bytes < DISK_LEAST:
        free = "is not there" if facts.disk_bytes < 0 else f"has {facts.disk_bytes / 1e9:.2f} GB free"
        yield Check("disk", "fault", f"{facts.directory} {free}", "free some, or name another --directory")
    else:
        yield Check("disk", "ok", f"{facts.disk_bytes / 1e9:.1f} GB free in {facts.directory}")
