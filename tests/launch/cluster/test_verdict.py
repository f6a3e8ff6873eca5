"""Who holds up a job, judged from where its ranks stand: the guilty is named, and no other."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cinemesh.launch.cluster.marks import CAPTURED_PROGRAM, NO_PROGRAM, Doing, Marks, Standing
from cinemesh.launch.cluster.verdict import At, Waypoint, behind, judged, shown_place, stages_of
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.layout import Axes
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.mesh import group_ranks

PLAN = Plan(tp=2, cp=2, dp_shard=2)
LIMIT_S = 60.0


def group(axes: Axes, rank: int) -> Sequence[int]:
    return group_ranks(PLAN, axes, rank)


def program_of(plan: Plan = PLAN, *, marked: bool = False, backend: str = "gloo") -> Program:
    case = small_case(plan)
    return prepare(build_step(case.config, case.plan, case.batch), backend=backend, marked=marked)


def a_step(plan: Plan = PLAN) -> list[Waypoint]:
    return stages_of(program_of(plan))


BEFORE = 1000  # records of earlier programs


def at(step: int, phase: Doing, record: int = 0, program: int = 0, host_calls: int = 8) -> At:
    return At(Standing(step, phase, 50, False, program, record, BEFORE, host_calls), 70.0, False, "node", 100)


def waits(step: int) -> At:
    """With all ranks, on what to do in a step."""
    return at(step, Doing.LOADING, 0, NO_PROGRAM, host_calls=9)


def played(
    stages: list[Waypoint],
    hung: dict[int, int],
    ranks: int,
    group: Callable[[Axes, int], Sequence[int]] = group,
) -> dict[int, At]:
    """Where all ranks end when some stop for ever before a record: the others go on until they must wait for them."""
    stands = dict.fromkeys(range(ranks), 0)
    while True:
        moved = False
        for rank in range(ranks):
            while stands[rank] < len(stages) and hung.get(rank) != stands[rank]:
                stage = stages[stands[rank]]
                if stage.issued is not None and any(stands[o] <= stage.issued for o in group(stage.axes, rank)):
                    break
                stands[rank] += 1
                moved = True
        if not moved:
            break
    end = len(stages)
    return {r: at(5, Doing.STEP, i) if i < end else replace_record(waits(6), end) for r, i in stands.items()}


def replace_record(at: At, record: int) -> At:
    """That has run so many of the program."""
    return replace(at, place=at.place._replace(program=0, record=record))


def test_wherever_one_rank_of_eight_hangs_in_a_step_it_alone_is_named() -> None:
    """At each tenth record, compute, issue or wait: played with the program's own collectives and groups."""
    stages = a_step()
    kinds = set[str]()
    for record in range(0, len(stages), 10):
        for rank in (0, 5):
            ranks = played(stages, {rank: record}, 8)
            verdict = judged(ranks, [stages], group, LIMIT_S)
            kinds.add(stages[record].kind)
            assert verdict.guilty == (rank,), (record, stages[record], verdict.text)
            place = f"rank {rank} (process 100 on node) stands in step 6, at {stages[record].name} ("
            assert verdict.text.startswith(f"no progress for 60 s: {place}{stages[record].kind}"), verdict.text
    assert {"wait", "all_gather", "matmul"} <= kinds


MARKED_PLANS = (PLAN, Plan(tp=2, cp=2, dp_shard=2, fused_tp=True), Plan(tp=2, cp=4, kv_slices=2, grad_units=2))


@pytest.mark.parametrize("plan", MARKED_PLANS, ids=Plan.to_text)
def test_wherever_one_rank_hangs_in_a_step_that_tells_by_marks_alone_it_is_named(plan: Plan) -> None:
    """Each rank's place is that behind its last mark: who waits, waits there; who is named, stands in what is named."""
    program = program_of(plan, marked=True, backend="nccl")
    stages, ops = stages_of(program), program.ops
    names = [op.name for op in ops]
    places = set[str]()

    def members(axes: Axes, rank: int) -> Sequence[int]:
        return group_ranks(plan, axes, rank)

    for hung in [i for i, op in enumerate(ops) if op.kind != "mark"][::7]:
        for rank in (0, 5):
            truth = played(stages, {rank: hung}, 8, members)
            ranks = {r: replace_record(one, told(ops, one.place.record)) for r, one in truth.items()}
            verdict = judged(ranks, [stages], members, LIMIT_S)
            assert verdict.guilty == (rank,), (hung, ops[hung], verdict.text)
            said = re.match(r".*? stands in step 6, at (\S+) \([^)]*\)(?: or behind it, up to (\S+))?", verdict.text)
            assert said is not None, verdict.text
            first, last = said[1], (said[2] or said[1]).rstrip(";")
            assert names.index(first) <= hung <= names.index(last), (names[hung], verdict.text)
            assert names.index(last) - names.index(first) < 40, "a place, not the step"
            places.add(first)
    assert len(places) > 20


def told(ops: Sequence[Op], record: int) -> int:
    """Of a rank that has run so many records, those up to its last mark."""
    return next((i + 1 for i in reversed(range(record)) if ops[i].kind == "mark"), 0)


def test_a_rank_that_waits_is_told_by_its_wait_alone() -> None:
    """Also where it, its mark and what follows it are those that the guilty one stands at."""
    stages = stages_of(program_of(marked=True))
    wait = next(i for i, stage in enumerate(stages) if stage.issued is not None and stage.up_to is not None)
    first = stages[wait]
    assert first.issued is not None
    place = at(5, Doing.ENCODING, wait).place  # a captured step: the host has gone on
    assert shown_place(place, [stages]).endswith(
        f"({first.kind} over {'*'.join(first.axes)}) or behind it, up to {first.up_to}"
    )
    ranks = {rank: at(5, Doing.ENCODING, wait) for rank in range(8)} | {3: at(5, Doing.ENCODING, 1)}
    text = judged(ranks, [stages], group, LIMIT_S).text
    assert "rank 3 (process 100 on node) stands in step 6, at weights (cast) or behind it, up to " in text
    assert (
        f"rank 0 is in step 6, at {first.name} ({first.kind} over {'*'.join(first.axes)}) and waits for rank 3" in text
    )
    begun, done = at(5, Doing.ENCODING, 0).place, at(5, Doing.ENCODING, len(stages)).place
    assert shown_place(begun, [stages]).startswith("step 6, at weights (cast) or behind it")
    assert shown_place(done, [stages]) == "step 6, behind its records, where captions are encoded"


def test_two_that_hang_are_both_named() -> None:
    stages = a_step()
    draw = random.Random(3)
    for _ in range(30):
        one, other = draw.sample(range(8), 2)
        first = draw.randrange(len(stages))
        ranks = played(stages, {one: first, other: draw.randrange(first, len(stages))}, 8)
        verdict = judged(ranks, [stages], group, LIMIT_S)
        assert one in verdict.guilty and set(verdict.guilty) <= {one, other}


@pytest.mark.parametrize("phase", [Doing.LOADING, Doing.SAVING, Doing.REPORTING, Doing.PUBLISHING, Doing.VALIDATING])
def test_a_rank_that_hangs_between_steps_is_named_by_what_it_does(phase: Doing) -> None:
    """The others are in a call of all ranks already; what each of them does there is not asked."""
    step = 5 if phase is Doing.LOADING else 4
    ranks = {rank: waits(5) for rank in range(4)} | {2: at(step, phase, 0, NO_PROGRAM)}
    verdict = judged(ranks, [a_step()], group, LIMIT_S)
    assert verdict.guilty == (2,) and verdict.step == step
    told = f"step {step + 1}, {shown_place(ranks[2].place, []).split(', ')[1]}"
    assert f"rank 2 (process 100 on node) stands in {told}; " in verdict.text
    assert "rank 0 is in step 6, loading samples and waits for rank 2" in verdict.text


def test_a_rank_one_call_of_all_ranks_behind_is_named() -> None:
    """It has not left the call before, where nobody waits any more; another is on its way to the one after it."""
    ranks = {0: waits(5), 1: at(5, Doing.LOADING, 0, NO_PROGRAM, host_calls=8), 2: waits(5)}
    assert judged(ranks, [], group, LIMIT_S).guilty == (1,)
    ranks[1] = at(5, Doing.LOADING, 0, NO_PROGRAM, host_calls=7)
    assert judged(ranks, [], group, LIMIT_S).guilty == (1,)


def test_the_second_program_of_a_step_is_no_record_of_the_first() -> None:
    """Validation runs one program many times: who waits in the third run does not take the second run for its own."""
    stages = a_step()
    wait = next(i for i, stage in enumerate(stages) if stage.issued is not None)
    other = group(stages[wait].axes, 0)[1]
    ranks = {rank: at(4, Doing.VALIDATING, wait) for rank in range(8)}
    late = at(4, Doing.VALIDATING, wait + 5)
    ranks[other] = replace(late, place=late.place._replace(before=BEFORE - len(stages)))
    assert judged(ranks, [stages], group, LIMIT_S).guilty == (other,)


def test_a_rank_that_has_ended_holds_up_nobody() -> None:
    """Rank 0 alone decodes what was sampled."""
    ranks = {rank: at(9, Doing.ENDED, 0, NO_PROGRAM) for rank in range(4)} | {0: at(2, Doing.DECODING, 0, NO_PROGRAM)}
    verdict = judged(ranks, [], group, LIMIT_S)
    assert verdict.guilty == (0,) and "rank 0 (process 100 on node) stands in clip 3, decoding clips" in verdict.text


def test_a_stopped_rank_is_named_also_where_nothing_else_tells() -> None:
    """In a captured step, or in sampling, all stand in one place."""
    for place in (at(3, Doing.STEP, 0, NO_PROGRAM), at(3, Doing.SAMPLING, 0, NO_PROGRAM)):
        ranks = dict.fromkeys(range(4), place) | {1: replace(place, stopped=True)}
        verdict = judged(ranks, [a_step()], group, LIMIT_S)
        assert verdict.guilty == (1,) and "rank 1 (process 100 on node) is stopped by a signal in " in verdict.text
    for phase in (Doing.STEP, Doing.ENCODING):  # the host has launched it, and waits for its loss in the next phase
        assert shown_place(Standing(3, phase, 0, program=CAPTURED_PROGRAM), []) == "step 4, which is captured"


@pytest.mark.parametrize("phase", Doing)
def test_whatever_a_rank_does_can_be_told(phase: Doing) -> None:
    assert shown_place(Standing(3, phase, 0), []).startswith(("step 4, ", "clip 4, "))


def test_a_rank_that_does_not_answer_is_named() -> None:
    """Its machine is gone: neither it nor its watchdog speaks."""
    ranks: dict[int, At | None] = {rank: waits(5) for rank in range(4)}
    verdict = judged(ranks | {3: None}, [a_step()], group, LIMIT_S)
    assert verdict.guilty == (3,) and "does not answer, nor its watchdog" in verdict.text
    ranks |= {3: None, 2: None}
    verdict = judged(ranks, [a_step()], group, LIMIT_S, {2: "node-1 (node 1)", 3: "node-1 (node 1)"})
    assert "ranks 2, 3 of node-1 (node 1) do not answer, nor their watchdogs" in verdict.text
    assert verdict.guilty == (2, 3) and verdict.text.count("rank 0") == 1


def test_where_all_have_come_and_none_goes_on_it_is_the_link_between_them() -> None:
    stages = a_step()
    wait = next(i for i, stage in enumerate(stages) if stage.kind == "wait")
    members = set(group(stages[wait].axes, 0))
    ranks = {rank: at(5, Doing.STEP, wait) for rank in range(8)}
    verdict = judged(ranks, [stages], group, LIMIT_S)
    assert set(verdict.guilty) == set(range(8)) >= members and "no rank can be told from the others" in verdict.text


def test_who_makes_progress_is_not_named() -> None:
    """A rank on its way to the others, seen in the middle of it."""
    stages = a_step()
    ranks = played(stages, {6: 40}, 8)
    free = next(i for i, stage in enumerate(stages) if stage.issued is None and i > 10)
    ranks[7] = replace(at(5, Doing.STEP, free), silent_s=0.1)
    assert judged(ranks, [stages], group, LIMIT_S).guilty == (6,)


def test_many_ranks_are_counted() -> None:
    ranks = {rank: waits(5) for rank in range(40)} | {r: at(5, Doing.LOADING, 0, NO_PROGRAM) for r in range(10)}
    text = judged(ranks, [], group, LIMIT_S).text
    assert "6 more ranks there" in text and "26 more ranks wait" in text and text.count("rank ") == 8
    assert "waits for ranks 0 to 9" in text


def test_a_wait_knows_where_its_collective_was_issued() -> None:
    """Two communicators in flight: of each wait, the one it is for."""
    stages = a_step()
    waits = [(i, stage) for i, stage in enumerate(stages) if stage.kind == "wait"]
    issued = [stage.issued for _, stage in waits if stage.issued is not None]
    assert len(issued) == len(waits) == len(set(issued)) > 20
    for at_record, stage in waits:
        assert stage.issued is not None and stage.issued < at_record
        assert stages[stage.issued].axes == stage.axes and stages[stage.issued].kind in COLLECTIVES
    assert any(a > b for a, b in itertools.pairwise(issued)), "issued in another order than waited for"


def test_who_works_for_others_is_told_from_who_waits_for_it() -> None:
    """As where all ranks build a latent cache: no call of all hosts is between them. Counts are alike afterwards."""
    working, waiting = Marks(), Marks()
    working.goes_on()
    before = working.place
    working.goes_on()
    assert working.place != before, "a task that begins is progress"

    def stands(marks: Marks) -> At:
        return At(marks.place, 70.0, False, "node", 100)

    with waiting.waiting():
        ranks: dict[int, At | None] = {0: stands(waiting), 1: stands(working), 2: stands(waiting)}
        assert (
            behind(0, ranks, [], lambda axes, rank: ()) == [1] and behind(1, ranks, [], lambda axes, rank: ()) is None
        )
        assert judged(ranks, [], lambda axes, rank: (), 60.0).guilty == (1,)
    assert waiting.place.host_calls == working.place.host_calls
