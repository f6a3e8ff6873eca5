"""A training job under torch's elastic agent, which is what torchrun runs, whose ranks die or hang where a test says.

    python tests/elastic_job.py FAULTS.json RECIPE.yaml RANKS
    torchrun ... tests/elastic_job.py FAULTS.json RECIPE.yaml

A fault a life: the first of the list in the first, and so on; the life after the last one is left alone. Ranks are, in
the first form, forked from a server that has loaded torch: a life costs a few seconds less. ``fired.jsonl`` beside the
faults has a line for each that happened: its number, rank, the time, the step (from 1) and what the rank was doing.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

PRELOADED = [
    "cinemesh.launch.training.loop",
    "cinemesh.launch.train",
    "torch._dynamo",
    "torch.utils.tensorboard.writer",
]
RANKS, SPARE = 2, 2  # restarts beyond those that faults make needed
LONG_S = 3600
OF_A_FIRST_TURN = ("video", "clip")
OF_ANY_RANK = ("video",)  # whichever comes to decode it
LIMIT_S, FIRST_S = 3.0, 25.0  # of the watchdogs: a turn takes milliseconds; the first of a life, seconds


@dataclass(frozen=True)
class Fault:
    """What happens to a rank, and where.

    ``what``: kill, lose (kill, and its copies in memory), stop (SIGSTOP), sleep, hold (sleep with Python's lock).
    ``turn``: which of its life, from 0; of a record, the step. ``kind`` and ``part``: of a record, which one of that
    kind (or any), as a fraction; of a moment, the seconds after the first batch was asked for.
    """

    rank: int
    what: str
    where: str
    turn: int = 0
    kind: str = ""
    part: float = 0.5


def run_job(folder: Path, recipe: dict[str, Any], faults: Sequence[Fault], *, torchrun: bool = False) -> Job:
    """All lives of a job of two ranks; what it wrote, with the moment of each line."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    command = [sys.executable, __file__, folder / "faults.json", folder / "recipe.yaml", str(RANKS)]
    if torchrun:
        agent = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS} --max-restarts {len(faults) + SPARE}"
        command = [sys.executable, *agent.split(), *command[1:-1]]
    known = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_DISABLE_SHARE")}
    said: dict[str, list[tuple[float, str]]] = {"out": [], "err": []}
    process = subprocess.Popen(
        [*map(str, command)], env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def listen(name: str, pipe: Any) -> None:
        with pipe:
            said[name].extend((time.time(), line.rstrip("\n")) for line in pipe)

    listeners = [threading.Thread(target=listen, args=of) for of in (("out", process.stdout), ("err", process.stderr))]
    for listener in listeners:
        listener.start()
    try:
        code = process.wait()
    finally:
        process.kill()
        for listener in listeners:
            listener.join()
    fired = folder / "fired.jsonl"
    rows = [json.loads(line) for line in fired.read_text().splitlines()] if fired.exists() else []
    return Job(code, said["out"], said["err"], {row["life"]: row for row in rows})


@dataclass(frozen=True)
class Job:
    """How a job ended; ``out`` and ``err`` are (time, line); ``fired`` by number of the fault."""

    code: int
    out: list[tuple[float, str]]
    err: list[tuple[float, str]]
    fired: dict[int, dict[str, Any]]

    @property
    def errors(self) -> list[tuple[float, str]]:
        """What the job said of its failures: of all lives, without the launcher's own words."""
        return [(at, line) for at, line in self.err if line.startswith(("error: ", "Traceback", "[rank"))]

    @property
    def told(self) -> str:
        return "\n".join(line for _, line in self.err)


# -- in the job -------------------------------------------------------------------------------------------------------


def main() -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    faults, recipe, *ranks = sys.argv[1:]
    if not ranks:
        life(faults, recipe)
        return
    multiprocessing.set_forkserver_preload(PRELOADED)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(*ranks),
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(json.loads(Path(faults).read_text())) + SPARE,
        start_method="forkserver",
        monitor_interval=0.1,
    )
    elastic_launch(config, life)(faults, recipe)


def life(faults: str, recipe: str) -> None:
    """Of one rank."""
    from cinemesh.launch import train
    from cinemesh.launch.cluster import sidecar

    number = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fault = dict(enumerate(Fault(**row) for row in json.loads(Path(faults).read_text()))).get(number)
    if fault is not None and fault.what != "kill":  # else as they are: a busy machine is slow
        sidecar.LEAST_S, sidecar.WRITE_S, sidecar.TIMES = LIMIT_S, LIMIT_S, 1.0
        if fault.where in OF_A_FIRST_TURN:
            sidecar.FIRST_S = FIRST_S
    rank = int(os.environ["RANK"])
    if fault is not None and (fault.rank == rank or fault.where in OF_ANY_RANK):

        def happens(step: int, doing: str) -> None:
            row = {"life": number, "rank": rank, "at": time.time(), "step": step, "doing": doing}
            with Path(faults).with_name("fired.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            suffer(fault.what, recipe)

        PLACES[fault.where](fault, happens)
    sys.argv = ["train", recipe]
    train.main()


def suffer(what: str, recipe: str) -> None:
    if what == "lose":  # and what its server held
        memory = Path(yaml.safe_load(Path(recipe).read_text())["logging"]["memory_folder"])
        for path in memory.glob(f"*/*/{int(os.environ['RANK']):05d}-*"):
            path.unlink()
        what = "kill"
    if what in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    elif what == "hold":
        ctypes.PyDLL(None).sleep(LONG_S)
    time.sleep(LONG_S)


Happens = Callable[[int, str], None]


def at_once(fault: Fault, happens: Happens) -> None:
    happens(0, "starting")


def at_a_moment(fault: Fault, happens: Happens) -> None:
    """Of the wall clock, whatever the rank does."""
    from cinemesh.launch.training import steps

    def begin(owner: Any, *_: Any) -> None:
        timer = threading.Timer(fault.part, lambda: happens(owner.runner.steps_done + 1, "anything"))
        timer.daemon = True
        timer.start()

    _at_turn(steps.StepLoop, "_fill", 0, begin)


def at_a_record(fault: Fault, happens: Happens) -> None:
    """Before one of the kind, in the step of this turn; ``wait``: for a collective over an axis."""
    from cinemesh.launch.training.marked import MarkedRuns
    from cinemesh.model.buckets import BucketRunner

    before, turns = BucketRunner.step, [0]
    if fault.where == "validation":
        before_run, runs = MarkedRuns.run, [0]

        def validated(self: Any, executor: Any) -> None:
            marks, done = self.marks, self.marks.record_done
            if runs[0] == fault.turn:
                marks.record_done = _stopping(
                    executor.program, fault, done, lambda what: happens(_step(self.runners.first), what)
                )
            runs[0] += 1
            before_run(self, executor)
            marks.record_done = done

        MarkedRuns.run = validated
        return

    def stepped(self: Any, lr: float, watch: Callable[[int], None] | None, **how: Any) -> None:
        if turns[0] == fault.turn:
            done = self.first.steps_done
            watch = _stopping(self.current.program, fault, watch, lambda what: happens(done + 1, what))
        turns[0] += 1
        before(self, lr, watch, **how)

    setattr(BucketRunner, "step", stepped)  # noqa: B010  a type checker minds otherwise


def _stopping(program: Any, fault: Fault, watch: Callable[[int], None] | None, happens: Callable[[str], None]) -> Any:
    def fits(op: Any) -> bool:
        wanted, _, over = fault.kind.partition(" of ")
        if wanted == "wait":
            return op.is_wait and bool(op.axes) and (not over or kinds[op.waits_for] == over)
        return not wanted or op.kind == wanted

    kinds = {op.name: op.kind for op in program.ops}
    found = [i for i, op in enumerate(program.ops) if i and fits(op)]
    at = told = found[int(len(found) * fault.part)]
    while any(op.kind == "mark" for op in program.ops) and program.ops[told - 1].kind != "mark":
        told -= 1  # where the program itself tells how far it is, by the last mark

    def watched(i: int) -> None:
        if watch is not None:
            watch(i)
        if i == at - 1:
            happens(f"at {program.ops[told].name} (")

    return watched


def in_a_write(fault: Fault, happens: Happens) -> None:
    """Half of a checkpoint's file is written, by the thread behind training."""
    from cinemesh.launch.training.checkpoint import saving, writing

    before, write_all = saving.write_part, writing.write_file
    turns = [0]

    def written(path: Path, *given: Any) -> Any:
        if turns[0] == fault.turn:

            def half(file: Path, chunks: Any) -> None:
                file.write_bytes(bytes(chunks[1][: len(chunks[1]) // 2]))
                happens(int(path.parent.name.split("-")[1].split(".")[0]), "saving a checkpoint")

            writing.write_file = half
        turns[0] += 1
        try:
            return before(path, *given)
        finally:
            writing.write_file = write_all

    saving.write_part = written


def _step(owner: Any) -> int:
    return getattr(owner, "runner", owner).steps_done


def _at_turn(owner: Any, name: str, turn: int, happens: Callable[..., None]) -> None:
    """Have ``happens`` called before ``owner.name`` is, the time that ``turn`` counts from 0."""
    before, turns = getattr(owner, name), [0]

    def called(*given: Any, **named: Any) -> Any:
        if turns[0] == turn:
            turns[0] += 1
            happens(*given)
        else:
            turns[0] += 1
        return before(*given, **named)

    setattr(owner, name, called)


def before_a_call(owner: str, name: str, doing: str) -> Callable[[Fault, Happens], None]:
    """In the function ``name`` of a module, or of a class of it."""

    def plant(fault: Fault, happens: Happens) -> None:
        import importlib

        module, _, cls = owner.partition(":")
        found = importlib.import_module(f"cinemesh.{module}")

        def now(*given: Any) -> None:
            step = -1
            with suppress(AttributeError, IndexError):
                step = _step(given[0])
            happens(step, doing)

        _at_turn(getattr(found, cls) if cls else found, name, fault.turn, now)

    return plant


PLACES: dict[str, Callable[[Fault, Happens], None]] = {
    "start": at_once,
    "moment": at_a_moment,
    "record": at_a_record,
    "validation": at_a_record,
    "write": in_a_write,
    "loader": before_a_call("launch.training.steps:StepLoop", "_fill", "loading samples"),
    "copy": before_a_call("launch.training.checkpoint.saving:Saver", "_copy", "saving a checkpoint"),
    "memory": before_a_call("launch.training.in_memory.slots", "state_digests", "copying the states into memory"),
    "publish": before_a_call("launch.training.checkpoint.saving", "publish", "a checkpoint"),
    "prune": before_a_call("launch.training.checkpoint.saving", "prune", "a checkpoint"),
    "report": before_a_call("launch.training.reports:Reports", "report", "reporting"),
    "video": before_a_call("data.cache.decoding", "read_windows", "where it starts"),
    "clip": before_a_call("data.codec:BlockDCTCodec", "decode", "decoding clips"),
}


if __name__ == "__main__":
    main()
