"""A run as a job of several nodes: its agents, its ranks, and where the axes of its plan lie on them (torch-free)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...documents import quoted
from ...errors import CinemeshError
from ...parallel.ir.plan import Plan
from ...parallel.ir.sockets import sockets
from ...perf_model.clusters.cluster import Cluster

TRAIN = "cinemesh.launch.train"
MOST_NAME = 40  # signs of a job's name: Kubernetes has 63 for it and what JobSet puts behind it
SHM_BYTES = 2**30  # of /dev/shm for a rank: processes of a node exchange there. Docker gives 64 MB in all
FILES_BESIDE = 512  # open files of a process that are no sockets of the job: libraries, data, logs, devices


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """A recipe's run. ``recipe``: an absolute path; ``overrides``: as ``--set`` takes them; ``directory``: to run in.

    ``plan`` is what the ranks are told to run, whatever the recipe says. ``cluster``: where it is known. ``stage``: of
    a chain, where ``recipe`` is that of all stages; they have their own plans. ``short``: minutes, for which
    nodes may idle.
    """

    name: str
    recipe: Path
    plan: Plan
    overrides: Sequence[str]
    directory: Path
    ranks_of_a_node: int
    on_gpus: bool
    cluster: Cluster | None = None
    stage: str | None = None
    short: bool = False

    @property
    def nodes(self) -> int:
        return self.plan.world_size // self.ranks_of_a_node

    def training(self, recipe: str) -> list[str]:
        """What follows ``torchrun``'s own options; ``recipe``: its path where the ranks read it."""
        sets = [word for override in self.overrides for word in ("--set", override)]
        if self.stage is not None:
            return ["-m", "cinemesh.launch", "stages", recipe, "--stage", self.stage, *sets]
        return ["-m", TRAIN, recipe, "--plan", self.plan.to_text() or "tp=1", *sets]

    @property
    def open_files(self) -> int:
        """That a process needs: rank 0's agent holds the store, to which every rank and every agent connects."""
        world = self.plan.world_size
        own = sum(row.count for row in sockets(self.plan, 0, "nccl" if self.on_gpus else "gloo"))
        return max(own, world + self.nodes) + FILES_BESIDE

    def about(self) -> list[str]:
        """In lines: what it is, then where each axis lies."""
        where = f" of {self.cluster.name}" if self.cluster is not None else ""
        many = f"{self.ranks_of_a_node} on each of {self.nodes:,} nodes" if self.nodes > 1 else "on one node"
        return [
            f"{self.stage or self.name}: {self.plan.world_size:,} ranks, {many}{where}",
            f"plan: {self.plan.to_text() or 'one rank'}",
            *placement(self),
        ]


def placement(job: ClusterJob) -> Iterator[str]:
    """A line for every axis of several ranks: how far apart neighbours on it are, and whether they share a node."""
    apart, node = 1, job.ranks_of_a_node
    for axis in job.plan.order:
        degree = job.plan.size(axis)
        if degree == 1:
            continue
        whole = apart * degree
        if node % whole == 0:
            where = "inside a node"
        elif apart % node == 0:
            where = "across nodes, one rank on each" + (f", {apart // node} nodes apart" if apart > node else "")
        else:
            where = f"across nodes, {max(1, node // apart)} ranks on each"
        yield f"{axis}({degree}): ranks {apart} apart, {where}"
        apart = whole


def make_job(
    recipe: Path,
    plan: Plan,
    overrides: Sequence[str],
    *,
    cluster: Cluster | None,
    per_node: int | None,
    on_gpus: bool,
    stage: str | None = None,
    short: bool = False,
) -> ClusterJob:
    """The job of a recipe's run, or of a stage of a chain, from the current directory.

    ``per_node``: ranks of a node; default: the GPUs of a server of the cluster. Raises CinemeshError where that does
    not divide the ranks or is not known, and for a text that no script can hold.
    """
    world = plan.world_size
    if per_node is None:
        if cluster is None:
            raise CinemeshError(
                f"{recipe}: how many ranks a node has is not said, and the recipe names no cluster",
                remedy="add --per-node 8, or --set cluster=NAME",
            )
        per_node = min(cluster.gpus_per_server, world)
    if world % per_node:
        raise CinemeshError(
            f"world size({world}) % ranks of a node({per_node}) = {world % per_node}, it must be 0",
            remedy="choose another plan, or --per-node",
            what="per_node",
            value=per_node,
        )
    directory, path = Path.cwd(), recipe.resolve()
    for what, text in (
        ("recipe", str(path)),
        ("working directory", str(directory)),
        *(("--set", override) for override in overrides),
    ):
        printable(text, what)
    return ClusterJob(
        name=job_name(path.stem),
        recipe=path,
        plan=plan,
        overrides=overrides,
        directory=directory,
        ranks_of_a_node=per_node,
        on_gpus=on_gpus,
        cluster=cluster,
        stage=stage,
        short=short,
    )


def job_name(stem: str) -> str:
    """A recipe's name as schedulers take one: small letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    return f"run-{words}"[:MOST_NAME].strip("-") if not words[:1].isalpha() else words[:MOST_NAME].strip("-")


def printable(text: str, what: str) -> str:
    """``text`` as it is. Raises CinemeshError where a sign of it could end a line of a script, or is none to print."""
    if not text.isprintable():
        raise CinemeshError(
            f"{what} {quoted(text)} holds a sign that no line of a script can hold",
            remedy="leave out line ends and control characters",
            what=what,
            value=text,
        )
    return text


def word(text: str, what: str) -> str:
    """``text`` where it is one plain word, which means itself to every scheduler. Raises CinemeshError elsewhere."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,199}", text) is None:
        raise CinemeshError(
            f"{what} is {quoted(text)}",
            remedy="it must be one word of letters, digits and . _ / : @ + -, a letter or digit first",
            what=what,
            value=text,
        )
    return text


def in_words(words: Sequence[str]) -> str:
    """Words of a bash array, each as it is; one with a comma is quoted too, or shellcheck takes it for two."""
    return " ".join(f"'{one}'" if "," in one and shlex.quote(one) == one else shlex.quote(one) for one in words)
