"""Prices of collectives: NCCL's own table, held-out measurements, placement, and properties that must hold."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemesh.errors import CinemeshError
from cinemesh.parallel.ir.fields import AXES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import Space
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.host import copy_cost
from cinemesh.perf_model.prices.network import FREE, KINDS, Candidate, Group, Network, group_of, groups_of, ring_group

DATA = Path(__file__).parent / "data"
H100 = load("dgx-h100-ib400")
TETON = load("grand-teton-h100")
# The formula alone: no switches, no corrections, as in NCCL's log.
BARE = H100.with_(**{"topology.switch_latency_s": 0.0, "nccl.correction": ""})
NETWORK = Network(H100)
KIND = st.sampled_from(KINDS)
MIB = 2**20


def candidate(kind: str, group: Group, algorithm: str, protocol: str) -> Candidate:
    found = Network(BARE).candidates(kind, group)
    return next(c for c in found if (c.algorithm, c.protocol) == (algorithm, protocol))


# ranks, distance of neighbours, algorithm, protocol, latency us, GB/s: NCCL 2.27.5's tuning log of H100 servers with
# 8 x 400 Gb/s (8, 64 and 16 ranks), and the same formula beyond.
ALL_GATHER = [
    (8, 1, "Ring", "LL", 10.8, 161),
    (8, 1, "Ring", "LL128", 27.3, 378),
    (8, 1, "Ring", "Simple", 32.2, 411),
    (8, 1, "NVLS", "Simple", 25, 208),
    (64, 1, "Ring", "LL", 81.5, 20.7),
    (64, 1, "Ring", "LL128", 148, 298),
    (64, 1, "Ring", "Simple", 297, 390),
    (1024, 1, "Ring", "LL", 1246, 20.4),
    (1024, 1, "Ring", "LL128", 2224, 294),
    (1024, 1, "Ring", "Simple", 4833, 384),
    (6144, 1, "Ring", "LL", 7454, 20.4),
    (6144, 1, "Ring", "LL128", 13296, 294),
    (6144, 1, "Ring", "Simple", 29025, 384),
    (128, 8, "Ring", "LL", 642, 20.6),
    (128, 8, "Ring", "LL128", 1094, 44),
    (128, 8, "Ring", "Simple", 1786, 48),
    (128, 8, "PAT", "Simple", 394, 36),
    (768, 8, "Ring", "LL128", 6534, 44),
    (768, 8, "PAT", "Simple", 2194, 36),
]


@pytest.mark.parametrize(("ranks", "stride", "algorithm", "protocol", "us", "rate"), ALL_GATHER)
def test_the_tuner_s_own_numbers(
    ranks: int, stride: int, algorithm: str, protocol: str, us: float, rate: float
) -> None:
    found = candidate("all_gather", ring_group(BARE, ranks, stride), algorithm, protocol)
    assert found.latency_s * 1e6 == pytest.approx(us, rel=0.01)
    assert found.bytes_per_s / 1e9 == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(
    ("ranks", "algorithm", "us", "rate"),
    [
        (8, "NVLS", 25, 272),
        (8, "Ring", 56, 206),
        (64, "NVLSTree", 150, 185),
        (64, "Ring", 1.4 * 585, 195),
        (1024, "NVLSTree", 318, 182),
        (1024, "Ring", 1.4 * 9660, 192),
        (6144, "NVLSTree", 401, 182),
        (6144, "Ring", 1.4 * 58050, 192),
    ],
)
def test_the_tuner_s_all_reduce(ranks: int, algorithm: str, us: float, rate: float) -> None:
    """A ring over several servers pays 1.4 times its latency on large buffers (the tuner's plateau)."""
    found = candidate("all_reduce", ring_group(BARE, ranks), algorithm, "Simple")
    assert found.latency_s * 1e6 == pytest.approx(us, rel=0.02)
    assert found.bytes_per_s / 1e9 == pytest.approx(rate, rel=0.02)


def test_a_flat_ring_over_thousands_pays_before_the_first_byte() -> None:
    """Why a shard group should be smaller: a model linear in bytes cannot see it."""
    size = 1187 * MIB  # one block of the 30B in bf16
    flat = NETWORK.collective("all_gather", size, ring_group(H100, 4096))
    shard = NETWORK.collective("all_gather", size, ring_group(H100, 64))
    assert flat.latency_s > 8e-3 and flat.seconds > 3 * shard.seconds
    assert flat.algorithm == "Ring" and flat.link == "nic"


@pytest.mark.parametrize(("kind", "limit"), [("all_gather", 0.07), ("reduce_scatter", 0.07), ("all_reduce", 0.12)])
def test_collectives_in_a_server_are_those_measured(kind: str, limit: float) -> None:
    """Sizes that are not on the shipped grid: mean error below, within and above 1 to 16 MiB."""
    errors: dict[str, list[float]] = {"small": [], "middle": [], "large": []}
    with open(DATA / "h100_nccl.csv", newline="") as file:
        for row in csv.reader([line for line in file if not line.startswith("#")][1:]):
            if row[0] == kind:
                size = int(row[2])
                price = NETWORK.collective(kind, size, ring_group(H100, int(row[1]))).seconds * 1e6
                name = "small" if size < MIB else "middle" if size < 16 * MIB else "large"
                errors[name].append(abs(price / float(row[3]) - 1))
    for name, found in errors.items():
        assert found and fmean(found) <= limit, name


@pytest.mark.parametrize(
    ("kind", "ranks", "size", "rate"),
    [
        ("all_gather", 256, 2 << 30, 200),  # NVIDIA/nccl issue 1218
        ("all_reduce", 256, 2 << 30, 340),
        ("all_reduce", 32, 4 << 30, 365),  # stas00/ml-engineering, H200
        ("all_reduce", 1024, 1 << 30, 305),  # arXiv 2411.13055 and NVIDIA's NVLSTree figure, by eye
    ],
)
def test_several_servers(kind: str, ranks: int, size: int, rate: float) -> None:
    """Bus bandwidth in GB/s over several H100 servers with 8 x 400 Gb/s."""
    seconds = NETWORK.collective(kind, size, ring_group(H100, ranks)).seconds
    bus = size / seconds * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1) / 1e9
    assert bus == pytest.approx(rate, rel=0.20)


def test_a100_servers() -> None:
    """Azure's ND A100 v4, 2 servers of 8 with 8 x 200 Gb/s: all-reduce of 64 MiB to 8 GiB."""
    a100 = load("dgx-a100-hdr200")
    network = Network(a100)
    for mib, us in ((64, 932.6), (128, 1672.7), (256, 3013.5), (512, 5702), (1024, 11063), (8192, 85129)):
        price = network.collective("all_reduce", mib * MIB, ring_group(a100, 16)).seconds * 1e6
        assert price == pytest.approx(us, rel=0.25), mib


# -- placement --------------------------------------------------------------------------------------------------------


def test_groups_follow_the_rank_order() -> None:
    plan = Plan(tp=4, cp=2, dp_shard=16, dp_replicate=6)
    tp, cp = group_of(TETON, plan, ("tp",)), group_of(TETON, plan, ("cp",))
    assert (tp.ranks, tp.per_domain, tp.domains, tp.leaves) == (4, 4, 1, 1)
    assert (cp.ranks, cp.per_domain, cp.domains) == (2, 2, 1)
    shard = group_of(TETON, plan, ("dp_shard", "cp"))
    assert (shard.ranks, shard.per_domain, shard.domains, shard.leaves) == (32, 2, 16, 8)
    assert shard.nics == 2.0  # its ring enters and leaves a server by the NICs of its two members
    replicate = group_of(TETON, plan, ("dp_replicate",))
    assert (replicate.ranks, replicate.per_domain, replicate.domains, replicate.nics) == (6, 1, 6, 1.0)
    swapped = Plan(tp=4, cp=2, dp_shard=16, dp_replicate=6, order=("dp_shard", "tp", "cp", "dp_replicate"))
    assert group_of(TETON, swapped, ("tp",)).domains == 4


@given(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.sets(st.sampled_from(AXES)), st.permutations(AXES))
def test_groups_are_those_of_the_ranks(sizes: list[int], axes: set[str], order: list[str]) -> None:
    """Against enumeration of every rank, for sizes that do not divide a server too."""
    tp, cp, dp_shard, dp_replicate = sizes
    plan = Plan(tp, cp, dp_shard, dp_replicate, order=tuple(order))
    group = group_of(TETON, plan, tuple(axes))
    first = every_group(plan, axes)[0]
    assert group.ranks == len(first)
    assert (group.domains, group.nics) == worst_of(plan, axes, 8)
    assert group.leaves == len({m // 16 for m in first})
    assert group.pods == len({m // 3072 for m in first})


def every_group(plan: Plan, axes: set[str]) -> list[list[int]]:
    """Ranks of all groups along axes, that of rank 0 first."""
    members, firsts, stride = [0], [0], 1
    for axis in plan.order:
        steps = [i * stride for i in range(plan.size(axis))]
        if axis in axes:
            members = [member + step for member in members for step in steps]
        else:
            firsts = [first + step for step in steps for first in firsts]
        stride *= plan.size(axis)
    return [[first + member for member in members] for first in firsts]


def worst_of(plan: Plan, axes: set[str], width: int) -> tuple[int, int]:
    """Domains of a group, and its members in the one where it has the fewest: the group that has the fewest."""
    found = []
    for group in every_group(plan, axes):
        counts = [len([*ranks]) for _, ranks in itertools.groupby(sorted(rank // width for rank in group))]
        found.append((len(counts), min(counts)))
    return max(found, key=lambda spread: (spread[0] > 1, -spread[1], spread[0]))


def test_a_rack_is_one_nvlink_domain() -> None:
    """72 GPUs in 18 trays of 4: what stays in a rack never meets a NIC, and a group that leaves it has its own NICs."""
    rack = load("gb200-nvl72-ib400")
    plan = Plan(tp=8, cp=9, dp_shard=4)
    assert group_of(rack, plan, ("tp", "cp")) == Group(72, 72, 1, 1, 1, 72.0)
    assert Network(rack).collective("all_gather", 1 << 30, group_of(rack, plan, ("tp", "cp"))).link == "nvlink"
    shard = group_of(rack, plan, ("dp_shard",))
    assert (shard.per_domain, shard.domains, shard.nics) == (1, 4, 1.0)
    assert group_of(rack, plan, ("dp_shard", "cp")).nics == 9.0


@pytest.mark.parametrize(
    ("plan", "axes", "domains", "nics"),
    [
        (Plan(tp=16, dp_shard=72), ("tp",), 2, 8.0),  # rank 0's lies in one rack, that of ranks 64 to 79 in two
        (Plan(tp=4, dp_shard=256), ("dp_shard",), 15, 4.0),  # 16 GPUs of the last rack
        (Plan(tp=4, cp=2, dp_shard=9), ("tp", "cp"), 1, 8.0),
        (Plan(tp=32, dp_shard=9), ("tp",), 2, 8.0),
    ],
)
def test_of_all_groups_the_worst_is_priced(plan: Plan, axes: tuple[str, ...], domains: int, nics: float) -> None:
    """Only here: a price of rank 0's group where others lie worse, as where tp 16 meets racks of 72."""
    group = group_of(load("gb200-nvl72-ib400"), plan, axes)
    assert (group.domains, group.nics) == (domains, nics) == worst_of(plan, {*axes}, 72)


def test_copies_to_and_from_the_host() -> None:
    """Each way at its own rate; on x86 over the bus of the NIC, on a Grace over a link of its own; refused unknown."""
    for name, out_s, back_s, link in (
        ("grand-teton-h100", 1 / 52.8, 1 / 55.6, "nic"),
        ("gb200-nvl72-ib400", 1 / 148, 1 / 187, "to_host"),
    ):
        out, back = (copy_cost(load(name), to, 10**9) for to in (Space.HOST, Space.DEVICE))
        assert (out.transfer_s, back.transfer_s) == pytest.approx((out_s, back_s))
        assert (out.link, out.sms, out.latency_s) == (link, 0, pytest.approx(10e-6))
        assert out.memory_bytes_per_s == pytest.approx(1e9 / out_s)
    with pytest.raises(CinemeshError, match="cluster grand-teton-h100 says nothing of its host's memory"):
        copy_cost(replace(load("grand-teton-h100"), host=None), Space.HOST, 1)
    assert copy_cost(load("local-cpu"), Space.HOST, 1).sms == 1, "the core that copies computes nothing meanwhile"


def test_half_the_nics_halve_the_rate() -> None:
    """vTrain's servers have four NICs for eight GPUs: a ring of one rank a server shares its NIC."""
    few = H100.with_(**{"topology.nics_per_server": 4})
    assert ring_group(few, 8, 8).nics == 0.5
    size = 512 * MIB
    slow = Network(few).collective("all_gather", size, ring_group(few, 8, 8)).transfer_s
    assert slow == pytest.approx(2 * NETWORK.collective("all_gather", size, ring_group(H100, 8, 8)).transfer_s)


def test_between_pods_links_are_shared() -> None:
    """A group that crosses pods at every step has a seventh of its NICs; one that crosses once keeps them."""
    network = Network(TETON)
    contiguous, spread = ring_group(TETON, 6144), ring_group(TETON, 2, 3072)
    assert (contiguous.pods, spread.pods) == (2, 2)
    assert network.network_bytes_per_s(contiguous) == 8 * 50e9
    assert network.network_bytes_per_s(spread) == pytest.approx(50e9 / 7)


def test_a_shift_leaves_a_server_by_one_nic() -> None:
    """Ring attention over two servers: one rank of each sends to the other server, at the rate of its own NIC."""
    size = 1 << 30
    far = NETWORK.collective("send_recv", size, ring_group(H100, 16))
    assert 40e9 < size / far.transfer_s < 50e9 and far.link == "nic"
    near = NETWORK.collective("send_recv", size, ring_group(H100, 8))
    assert 300e9 < size / near.transfer_s < 400e9 and near.link == "nvlink"


# -- switches of the library ------------------------------------------------------------------------------------------


def test_without_nvls() -> None:
    size = 256 * MIB
    group = ring_group(H100, 8)
    on, off = (
        NETWORK.collective("all_reduce", size, group),
        Network(H100, nvls=False).collective("all_reduce", size, group),
    )
    assert (on.algorithm, off.algorithm) == ("NVLS", "Ring")
    assert off.seconds > on.seconds and off.sms > on.sms
    gather = Network(H100, nvls=False).collective("all_gather", size, group)
    assert gather == NETWORK.collective("all_gather", size, group)


def test_gloo_is_priced_as_it_is_driven() -> None:
    """A reduce-scatter is an all-to-all and a sum; across servers the slow link decides."""
    local = load("local-cpu")
    assert local.gloo is not None
    network, group = Network(local), ring_group(local, 4)
    scatter = network.collective("reduce_scatter", MIB, group)
    exchange = network.collective("all_to_all", MIB, group)
    assert scatter.seconds == pytest.approx(exchange.seconds + MIB / local.gloo.sum_bytes_per_s)
    box = local.with_(**{"topology.gpus_per_server": 2, "topology.servers": 2, "topology.nic_bytes_per_s": 25e6})
    far = Network(box).collective("all_gather", MIB, ring_group(box, 4))
    assert far.link == "nic" and far.transfer_s == pytest.approx(0.75 * MIB / 25e6)
    # The cores copy: all of them inside a server; behind a slow link they wait, and may compute.
    near = network.collective("all_gather", MIB, group)
    assert scatter.sms == near.sms == local.gpu.sms and near.memory_bytes_per_s == local.gpu.memory_bytes_per_s
    copying = 3 * local.gloo.message_s["all_gather"] + 0.75 * MIB / local.gloo.bytes_per_s["all_gather"]
    assert far.sms == pytest.approx(copying / far.seconds * local.gpu.sms) and far.sms < 0.2


# -- thread blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "own"),
    [
        ("all_gather", 4, 1, 24),  # rings on NVLink: 12 search channels, doubled
        ("all_reduce", 8, 1, 16),  # NVLS
        ("reduce_scatter", 64, 1, 16),  # eight NICs a server: a search channel each
        ("all_gather", 64, 8, 4),  # one NIC: NCCL takes four blocks "to reach peak BW" (connect.cc)
    ],
)
def test_fewer_thread_blocks_carry_their_share(kind: str, ranks: int, stride: int, own: int) -> None:
    """Exactly: the rate falls with the blocks, the latency stays, and as many SMs are held as there are blocks."""
    group, size = ring_group(H100, ranks, stride), 256 * MIB
    free = NETWORK.collective(kind, size, group)
    assert free.sms == own
    half = NETWORK.collective(kind, size, group, own // 2)
    assert (half.latency_s, half.transfer_s, half.sms) == (free.latency_s, 2.0 * free.transfer_s, own // 2)
    one = NETWORK.collective(kind, size, group, 1)
    assert one.transfer_s == pytest.approx(own * free.transfer_s) and one.sms == 1
    assert one.memory_bytes_per_s == pytest.approx(free.memory_bytes_per_s / own)
    assert (one.algorithm, one.protocol) == (free.algorithm, free.protocol)  # the tuner does not hear of it
    more = NETWORK.collective(kind, size, group, 2 * own)
    assert (more.seconds, more.sms) == (free.seconds, 2 * own)


def test_gloo_has_no_thread_blocks() -> None:
    local = load("local-cpu")
    group = ring_group(local, 4)
    assert Network(local).collective("all_gather", MIB, group, 1) == Network(local).collective("all_gather", MIB, group)


@given(
    st.sampled_from(("all_gather", "reduce_scatter", "all_reduce")),
    st.sampled_from([2, 4, 8, 64, 512, 6144]),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 1 << 34),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_more_thread_blocks_are_never_slower(kind: str, n: int, stride: int, size: int, a: int, b: int) -> None:
    group = ring_group(TETON, n, stride)
    network = Network(TETON)
    few, many = (network.collective(kind, size, group, ctas) for ctas in sorted((a, b)))
    assert many.seconds <= few.seconds
    free = network.collective(kind, size, group)
    assert few.seconds >= free.seconds and few.latency_s == free.latency_s
    if min(a, b) >= free.sms:
        assert few.seconds == free.seconds


# -- properties -------------------------------------------------------------------------------------------------------

ranks = st.sampled_from([2, 3, 4, 6, 8, 16, 48, 64, 512, 1024, 6144])
strides = st.sampled_from([1, 2, 4, 8])


@given(KIND, st.integers(1, 1 << 34))
def test_a_group_of_one_costs_nothing(kind: str, size: int) -> None:
    assert NETWORK.collective(kind, size, ring_group(H100, 1)) == FREE
    assert FREE.seconds == 0.0


@given(KIND, ranks, strides, st.booleans(), st.integers(1, 1 << 34), st.floats(1.0, 4.0))
def test_more_bytes_never_faster(kind: str, n: int, stride: int, nvls: bool, size: int, factor: float) -> None:
    network, group = Network(TETON, nvls=nvls), ring_group(TETON, n, stride)
    less, more = (network.collective(kind, s, group).seconds for s in (size, int(size * factor)))
    assert less <= more * (1 + 1e-9)


@given(KIND, ranks, strides, st.integers(1, 1 << 34), st.floats(1.0, 8.0))
def test_more_bandwidth_never_slower(kind: str, n: int, stride: int, size: int, scale: float) -> None:
    group = ring_group(TETON, n, stride)
    before = Network(TETON).collective(kind, size, group).seconds
    for changed in (TETON.with_(nic_scale=scale), TETON.with_(nvlink_scale=scale)):
        assert Network(changed).collective(kind, size, group).seconds <= before * (1 + 1e-9)


@given(KIND, ranks, strides, st.integers(1, 1 << 34))
def test_a_cost_is_whole(kind: str, n: int, stride: int, size: int) -> None:
    cost = NETWORK.collective(kind, size, ring_group(H100, n, stride))
    assert cost.latency_s > 0 and cost.transfer_s > 0
    assert 0 < cost.sms <= 32 and 0 < cost.memory_bytes_per_s <= H100.gpu.memory_bytes_per_s


@pytest.mark.parametrize("degrees", [(2, 6, 16, 2), (3, 4, 8, 4), (6, 8, 3, 8), (12, 2, 64, 1), (1, 24, 8, 6)])
def test_groups_touch_the_blocks_that_their_ranks_lie_in(degrees: tuple[int, int, int, int]) -> None:
    """Only here: a count of blocks that is wrong where axes and blocks do not nest."""
    plan = Plan(**dict(zip(AXES, degrees, strict=True)))
    topology = TETON.topology
    for order in itertools.permutations(AXES):
        for axes, group in groups_of(plan, TETON, order).items():
            placed = replace(plan, order=order)
            ranks = every_group(placed, {*axes})[0]
            servers = {rank // topology.gpus_per_server for rank in ranks}
            assert group.ranks == len(ranks)
            assert (group.domains, group.nics) == worst_of(placed, {*axes}, topology.gpus_per_server)
            assert group.leaves == len({server // topology.servers_per_leaf for server in servers})
            assert group.pods == len({server // topology.servers_per_pod for server in servers})
