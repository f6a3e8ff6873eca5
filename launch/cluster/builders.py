"""Processes beside a rank that build its steps while it meets the other ranks.

A step follows from its blueprint alone, without torch and without other ranks. A rank deals its shapes out to as many
processes as its machine has cores for, itself the last of them, so that one shape is built by the rank alone. They are
forked before the rank has a process group, CUDA, or memory that a network card knows, and each sends what it has built
through a pipe. Where one ends without, the rank builds that itself, and says so.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import cast

from ...interrupt import be_deaf, deaf_children, interrupt_later
from ...model.blueprint import Blueprint, BuildSteps, PlacedStep


def shares_of(blueprints: Sequence[Blueprint], cores: int) -> list[Sequence[Blueprint]]:
    """What each process builds, at most one a core; the last of them is the rank, which begins later."""
    shares = max(1, min(len(blueprints), cores))
    return [blueprints[k::shares] for k in range(shares)]


@contextmanager
def builders(blueprints: Sequence[Blueprint], cores: int) -> Iterator[BuildSteps]:
    """Who builds these steps, and no others: processes that start at once, ``cores`` with the rank, and the rank."""
    *others, own = shares_of(blueprints, cores)
    beside: list[_Builder] = []
    try:
        with deaf_children(forked=True):
            beside += map(_Builder.started, others)
        yield _Builders(own, beside).build
    finally:
        with interrupt_later():
            for builder in beside:
                builder.close()


@dataclass(frozen=True)
class _Builders:
    own: Sequence[Blueprint]
    beside: Sequence[_Builder]

    def build(self, blueprints: Sequence[Blueprint]) -> list[PlacedStep]:
        """Every step that was dealt out, in this order. Raises CinemeshError as ``Blueprint.build``."""
        steps = {blueprint: blueprint.build() for blueprint in self.own}
        for builder in self.beside:
            steps |= builder.steps()
        assert steps.keys() == set(blueprints), "others were dealt out than are asked for"
        return [steps[blueprint] for blueprint in blueprints]


@dataclass(frozen=True)
class _Builder:
    """A process, and what it builds."""

    process: BaseProcess
    pipe: Connection
    share: Sequence[Blueprint]

    @classmethod
    def started(cls, share: Sequence[Blueprint]) -> _Builder:
        fork = multiprocessing.get_context("fork")
        ours, theirs = cast(tuple[Connection, Connection], fork.Pipe(duplex=False))
        process = fork.Process(target=_build, args=(share, theirs), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: none is needed there
            process.start()
        theirs.close()
        return cls(process, ours, share)

    def steps(self) -> dict[Blueprint, PlacedStep]:
        """What it has built; the rest, where it ended before, built here."""
        steps: dict[Blueprint, PlacedStep] = {}
        try:
            for blueprint in self.share:
                steps[blueprint] = pickle.loads(self.pipe.recv_bytes())  # nosec B301  of this rank's own child
        except (EOFError, OSError):  # it has ended, before a step or amid one
            left = [blueprint for blueprint in self.share if blueprint not in steps]
            self.process.join()
            print(f"WARNING: {self._end()}: the rank itself builds {len(left)} of its steps", file=sys.stderr)
            steps |= {blueprint: blueprint.build() for blueprint in left}
        self.close()
        return steps

    def _end(self) -> str:
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"process {self.process.pid}, which builds steps beside rank {os.environ.get('RANK', '0')}, {how}"

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _build(share: Sequence[Blueprint], pipe: Connection) -> None:
    """In a process of its own: all is built before anything is sent, since the rank may not listen yet."""
    gc.freeze()  # what the parent left to collect is the parent's
    gc.disable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    be_deaf()
    try:
        for built in [pickle.dumps(blueprint.build(), pickle.HIGHEST_PROTOCOL) for blueprint in share]:
            pipe.send_bytes(built)
    except Exception:  # noqa: BLE001  the rank finds the same where it builds that itself, and tells it
        sys.exit(1)
