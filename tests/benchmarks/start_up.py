"""What a start of eight ranks takes, part by part, and what a captured step of the 30B would be rehearsed by.

    python tests/benchmarks/start_up.py
    python tests/benchmarks/start_up.py built

A job under torchrun on this machine, started, killed whole by a SIGKILL of one rank, and started again by its agent;
moments are taken in the job's own processes. Writes ``results/start_up.json``. Wall seconds of eight ranks on fewer
cores are mostly others' turns, so processor seconds of a rank stand beside them. ``built``: only what steps of the 30B
take of one core: of a process that builds and sends them beside a rank, and of the rank that receives and binds them.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

RESULT = Path(__file__).parent / "results" / "start_up.json"
MACHINE = "2-core x86-64, no GPU"
RANKS = 8
SHAPES = 5
PLANS = (
    "tp=4,cp=2,dp_shard=768",
    "tp=2,cp=4,dp_shard=96,dp_replicate=8,kv_chunks=3,tp_slices=8,defer_weight_gradients=true,grad_units=2",
)


def built() -> None:
    """Processor seconds of each part of a shape, of one core: the median of ``SHAPES``."""
    import torch

    from cinemesh.kernels.reference import REFERENCE
    from cinemesh.memory import uncollected
    from cinemesh.model.blueprint import Blueprint
    from cinemesh.model.config import USUAL_LATENTS, preset
    from cinemesh.model.inputs import BatchShape
    from cinemesh.model.step import Optimizer
    from cinemesh.parallel.ir.plan import Plan
    from cinemesh.parallel.runtime.alone import Alone
    from cinemesh.parallel.runtime.executor import Executor
    from cinemesh.parallel.runtime.mesh import coordinates

    frames, height, width = USUAL_LATENTS["movie-gen-30b"]

    def timed(parts: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
        begun = time.thread_time()
        answer = work()
        parts.setdefault(name, []).append(time.thread_time() - begun)
        return answer

    rows = list[dict[str, Any]]()
    for text, marked in itertools.product(PLANS, (False, True)):
        plan, kept, parts = Plan.parse(text), list[Executor](), dict[str, list[float]]()
        place = (coordinates(plan, 0), Alone(plan), "meta", dict(REFERENCE))
        ours, theirs = Pipe(duplex=False)
        step: object = None
        with uncollected():
            for shape in range(SHAPES):
                batch = BatchShape(1, (frames - 4 * shape, height, width))
                blueprint = Blueprint(preset("movie-gen-30b"), plan, batch, Optimizer(), 0, 0.1, "nccl", marked)
                step = timed(parts, "built", blueprint.build)
                sending = partial(_send, step, theirs)
                sender = Thread(target=timed, args=(parts, "sent", sending))  # a pipe holds less than a step
                sender.start()
                got = timed(parts, "received", lambda ours=ours: pickle.loads(ours.recv_bytes()))
                sender.join()
                kept.append(timed(parts, "bound", partial(Executor, got.program, *place, placement=got.arenas)))
        records = len(kept[0].program.ops)
        seconds = {name: median(found) for name, found in parts.items()}
        rows.append(
            {
                "plan": text,
                "marked": marked,
                "records_of_a_shape": records,
                "bytes_sent_of_a_shape": len(pickle.dumps(step, pickle.HIGHEST_PROTOCOL)),
                "cpu_s_of_a_shape": {name: round(each, 3) for name, each in seconds.items()},
                "cpu_us_of_a_record": {name: round(1e6 * each / records, 1) for name, each in seconds.items()},
            }
        )
    told = json.loads(RESULT.read_text())
    told["built"] = {
        "date": date.today().isoformat(),
        "machine": MACHINE,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python tests/benchmarks/start_up.py built",
        "shapes": SHAPES,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told["built"], indent=1))


def _send(step: object, pipe: Any) -> None:
    pipe.send_bytes(pickle.dumps(step, pickle.HIGHEST_PROTOCOL))


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    import yaml
    from training import recipe, write_clips

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder)
        values = recipe(folder, folder, tp=2, cp=2, dp_shard=2)
        values["schedule"]["steps"], values["logging"]["checkpoint_every"] = 8, 2
        values["logging"]["validate_every"] = 0
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        agent = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS} --max-restarts 1"
        begun = time.time()
        done = subprocess.run(
            [sys.executable, *agent.split(), __file__, "rank", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.moments"))]
        killed = float((folder / "killed").read_text())
    first, again = ([row for row in rows if row["life"] == life] for life in (0, 1))
    told = {
        "date": date.today().isoformat(),
        "machine": MACHINE,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python tests/benchmarks/start_up.py",
        "ranks": RANKS,
        "first_start": _parts(first, begun),
        "after_a_kill": _parts(again, killed),
        "files": {
            "bytes": int(median(row["bytes"] for row in first)),
            "count": int(median(row["files"] for row in first)),
        },
        "store_requests_of_a_rank": int(median(row["requests"] for row in first)),
        "rehearsed": [rehearsed(text) for text in PLANS],
        "built": json.loads(RESULT.read_text())["built"],  # measured by itself
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


def _parts(rows: list[dict[str, Any]], since: float) -> dict[str, dict[str, float]]:
    """Wall seconds until the last rank had it behind it, and processor seconds of the median one."""
    names = list(rows[0]["at"])
    parts: dict[str, dict[str, float]] = {}
    before, cpu_before = since, [0.0] * len(rows)
    for name in names:
        ended = max(row["at"][name][0] for row in rows)
        cpu = [row["at"][name][1] for row in rows]
        parts[name] = {
            "wall_s": round(ended - before, 2),
            "cpu_s": round(median(b - a for a, b in zip(cpu_before, cpu, strict=True)), 3),
        }
        before, cpu_before = ended, cpu
    return parts


def rehearsed(text: str) -> dict[str, Any]:
    """Of the 30B's step under a plan, bound without memory: what runs before its capture, and as it is priced."""
    from cinemesh.kernels.reference import REFERENCE
    from cinemesh.model.config import USUAL_LATENTS, preset
    from cinemesh.model.inputs import BatchShape
    from cinemesh.model.step import build_step
    from cinemesh.parallel.ir.plan import Plan
    from cinemesh.parallel.passes.pipeline import prepare
    from cinemesh.parallel.runtime.alone import Alone
    from cinemesh.parallel.runtime.executor import Executor
    from cinemesh.parallel.runtime.mesh import coordinates
    from cinemesh.parallel.runtime.rehearsal import Rehearsal
    from cinemesh.perf_model.clusters.cluster import load
    from cinemesh.perf_model.prices.played import play_program

    plan, batch = Plan.parse(text), BatchShape(1, USUAL_LATENTS["movie-gen-30b"])
    program = prepare(build_step(preset("movie-gen-30b"), plan, batch), backend="nccl")
    executor = Executor(program, coordinates(plan, 0), Alone(plan), "meta", dict(REFERENCE))
    names = {record.op.name for record in Rehearsal().chosen(program, executor.records)}
    whole = play_program(program, batch, load("grand-teton-h100"))
    seconds = {op.name: record.seconds for op, record in zip(program.ops, whole.tape.records, strict=True)}
    return {
        "plan": text,
        "records": len(program.ops),
        "rehearsed": len(names),
        "of_these_collectives": sum(bool(op.axes) for op in program.ops if op.name in names),
        "predicted_s": round(sum(seconds[name] for name in names), 3),
        "predicted_step_s": round(whole.step_s, 2),
    }


# -- on a rank --------------------------------------------------------------------------------------------------------


def rank(folder: Path) -> None:
    at: dict[str, tuple[float, float]] = {}

    def note(name: str) -> None:
        at.setdefault(name, (time.time(), time.process_time()))

    note("process")
    from cinemesh.launch import train
    from cinemesh.launch.cluster import meeting, processes
    from cinemesh.launch.training import loop, reports, telemetry  # noqa: F401

    note("imports")
    number, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    requests = [0]
    for name in ("set", "get", "add", "check", "compare_set", "wait"):
        _counted(meeting.PrefixStore, name, requests)
    _after(processes, "meet_alike", lambda: note("ranks meet and compare"))
    _after(loop, "open_history", lambda: note("communicators, the hosts' tree, the cache"))
    _after(loop.Setting, "runners", lambda: note("shapes: build and bind"))
    _after(loop, "resume", lambda: note("reading the checkpoint"))
    _after(loop.BucketRunner, "capture", lambda: note("capture, one step"))

    def stepped() -> None:
        note("first step")
        if life == 0 and number == 5 and (folder / "run" / "checkpoints" / "step-00000004").exists():
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), 9)
        files = [str(of) for m in list(sys.modules.values()) if (of := getattr(m, "__file__", None))]
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
        sizes = [file.stat().st_size for file in {*files, *mapped} for file in [Path(file)] if file.is_file()]
        row = {"life": life, "at": at, "requests": requests[0], "bytes": sum(sizes), "files": len(sizes)}
        if not (moments := folder / f"{life}-{number}.moments").exists():
            moments.write_text(json.dumps(row))

    _after(loop.BucketRunner, "step", stepped)
    sys.argv = ["train", str(folder / "recipe.yaml")]
    train.main()


def _after(owner: Any, name: str, then: Callable[[], None]) -> None:
    before = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        answer = before(*given, **named)
        then()
        return answer

    setattr(owner, name, called)


def _counted(owner: Any, name: str, count: list[int]) -> None:
    before = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        count[0] += 1
        return before(*given, **named)

    setattr(owner, name, called)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]))
    elif sys.argv[1:] == ["built"]:
        built()
    else:
        main()
