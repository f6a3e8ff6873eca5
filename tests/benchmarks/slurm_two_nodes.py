"""A job on a real Slurm of two nodes: submitted, preempted, a node lost, and a chain of stages as an array.

    python tests/benchmarks/slurm_two_nodes.py

slurmctld and two slurmd run on this machine, as nodes n1 and n2, from a configuration in a folder of their own. A small
run is first done without Slurm, with as many ranks of a node, and so as many threads of a rank; each script that
``cinemesh launch slurm`` writes must end with bitwise its states, whatever happened on the way. Writes
``results/slurm_two_nodes.json``.

Needs Linux, root, and Debian's slurm-wlm and munge; no other Slurm may use this machine's munge. Minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' small clips and recipe

from training import recipe, write_clips

from cinemesh.launch.training.chain import read_chain
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, read_manifest, step_folder

RESULT = Path(__file__).parent / "results" / "slurm_two_nodes.json"
STEPS, KEPT_EVERY = 300, 25
NAMED = "N1_AND_N2"  # in the environment, where the names are known
CONFIGURATION = """
ClusterName=box
SlurmctldHost=localhost
AuthType=auth/munge
SlurmUser=root
SlurmctldPort=16817
SlurmctldPidFile={at}/ctld.pid
SlurmctldLogFile={at}/ctld.log
SlurmdPidFile={at}/%n.pid
SlurmdLogFile={at}/%n.log
SlurmdSpoolDir={at}/spool-%n
StateSaveLocation={at}/state
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
KillWait=20
SchedulerParameters=bf_interval=2,sched_interval=2
NodeName=n1 NodeHostname={host} Port=16818 CPUs={cores} RealMemory=4000
NodeName=n2 NodeHostname={host} Port=16819 CPUs={cores} RealMemory=4000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


class TwoNodes:
    """Slurm for the time of a ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"

    def __enter__(self) -> TwoNodes:
        (self.folder / "state").mkdir(parents=True)
        values = {"at": self.folder, "host": platform.node(), "cores": os.cpu_count()}
        self.configuration.write_text(CONFIGURATION.format(**values))
        os.environ["SLURM_CONF"] = str(self.configuration)
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge")
            subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged"], check=True)
        subprocess.run(["slurmctld", "-f", str(self.configuration)], check=True)
        for name in ("n1", "n2"):
            self.start_node(name)
        wait_for(lambda: "idle" in told("sinfo", "--noheader", "--format=%t"), 60, "idle nodes")
        return self

    def __exit__(self, *_: object) -> None:
        kill_all(f"SLURM_CONF={self.configuration}")

    def start_node(self, name: str) -> None:
        subprocess.run(["slurmd", "-f", str(self.configuration), "-N", name], check=True)

    def kill_node(self, name: str) -> None:
        """slurmd, and all that it started, as a lost machine would be gone."""
        kill_all(f"SLURMD_NODENAME={name}")
        kill(self.folder / f"{name}.pid")


def kill_all(variable: str) -> None:
    """Processes that were started with it in their environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def kill(pid_file: Path) -> None:
    """The process of a pid file, if there is one."""
    try:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
    except (OSError, ValueError):
        return


def told(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_for(there: Callable[[], object], most_s: float, what: str) -> None:
    """Until it is there. Raises TimeoutError."""
    until = time.monotonic() + most_s
    while not there():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {most_s:g} s")
        time.sleep(0.2)


def cinemesh(*words: object) -> str:
    """What the command prints; its own output on failure."""
    command = [sys.executable, "-m", "cinemesh.launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def submit(script: str, folder: Path, *options: str) -> str:
    """The job's number."""
    path = folder / "run.sbatch"
    path.write_text(script)
    path.chmod(0o755)
    return told("sbatch", "--parsable", *options, str(path)).strip()


def state_of(job: str) -> str:
    """Of a job, or of all of an array: one that has not ended counts first."""
    states = told("scontrol", "--oneliner", "show", "job", job)
    found = [word.split("=")[1] for word in states.split() if word.startswith("JobState=")]
    return next((state for state in found if state not in ENDED), found[0] if found else "GONE")


def field_of(job: str, name: str) -> str:
    """What Slurm says of a job."""
    words = told("scontrol", "--oneliner", "show", "job", job).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def end_of(job: str, most_s: float = 600) -> str:
    """The state in which a job ended."""
    wait_for(lambda: state_of(job) in (*ENDED, "GONE"), most_s, f"the end of job {job}")
    return state_of(job)


def digests(folder: Path, step: int) -> dict[str, Any]:
    """Of the states at a step: equal where every bit is."""
    return dict(read_manifest(step_folder(folder / "checkpoints", step)).digests)


@contextmanager
def run_of(folder: Path, clips: Path, **changes: Any) -> Iterator[Path]:
    """A recipe of two ranks in a folder of its own."""
    folder.mkdir()
    values = recipe(clips, folder, dp_shard=2)
    values["schedule"] |= {"steps": STEPS}
    values["logging"] |= {"every": KEPT_EVERY, "validate_every": 0, "checkpoint_every": KEPT_EVERY} | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield path
    finally:
        os.chdir(before)


def begun(folder: Path) -> bool:
    """Whether a checkpoint is there: what is lost now must be done again."""
    return any(folder.glob(f"run/checkpoints/step-*/{MANIFEST}"))


def with_hosts() -> None:
    """Start again where n1 and n2 are names of this machine: in a mount namespace with an /etc/hosts of its own."""
    if NAMED in os.environ:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:
        hosts.write(Path("/etc/hosts").read_text() + "\n127.0.0.1 n1 n2\n")
        hosts.flush()
        inside = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", inside, "_", hosts.name, sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env=os.environ | {NAMED: "1"}, check=False).returncode)


def main() -> None:
    with_hosts()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        clips = top / "clips"
        clips.mkdir()
        write_clips(clips)
        with run_of(top / "plain", clips) as path:
            cinemesh("launch", "local", path, "--per-node", 1)
        wanted = digests(top / "plain" / "run", STEPS)
        with TwoNodes(top / "slurm") as slurm:

            def tried(what: str, disturb: Callable[[Path], None]) -> None:
                folder = top / what.replace(" ", "-")
                with run_of(folder, clips) as path:
                    job = submit(cinemesh("launch", "slurm", path, "--per-node", 1), folder)
                    disturb(folder)
                    state = end_of(job)
                    log = next(folder.glob("recipe-*.log")).read_text()
                equal = state == "COMPLETED" and digests(folder / "run", STEPS) == wanted
                restarts = int(field_of(job, "Restarts"))
                resumed = (folder / "run" / "train.log").read_text().count("resumed from")
                found[what] = {
                    "state": state,
                    "bitwise": equal,
                    "restarts": restarts,
                    "resumed": resumed,
                    "map": [li for li in log.splitlines() if "ranks" in li][:3],
                }
                bits = "bitwise the same" if equal else "NOT the same"
                print(f"{what}: {state}, {bits}, {restarts} restarts, resumed {resumed} times", flush=True)
                if not equal:
                    print(log)

            tried("two nodes", lambda folder: None)

            def preempt(folder: Path) -> None:
                wait_for(lambda: begun(folder), 300, "a checkpoint")
                end_of(submit("#!/bin/sh\nsleep 3\n", top, "--partition=high", "--nodes=2", "--exclusive"))

            tried("preempted", preempt)

            def lose(folder: Path) -> None:
                wait_for(lambda: begun(folder), 300, "a checkpoint")
                slurm.kill_node("n2")
                time.sleep(20)  # Slurm sees it, and queues the job again
                slurm.start_node("n2")

            tried("a node that dies", lose)
            found["an array of stages"] = array(top, clips)
    told_all = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {"torch": version("torch"), "slurm": told_version()},
        "command": "python tests/benchmarks/slurm_two_nodes.py",
        "steps": STEPS,
        "checkpoint_every": KEPT_EVERY,
        "found": found,
    }
    RESULT.write_text(json.dumps(told_all, indent=1) + "\n", encoding="utf-8")


def told_version() -> str:
    """Slurm's."""
    return told("slurmctld", "-V").split()[-1]


def array(top: Path, clips: Path) -> dict[str, Any]:
    """A chain of two runs, their average and a clip, in Slurm's array and without it."""
    stages: Sequence[dict[str, Any]] = [
        {"name": "a"},
        {"name": "b", "after": "a", "set": {"seed": 5}},
        {"name": "mean", "average": ["a", "b"]},
        {"name": "clip", "after": "mean", "prompt": "It moves.", "set": {"sample.steps": 2}},
    ]
    ends: list[tuple[dict[str, Any], bytes]] = []
    state = ""
    for where in ("alone", "array"):
        with run_of(top / where, clips) as path:
            chain = {"directory": "runs", "recipe": str(path), "stages": stages, "set": {"schedule.steps": 50}}
            Path("chain.yaml").write_text(yaml.safe_dump(chain))
            if where == "alone":
                cinemesh("stages", "chain.yaml", "--nproc", 2)
            else:
                job = submit(cinemesh("launch", "slurm", "chain.yaml", "--per-node", 2), top / where)
                state = end_of(job)
                if state != "COMPLETED":
                    print("".join(log.read_text()[-2000:] for log in sorted(Path().glob("chain-*.log"))))
            links = {link.stage.name: link for link in read_chain(Path("chain.yaml"))}
            mean = links["mean"].end()
            there = mean.exists() and links["clip"].clip.exists()
            ends.append((dict(read_manifest(mean).digests), links["clip"].clip.read_bytes()) if there else ({}, b""))
    equal = ends[0] == ends[1] and bool(ends[0][1])
    print(f"an array of stages: {state}, {'bitwise the same' if equal else 'NOT the same'}", flush=True)
    return {"state": state, "stages": len(stages), "bitwise": equal}


if __name__ == "__main__":
    main()
