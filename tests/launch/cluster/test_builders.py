"""Processes beside a rank: what they build is what the rank would build, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.context import ForkProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cinemesh.interrupt import Interrupted, interrupt
from cinemesh.launch.cluster.alike import program_digest
from cinemesh.launch.cluster.builders import builders
from cinemesh.model.blueprint import Blueprint, BuildSteps, PlacedStep, build_here
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import Optimizer
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Space

PLAN = Plan.parse("tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=2,grad_units=2,defer_weight_gradients=true,offload=y1")
BLUEPRINTS = [
    Blueprint(replace(preset("tiny"), layers=4), PLAN, BatchShape(2, latent), Optimizer(), 3, 0.25, "nccl", True)
    for latent in ((6, 4, 12), (4, 4, 12), (6, 8, 12), (4, 8, 12), (6, 12, 12))
]
ME = os.getpid()


def beside() -> list[BaseProcess]:
    """Processes that were forked here, and not those of the tests' own pool."""
    return [child for child in active_children() if isinstance(child, ForkProcess)]


def differences(one: PlacedStep, other: PlacedStep) -> list[str]:
    """What a rank binds of a step, wherever two of them differ."""
    found = [
        f"record {i}: {a} and {b}" for i, (a, b) in enumerate(zip(one.program.ops, other.program.ops, strict=False))
        if a != b
    ]  # fmt: skip
    names = one.program.buffers.keys() | other.program.buffers.keys()
    found += [name for name in names if one.program.buffers.get(name) != other.program.buffers.get(name)]
    for facts in (
        lambda step: (len(step.program.ops), list(step.program.buffers), step.program.plan, step.program.blocks),
        lambda step: (step.program.inputs, step.program.states, step.program.outputs),
        lambda step: (dict(step.arenas), program_digest(step.program)),
    ):
        a, b = facts(one), facts(other)
        found += [] if a == b else [f"{a} and {b}"]
    return found


@contextmanager
def in_builders(monkeypatch: pytest.MonkeyPatch, change: Callable[[PlacedStep], PlacedStep]) -> Iterator[None]:
    """Inside, processes that are forked from this one change what they build."""
    build = Blueprint.build

    def changed(self: Blueprint) -> PlacedStep:
        return build(self) if os.getpid() == ME else change(build(self))

    with monkeypatch.context() as patch:
        patch.setattr(Blueprint, "build", changed)
        yield


@pytest.mark.parametrize("cores", [2, 3, 16])
def test_builders_build_what_the_rank_would(cores: int) -> None:
    with builders(BLUEPRINTS, cores) as build:
        assert len(beside()) == min(cores, 5) - 1
        built = build(BLUEPRINTS)
        assert beside() == [], "each ends when it was heard"
    for one, other in zip(built, build_here(BLUEPRINTS), strict=True):
        assert len(one.program.ops) > 900 and one.arenas[Space.HOST].total_bytes > 0
        assert differences(one, other) == []
        for name in other.program.buffers:
            assert one.program.span(name) == other.program.span(name)
            assert one.program.bytes(name) == other.program.bytes(name)


def with_ops(step: PlacedStep, change: Callable[[Program], None]) -> PlacedStep:
    change(step.program)
    return step


def _attribute(program: Program) -> None:
    op = next(op for op in program.ops if op.kind == "velocity_loss")
    op.attrs = op.attrs | {"elements": op.attrs["elements"] + 1}


def _order(program: Program) -> None:
    program.ops[700], program.ops[701] = program.ops[701], program.ops[700]


def _offset(program: Program) -> None:
    view = next(buffer for buffer in program.buffers.values() if buffer.offset)
    view.offset += 128


@pytest.mark.parametrize("change", [_attribute, _order, _offset])
def test_a_planted_difference_is_found(monkeypatch: pytest.MonkeyPatch, change: Callable[[Program], None]) -> None:
    with in_builders(monkeypatch, lambda step: with_ops(step, change)), builders(BLUEPRINTS[:2], 2) as build:
        other, own = build(BLUEPRINTS[:2])
    wanted = build_here(BLUEPRINTS[:2])
    assert differences(own, wanted[1]) == []
    assert differences(other, wanted[0]) != []


def test_a_moved_storage_is_found() -> None:
    step = BLUEPRINTS[0].build()
    arena = step.arenas[Space.DEVICE]
    first = next(iter(arena.offsets))
    moved = replace(arena, offsets=arena.offsets | {first: arena.offsets[first] + 256})
    assert differences(replace(step, arenas={**step.arenas, Space.DEVICE: moved}), step) != []


@pytest.mark.parametrize(("shapes", "cores"), [(1, 16), (5, 1), (0, 4)])
def test_one_shape_or_one_core_starts_no_process(shapes: int, cores: int) -> None:
    with builders(BLUEPRINTS[:shapes], cores) as build:
        assert beside() == []
        assert len(build(BLUEPRINTS[:shapes])) == shapes


def test_others_than_were_dealt_out_are_a_bug() -> None:
    """Else a rank would build by itself what it believes to have been built, and nobody would know."""
    with builders(BLUEPRINTS[:2], 2) as build, pytest.raises(AssertionError, match="others were dealt out"):
        build([BLUEPRINTS[0], replace(BLUEPRINTS[1], seed=4)])
    assert beside() == []


def _die(step: PlacedStep) -> PlacedStep:
    os.kill(os.getpid(), signal.SIGKILL)
    return step


def _fail(step: PlacedStep) -> PlacedStep:
    raise RuntimeError(f"{len(step.program.ops)} records")


@pytest.mark.parametrize(("what", "how"), [(_die, "was killed by SIGKILL"), (_fail, "ended with code 1")])
def test_the_rank_builds_what_a_process_leaves(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: Callable[..., PlacedStep], how: str
) -> None:
    with in_builders(monkeypatch, what), builders(BLUEPRINTS, 2) as build:
        pid = beside()[0].pid
        built = build(BLUEPRINTS)
    assert not any(differences(*pair) for pair in zip(built, build_here(BLUEPRINTS), strict=True))
    told = capfd.readouterr().err
    assert told == (
        f"WARNING: process {pid}, which builds steps beside rank 0, {how}: the rank itself builds 3 of its steps\n"
    )


def test_a_process_that_is_killed_while_it_sends(capfd: pytest.CaptureFixture[str]) -> None:
    """The first step has begun to come: it fills the pipe."""
    with builders(BLUEPRINTS[:4], 2) as build:
        child = Path(f"/proc/{beside()[0].pid}")
        deadline = time.monotonic() + 60
        while "pipe_write" not in (child / "wchan").read_text() and not _writes(child):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int(child.name), signal.SIGKILL)
        built = build(BLUEPRINTS[:4])
    assert not any(differences(*pair) for pair in zip(built, build_here(BLUEPRINTS[:4]), strict=True))
    assert capfd.readouterr().err.count("was killed by SIGKILL: the rank itself builds 2 of its steps\n") == 1


def _writes(child: Path) -> bool:
    """Whether it waits in a call that writes."""
    return (child / "syscall").read_text().split()[0] == "1"


# -- no process is left -----------------------------------------------------------------------------------------------

RANK = """
import signal
import time
from multiprocessing import active_children
from cinemesh.interrupt import interrupted_in_a_line
from cinemesh.launch.cluster.builders import builders

class Endless:
    def build(self):
        time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
    blueprints = [Endless() for _ in range(5)]
    with interrupted_in_a_line(), builders(blueprints, 4) as build:
        print(*(child.pid for child in active_children()), flush=True)
        build(blueprints)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_builder_outlives_its_rank(number: signal.Signals) -> None:
    """Of a Ctrl-C all processes of the terminal hear; the rank alone says so."""
    said = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=said, stderr=said, text=True, process_group=0) as rank:
        assert rank.stdout is not None and rank.stderr is not None
        children = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(children) == 3 and all(map(_alive, children))
        time.sleep(0.5)  # they have begun
        if number is signal.SIGINT:
            os.killpg(rank.pid, number)
        else:
            rank.send_signal(number)
        try:
            code, told = rank.wait(20), rank.stderr.read()
        finally:
            rank.kill()
    assert (code, told) == ((130, "interrupted\n") if number is signal.SIGINT else (-number, ""))
    deadline = time.monotonic() + 5.0
    while any(map(_alive, children)):
        assert time.monotonic() < deadline, "they build on without their rank"
        time.sleep(0.05)


def test_what_fails_while_they_build_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(step: PlacedStep) -> PlacedStep:
        time.sleep(600)
        return step

    def failing(blueprints: Sequence[Blueprint], cores: int) -> BuildSteps:
        with builders(blueprints, cores):
            assert len(beside()) == 3
            interrupt(signal.SIGINT, None)
        raise AssertionError

    before = signal.getsignal(signal.SIGINT)
    try:
        with in_builders(monkeypatch, endless), pytest.raises(Interrupted):
            failing(BLUEPRINTS, 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert beside() == []
