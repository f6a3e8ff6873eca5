"""The one door for communication: every collective of a step is called here, and written to the ledger.

Collectives are issued asynchronously and waited for later. Gloo's own reduce-scatter costs like its all-reduce, so on
gloo it is an all-to-all into a staging buffer and a sum in rank order (deterministic).
"""

from __future__ import annotations

import ctypes
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl
from torch.distributed import _symmetric_memory as symmetric

from ...errors import CinemeshError
from ..ir.communicators import host_groups
from ..ir.layout import Axes
from ..ir.nccl_stack import OLDEST, NcclStack
from ..ir.records import lane_name
from .ledger import Entry
from .mesh import Mesh, group_ranks

# What ``torch.ops.symm_mem``'s fused_all_gather_matmul and fused_matmul_reduce_scatter are made of: unlike these, it
# writes its results where it is told to, and takes products of any form.
PIPELINES = ("_pipelined_all_gather_and_consume", "_pipelined_produce_and_all2all")

Matrices = tuple[Tensor, Tensor, Tensor]  # a, b and where a @ b goes
T = TypeVar("T")


class BoundCollective(NamedTuple):
    """One collective of a step, bound to its tensors: these belong to it from ``issue`` to ``wait``, once a step each.

    ``issue`` gives the work that is in flight, if any.
    """

    issue: Callable[[], dist.Work | None]
    wait: Callable[[], None]


def nccl_stack() -> NcclStack:
    """NCCL and the driver that this process has."""
    driver = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))  # 12090: that of CUDA 12.9
    major, minor, *_ = nccl.version()
    return NcclStack((major, minor), (driver.value // 1000, driver.value % 1000 // 10))


def set_up_nccl() -> None:
    """What NCCL reads from the environment when its first communicator is made: call it before.

    Raises CinemeshError for an NCCL under which a step's collectives may wait for each other.
    """
    if (here := nccl_stack()).nccl < OLDEST:
        raise CinemeshError(
            f"NCCL {'.'.join(map(str, here.nccl))} < {'.'.join(map(str, OLDEST))}, which keeps the order in which "
            "collectives of several communicators were issued: they may wait for each other for ever",
            remedy="use the NCCL that torch comes with, or a newer one",
        )
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" in allocator:  # their memory cannot be registered by a capture below sm_100
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


# A thread that fell asleep runs again 0.1 to 0.5 ms late, as long as a small collective takes (2 cores, 2026-11).
AWAKE_S = 1e-3


def _wait_on_stream(work: dist.Work) -> None:
    """The stream waits, the host goes on."""
    work.wait()


def _wait_awake(work: dist.Work) -> None:
    """The host waits; for ``AWAKE_S`` it lets others run, but does not fall asleep."""
    end = time.perf_counter() + AWAKE_S
    while not work.is_completed() and time.perf_counter() < end:
        os.sched_yield()
    work.wait()


def summing(staging: Tensor, output: Tensor) -> Callable[[], object]:
    """What follows gloo's all-to-all in a reduce-scatter: the sum of what was received, in rank order."""
    return partial(torch.sum, staging.view(-1, output.numel()), 0, out=output.view(-1))


class Communicator:
    """Collectives of one rank over the groups of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ledger: list[Entry] = []
        self.record = False
        self.waited_s = 0.0  # by this host, for others: of a GPU nothing, whose stream waits
        self._latest: dict[str, dist.Work] = {}  # of each communicator, until it is waited for
        self._symmetric: list[Tensor] = []

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        """One collective over ``axes`` on contiguous tensors, resolved once for all steps.

        Straight to the process group: torch's checks of arguments that never change cost as much as a small collective.
        """
        group = self.mesh.group(axes, kind)
        entry = Entry(kind, lane_name(axes), group.group_desc, max(source.nbytes, output.nbytes))
        flat_source, flat_output = source.view(-1), output.view(-1)
        if kind == "all_gather":
            start = partial(group._allgather_base, flat_output, flat_source)
        elif kind == "reduce_scatter" and staging is not None:
            start = partial(group.alltoall_base, staging.view(-1), flat_source, [], [])
        elif kind == "reduce_scatter":
            start = partial(group._reduce_scatter_base, flat_output, flat_source)
        else:
            assert kind == "all_reduce" and source.data_ptr() == output.data_ptr()
            start = partial(group.allreduce, [flat_output])
        finish = _wait_on_stream if source.is_cuda else _wait_awake
        finish_sum = None if staging is None else summing(staging, output)
        queue, latest = entry.communicator, self._latest
        flying: list[dist.Work] = []

        def issue() -> dist.Work:
            if self.record:
                self.ledger.append(entry)
            work = latest[queue] = start()
            flying.append(work)
            return work

        def wait() -> None:
            work = flying.pop()
            since = time.perf_counter()
            finish(work)
            self.waited_s += time.perf_counter() - since
            if latest.get(queue) is work:
                del latest[queue]
            if finish_sum is not None:
                finish_sum()

        return BoundCollective(issue, wait)

    def forget(self) -> None:
        """A step was broken off: nothing that it issued will be waited for."""
        self._latest.clear()

    # -- fused with products, on CUDA (on a CPU the executor runs the parts) -----------------------------------------

    def symmetric_memory(self, axes: Axes, size_bytes: int) -> Tensor:
        """Bytes of this rank that the ranks of its group read over NVLink. Collective; before any capture.

        Raises CinemeshError when the group is not within one server, or this torch has not what is called here.
        """
        for name in PIPELINES:
            if not hasattr(symmetric, name):
                raise CinemeshError(
                    f"plan: fused_tp(true): torch {torch.__version__} has no {name}, a private part of torch 2.13",
                    remedy="install that, or set fused_tp to false",
                )
        group = self.mesh.group(axes, "all_gather")
        self.check_one_server(axes)
        symmetric.get_symm_mem_workspace(group.group_name, size_bytes)
        whole = symmetric._group_name_to_workspace_tensor[group.group_name]
        assert whole is not None
        self._symmetric.append(whole)  # torch replaces it by a larger one: a captured step still has its address
        return whole[:size_bytes]

    def check_one_server(self, axes: Axes) -> None:
        """Refuse a group whose ranks lie on several servers. Collective over the job, between the hosts."""
        ranks = group_ranks(self.mesh.plan, axes, self.mesh.rank)
        everyones = gather_objects(platform.node())
        servers = [str(everyones[rank]) for rank in ranks]
        if len(set(servers)) > 1:
            raise CinemeshError(
                f"plan: fused_tp(true): ranks {', '.join(map(str, ranks))} of one {lane_name(axes)} group lie on "
                f"{len(set(servers))} servers ({', '.join(dict.fromkeys(servers))}), and torch's symmetric memory "
                "reaches over NVLink, within one",
                remedy="put tp first in order, lower tp, or set fused_tp to false",
            )

    def bind_gather_products(
        self, axes: Axes, source: Tensor, gathered: Tensor, products: Sequence[Matrices]
    ) -> Callable[[], None]:
        """A call that gathers and multiplies, one rank's rows while the next rank's come in.

        ``products`` are (all rows, weight, all rows of the result), each a matrix.
        """
        group = self.mesh.group(axes, "all_gather")
        begin = self._beginning(Entry("all_gather", lane_name(axes), group.group_desc, gathered.nbytes))
        ranks = self.mesh.plan.size(axes)
        rows = gathered.view(products[0][0].shape)
        own = source.view(rows.shape[0] // ranks, -1)
        chunks = [(weight, result.chunk(ranks)) for _, weight, result in products]

        def multiply(shard: Tensor, rank: int) -> None:
            for weight, results in chunks:
                torch.mm(shard, weight, out=results[rank])

        def run() -> None:
            begin()
            symmetric._pipelined_all_gather_and_consume(own, multiply, rows, group.group_name)

        return run

    def bind_product_scatter(
        self, axes: Axes, product: Matrices, added: Tensor | None, received: Tensor, output: Tensor
    ) -> Callable[[], None]:
        """A call that makes other ranks' rows first, each sent while the next is made, and sums what was received.

        ``added`` and ``received`` are as large as the product; the latter holds the rows of ``output`` from each rank.
        """
        group = self.mesh.group(axes, "reduce_scatter")
        begin = self._beginning(Entry("reduce_scatter", lane_name(axes), group.group_desc, received.nbytes))
        ranks = self.mesh.plan.size(axes)
        left, weight, result = product
        rows = left.chunk(ranks)
        addends = None if added is None else added.view(result.shape).chunk(ranks)
        stacked, parts, flat = received.view(result.shape), received.view(ranks, -1), output.view(-1)

        def multiply(rank: int, out: Tensor) -> None:
            if addends is None:
                torch.mm(rows[rank], weight, out=out)
            else:
                torch.addmm(addends[rank], rows[rank], weight, out=out)

        def run() -> None:
            begin()
            symmetric._pipelined_produce_and_all2all(multiply, stacked, group.group_name)
            torch.sum(parts, 0, out=flat)

        return run

    def _beginning(self, entry: Entry) -> Callable[[], None]:
        """The start rule: after the previous collective on the same communicator."""

        def begin() -> None:
            if self.record:
                self.ledger.append(entry)
            if (work := self._latest.get(entry.communicator)) is not None:
                work.wait()

        return begin


# -- between the hosts: for votes and reports, never part of a step ----------------------------------------------------
#
# Up and down a tree of small gloo groups (``host_groups``): a rank has few connections, and an answer takes few hops,
# however many ranks there are.

HAND_ON = timedelta(minutes=10)  # of ranks that meet to hand bytes on, and of each of these

_host_calls: list[int] | memoryview[int] = [0]
_trees: WeakKeyDictionary[dist.ProcessGroup, list[dist.ProcessGroup]] = WeakKeyDictionary()  # of each job


def _tree() -> list[dist.ProcessGroup]:
    """This rank's groups, that with those below it first; made when first asked for."""
    job = dist.group.WORLD
    assert isinstance(job, dist.ProcessGroup)
    if job not in _trees:
        groups: list[Any] = [  # as many on every rank: torch names a group by how many there are
            dist.new_group(ranks, backend="gloo", use_local_synchronization=True, group_desc="hosts")
            for ranks in (host_groups(job.size(), job.rank()) if job.size() > 1 else ())
        ]
        _trees[job] = sorted(groups, key=lambda group: group.rank())
    return _trees[job]


def count_host_calls(counter: list[int] | memoryview[int]) -> None:
    """Count in ``counter[0]`` from now on: one more when this rank begins a call along the tree, one when it ends."""
    global _host_calls
    _host_calls = counter


@contextmanager
def _host_call() -> Iterator[list[dist.ProcessGroup]]:
    """The groups of the tree, for one call of all ranks."""
    _host_calls[0] += 1
    yield _tree()
    _host_calls[0] += 1


def _combined(value: T, combine: Callable[[list[T]], T]) -> T:
    """On rank 0 ``combine`` of what every rank says, in the order of ranks; elsewhere of a part of them."""
    with _host_call() as groups:
        for group in groups:
            said: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
            dist.gather_object(value, said, group=group, group_dst=0)
            if said is not None:
                value = combine(said)
    return value


def _agreed(value: T, combine: Callable[[list[T]], T]) -> T:
    """``combine`` of what every rank says, on every rank: rank 0's result, the same bit by bit."""
    value = _combined(value, combine)
    with _host_call() as groups:
        for group in reversed(groups):
            box = [value]
            dist.broadcast_object_list(box, group=group, group_src=0)
            (value,) = box
    return value


def _joined(parts: list[list[T]]) -> list[T]:
    return [value for part in parts for value in part]


def first_of(value: T | None) -> T | None:
    """What the first rank that has something says, on every rank."""
    return _agreed(value, lambda said: next((one for one in said if one is not None), None))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's CPU tensor, on every rank, bit by bit the same. Cheap enough for every step."""
    total = values.clone()
    with _host_call() as groups:
        for group in groups:
            dist.reduce(total, group=group, group_dst=0)
        for group in reversed(groups):
            dist.broadcast(total, group=group, group_src=0)
    return total


def barrier() -> None:
    first_of(None)


def gather_objects(value: object) -> list[object]:
    """One object from every rank, on every rank."""
    return list(map(pickle.loads, _agreed([pickle.dumps(value)], _joined)))


def gather_at_first(value: object) -> list[object] | None:
    """One object from every rank, on rank 0; None elsewhere."""
    gathered = _combined([pickle.dumps(value)], _joined)
    return list(map(pickle.loads, gathered)) if dist.get_rank() == 0 else None


def hand_on(store: dist.Store, groups: Sequence[Sequence[int]], memory: Mapping[int, Tensor]) -> None:  # pyright: ignore[reportPrivateImportUsage]
    """Give CPU tensors [n, ...] of the first rank of each group to its others. Collective of those that are in one.

    ``memory``: this rank's, by number of its groups. The ranks of a group meet at ``store``, each at its groups in
    their order, so that none waits in a circle.
    """
    rank, held, works = dist.get_rank(), list[Any](), list[dist.Work]()
    for number, tensors in sorted(memory.items()):
        ranks = groups[number]
        meeting = dist.PrefixStore(str(number), store)  # pyright: ignore[reportPrivateImportUsage]
        group: Any = dist.ProcessGroupGloo(meeting, ranks.index(rank), len(ranks), HAND_ON)
        works += [group.broadcast(tensor, root=0) for tensor in tensors]
        held.append(group)
    works += [group.barrier() for group in held]  # nobody closes a connection that another still reads from
    for work in works:
        work.wait()
