"""Whether ``cinemesh doctor`` names what is planted in a job, and nothing in a job where nothing is.

    python tests/benchmarks/doctor_planted.py [--clean 50]

Four servers of one rank each, as namespaces that meet over links of a known rate: see ``star.py``. In each of ten jobs
one thing is wrong, in two ways each: a rank that shares its core with others (two ranks on a machine, a core each), a
link whose rate is limited, a full /dev/shm in the server's own mount namespace, a clock that is off,
another version (of a package; of a file of cinemesh itself). The doctor must fail, name the fault, and name the rank or
server and no other. Clean jobs follow: they must all pass. Writes ``results/doctor_planted.json``.

Needs Linux, root, ip, tc, taskset, unshare and cc (Debian: iproute2 util-linux gcc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from box import NotAllowed
from star import Star

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT = HERE / "results" / "doctor_planted.json"
SERVERS, RATE_MBIT = 4, 400.0
DOCTOR = ("-m", "cinemesh.launch", "doctor", "--device", "cpu", "--directory", tempfile.gettempdir(), "--json")
CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t which, struct timespec *out) { /* libfaketime changes sleeps too, and they fail */
  int code = syscall(SYS_clock_gettime, which, out);
  if (code == 0 && which == CLOCK_REALTIME) out->tv_sec += atoi(getenv("CLOCK_AHEAD_S"));
  return code;
}
"""


@dataclass(frozen=True)
class Planted:
    """A job with one fault. ``check``: that must fail; ``named``: must be said of it, and none of ``innocent``."""

    what: str
    check: str
    named: str
    innocent: Sequence[str]
    job: Callable[[], tuple[int, str]]


def on_servers(
    rates: Sequence[float] = (RATE_MBIT,) * SERVERS,
    inside: Callable[[int], Sequence[str]] = lambda server: (),
    variables: Callable[[int], dict[str, str]] = lambda server: {},
) -> tuple[int, str]:
    """One rank on each server; its exit code and what rank 0 said. ``inside``: words before its own command line."""
    with Star(rates) as star:
        return star.run_each([*DOCTOR], inside, variables)


def two_ranks(crowded: int | None, neighbours: int = 1) -> tuple[int, str]:
    """Two ranks of this machine, a core each; on ``crowded``'s core, other processes are busy too."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    with ExitStack() as stack:
        if crowded is not None:
            for _ in range(neighbours):
                busy = ["taskset", "--cpu-list", str(cores[crowded]), sys.executable, "-c", "while True: pass"]
                stack.enter_context(ended(busy))
        port = str(20000 + os.getpid() % 20000)
        of_job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            subprocess.Popen(
                ["taskset", "--cpu-list", str(core), sys.executable, *DOCTOR],
                env=os.environ | of_job | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, core in enumerate(cores)
        ]
        said = [rank.communicate(timeout=600)[0] for rank in ranks]
    return ranks[0].returncode, said[0]


@contextmanager
def ended(command: Sequence[str]) -> Iterator[None]:
    """A process for the time of the block."""
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def of(server: int, words: Sequence[str]) -> Callable[[int], Sequence[str]]:
    """Words before the command line of one server's rank."""
    return lambda other: words if other == server else ()


def full_shm(left_mib: int) -> list[str]:
    """A /dev/shm of the process' own, of 64 MiB, with so much left."""
    fill = f"mount -t tmpfs -o size=64m tmpfs /dev/shm && fallocate -l {64 - left_mib}m /dev/shm/full"
    return ["unshare", "--mount", "sh", "-c", f'{fill} && exec "$@"', "_"]


def skewed(clock: Path, seconds: int) -> list[str]:
    """A wall clock that is off: a library before libc's."""
    return ["env", f"LD_PRELOAD={clock}", f"CLOCK_AHEAD_S={seconds}"]


def planted(folder: Path) -> list[Planted]:
    """Ten jobs; what they need is written into ``folder``."""
    clock = folder / "clock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", str(clock)], input=CLOCK, text=True, check=True
    )
    package = folder / "package"  # a numpy of another version, by what it says of itself
    (package / "numpy-9.9.9.dist-info").mkdir(parents=True)
    (package / "numpy-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n")
    changed = folder / "changed"  # cinemesh with one file edited
    ignored = shutil.ignore_patterns(".*", "tests", "runs", "docs", "__pycache__")
    shutil.copytree(ROOT, changed / "cinemesh", ignore=ignored)
    with (changed / "cinemesh" / "parallel" / "runtime" / "mesh.py").open("a") as file:
        file.write("\n# a change\n")

    def others(server: int) -> list[str]:
        return [f"server{other}" for other in range(SERVERS) if other != server]

    def path(server: int, first: Path) -> Callable[[int], dict[str, str]]:
        paths = os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])
        return lambda other: {"PYTHONPATH": paths} if other == server else {}

    def limited(server: int, mbit: float) -> tuple[int, str]:
        return on_servers([mbit if other == server else RATE_MBIT for other in range(SERVERS)])

    links = "links between"
    return [
        Planted("rank 1 shares its core", "product", "rank 1 on", ["rank 0 on"], lambda: two_ranks(1)),
        Planted("rank 0 shares its core with two", "product", "rank 0 on", ["rank 1 on"], lambda: two_ranks(0, 2)),
        Planted("server 2 at a quarter of the rate", links, "server2", [], lambda: limited(2, RATE_MBIT / 4)),
        Planted("server 1 at half the rate", links, "server1", [], lambda: limited(1, RATE_MBIT / 2)),
        Planted(
            "/dev/shm of server 1 full", "/dev/shm", "server1", others(1), lambda: on_servers(inside=of(1, full_shm(0)))
        ),
        Planted(
            "/dev/shm of server 3 nearly full",
            "/dev/shm",
            "server3",
            others(3),
            lambda: on_servers(inside=of(3, full_shm(4))),
        ),
        Planted(
            "clock of server 1 a minute ahead",
            "one time",
            "server1 +60",
            others(1),
            lambda: on_servers(inside=of(1, skewed(clock, 60))),
        ),
        Planted(
            "clock of server 0 three seconds behind",
            "one time",
            "server0 -3",
            others(0),
            lambda: on_servers(inside=of(0, skewed(clock, -3))),
        ),
        Planted(
            "numpy of rank 3 is another",
            "one software",
            "numpy",
            ["torch"],
            lambda: on_servers(variables=path(3, package)),
        ),
        Planted(
            "a file of rank 2's cinemesh is another",
            "one software",
            "code",
            ["torch"],
            lambda: on_servers(variables=path(2, changed)),
        ),
    ]


def judged(one: Planted, code: int, said: str) -> bool:
    """Whether the doctor failed for the planted reason, and said of whom."""
    faults = list(faults_of(said))
    about = [line for line in faults if one.check in line and one.named in line]
    return code == 1 and bool(about) and not any(name in line for line in faults for name in one.innocent)


def faults_of(said: str) -> Iterator[str]:
    """A line each, with the machine where it is one's own."""
    reply, _ = json.JSONDecoder().raw_decode(said[said.index("{\n") :])
    for machine in reply["machines"]:
        for one in machine["checks"]:
            if one["verdict"] == "fault":
                yield f"{machine['host']} {one['name']}: {one['said']}"
    for one in reply["checks"]:
        if one["verdict"] == "fault":
            yield f"{one['name']}: {one['said']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=int, default=50, help="jobs without a fault; half of them of two ranks")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    found: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        for one in planted(Path(folder)):
            try:
                code, said = one.job()
            except NotAllowed as reason:
                print(f"not measured: {reason}")
                return
            found[one.what] = judged(one, code, said)
            print(f"{one.what}: {'named' if found[one.what] else f'NOT NAMED (exit code {code})'}", flush=True)
            if not found[one.what]:
                print(said)
    alarms: list[str] = []
    for number in range(arguments.clean):
        code, said = on_servers() if number % 2 else two_ranks(None)
        if code != 0:
            alarms.append("; ".join(faults_of(said)))
            print(f"clean job {number + 1}: {alarms[-1]}", flush=True)
    told = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "command": "python tests/benchmarks/doctor_planted.py",
        "load_average": os.getloadavg(),
        "planted": found,
        "named": f"{sum(found.values())} of {len(found)}",
        "clean_jobs": arguments.clean,
        "false_alarms": alarms,
    }
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"named {told['named']}; {len(alarms)} false alarms in {arguments.clean} clean jobs")


if __name__ == "__main__":
    main()
