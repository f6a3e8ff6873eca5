"""Kills and hangs that are planted into a job, and whether it told of each as it must and went on to the same bits."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from elastic_job import FIRST_S, LIMIT_S, OF_A_FIRST_TURN, Fault, Job
from training import STATES, recipe, states, states_in

from cinemesh.launch.training.checkpoint.choosing import FOLDER, published

OF_ANY = ("record", "moment", "write", "loader", "validation", "copy")  # where ranks are killed
OF_RANK_0 = ("publish", "prune")
LATE_S = 5.0  # that a verdict may come after its limit
EVERY = 2  # steps between checkpoints

# Stopped, asleep, asleep with Python's lock; in compute, before each kind of collective and in the wait for it, between
# steps, in both threads that save, and where videos and clips are decoded.
HANGS = (
    Fault(0, "sleep", "video"),
    Fault(1, "stop", "record", 1, "attention"),
    Fault(0, "stop", "record", 2, "wait of all_gather"),
    Fault(1, "stop", "loader", 2),
    Fault(0, "stop", "copy", 1),
    Fault(1, "sleep", "record", 1, "matmul"),
    Fault(0, "sleep", "record", 2, "attention"),
    Fault(1, "hold", "record", 1, "swiglu"),
    Fault(0, "sleep", "record", 2, "adamw"),
    Fault(1, "sleep", "record", 1, "all_gather"),
    Fault(0, "sleep", "record", 1, "reduce_scatter"),
    Fault(1, "sleep", "record", 2, "all_reduce"),
    Fault(0, "sleep", "record", 1, "wait of all_gather"),
    Fault(1, "sleep", "record", 2, "wait of reduce_scatter"),
    Fault(0, "hold", "record", 1, "wait of all_reduce"),
    Fault(1, "hold", "loader", 2),
    Fault(0, "sleep", "write", 1),
    Fault(1, "sleep", "write", 1),
    Fault(0, "sleep", "publish", 1),
    Fault(1, "sleep", "validation", 5, "attention"),
    Fault(0, "sleep", "clip"),
)
HANGS_IN_SHORT = (HANGS[1], HANGS[10], HANGS[15], HANGS[17])
HANGS_IN_A_PROGRAM = (HANGS[1], HANGS[2], HANGS[9], HANGS[8])


def kills(count: int, seed: int) -> list[Fault]:
    """At random moments, in each kind of place; ranks take turns: two lives that end alike are not followed by a third.

    A rank that is killed before it has met the others leaves no trace of its end.
    """
    draw = random.Random(seed)
    found: list[Fault] = []
    while len(found) < count:
        places = draw.sample(OF_ANY, len(OF_ANY))
        of_0 = draw.sample([*OF_RANK_0, *places[:2]], 4)
        planted = [pair for one, zero in zip(places[2:], of_0, strict=True) for pair in ((1, one), (0, zero))]
        planted.insert(draw.randrange(len(planted)), (draw.randrange(2), "start"))
        for rank, where in planted:
            turn = draw.randrange(2 if where in ("write", "copy", *OF_RANK_0) else 4)
            part = draw.uniform(0, 1.5 if where == "moment" else 0.99)
            found.append(Fault(rank, "kill", where, turn, part=part))
    return found[:count]


def losses(count: int, seed: int) -> list[Fault]:
    """Of ranks with what their servers held, and without, in turns; at random moments, also while they copy."""
    draw = random.Random(seed)
    found: list[Fault] = []
    while len(found) < count:
        for rank in (1, 0):
            where = draw.choice(("record", "moment", "loader", "validation", "memory"))
            part = draw.uniform(0, 1.5 if where == "moment" else 0.99)
            found.append(Fault(rank, draw.choice(("kill", "lose")), where, draw.randrange(4), part=part))
    return found[:count]


def recipe_in_memory(clips: Path, out: Path, steps: int, memory: Path) -> dict[str, Any]:
    """Two replicas, each with copies in memory of every step; none in storage."""
    values = long_recipe(clips, out, steps)
    values["plan"] = {"dtype": "float32", "recompute": "none", "dp_replicate": 2}
    values["logging"] |= {"checkpoint_every": 0, "memory_every": 1, "memory_folder": str(memory)}
    return values


def long_recipe(clips: Path, out: Path, steps: int) -> dict[str, Any]:
    """A checkpoint and a validation often enough for every life to see one."""
    values = recipe(clips, out, dp_shard=2)
    values["schedule"]["steps"] = steps
    values["logging"] |= {"checkpoint_every": EVERY, "validate_every": 1, "keep": 3}
    return values


def check_hangs(job: Job, faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """A row a hang: what was planted, what was said, after how long."""
    assert job.code == 0, job.told
    assert sorted(job.fired) == list(range(len(faults))), job.told
    assert len(job.errors) == len(faults), [line for _, line in job.errors]
    rows: list[dict[str, Any]] = []
    for number, fault in enumerate(faults):
        (at, said), fired = job.errors[number], job.fired[number]
        how = "is stopped by a signal" if fault.what == "stop" else "stands"
        limit_s = FIRST_S if fault.where in OF_A_FIRST_TURN else LIMIT_S
        guilty = said.partition("; ")[0]
        assert guilty.startswith(f"error: no progress for {limit_s:.0f} s: rank {fired['rank']} (process "), said
        assert f") {how} in " in guilty and fired["doing"] in guilty, said
        named = {int(part.partition("rank ")[2].split()[0]) for part in said.split("; ") if " stands in " in part}
        assert named <= {fired["rank"]}, said
        seconds = at - fired["at"]
        assert limit_s <= seconds + 1 and seconds < limit_s + LATE_S, (seconds, said)
        rows.append(
            {"planted": f"{fault.what}, {fault.where} {fault.kind}".strip(), "seconds": round(seconds, 1), "said": said}
        )
    before = [line for _, line in job.out if line.startswith("the round before ended: ")]
    assert [line.removeprefix("the round before ended: ") for line in before] == [
        line.removeprefix("error: ") for _, line in job.errors
    ]
    return rows


def check_kills(job: Job, values: dict[str, Any], undisturbed: dict[str, Any]) -> dict[str, Any]:
    """What was lost; the run ended as the other one did, and all its checkpoints can be read."""
    assert job.code == 0, job.told
    run, whole = (Path(of["logging"]["directory"]) for of in (values, undisturbed))
    one, other = states(run, values), states(whole, undisturbed)
    assert all(torch.equal(one[state], other[state]) for state in STATES)
    assert not [line for _, line in job.out if "passed over" in line], job.out
    assert all(states_in(path, values) for path in published(run / FOLDER))
    resumed = [(at, line) for at, line in job.out if "processes on cpu; " in line]
    lost: list[int] = []
    restart_s: list[float] = []
    for fired in job.fired.values():
        at, line = next((at, line) for at, line in resumed if at > fired["at"]) if fired["step"] else (0.0, "")
        if line:
            begins = 0 if "from step 0" in line else int(re.split("step[- ]", line)[-1])
            lost.append(max(0, fired["step"] - 1 - begins))
            restart_s.append(at - fired["at"])
    return {"fired": len(job.fired), "steps_lost": lost, "restart_s": restart_s}
