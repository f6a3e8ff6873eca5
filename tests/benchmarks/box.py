"""A cluster in a box: two servers of two ranks each on one machine, with a link of a chosen rate between them.

    python tests/benchmarks/box.py [--rate 400] [--mbytes 1]

Every server is a network namespace of its own; a veth pair joins them, and ``tbf`` limits what each end sends. Ranks of
one server meet over its loopback, at memory speed. Nothing outside the two namespaces is touched, and they go when the
box is left, however that happens. Needs Linux, root, and iproute2's ``ip`` and ``tc``; where one is missing, or
namespaces are not allowed, ``NotAllowed`` says so.

Run alone, it prints what the link carries beside its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

SERVERS, RANKS_PER_SERVER = 2, 2
RANKS = SERVERS * RANKS_PER_SERVER
INTERFACE = "link0"  # in every server
NETWORK = "10.213.7"  # private to the box; servers are .1 and .2
PORT = 29517
BURST_BYTES = 96 * 1024  # more than the largest packet that the kernel hands to the limiter (64 KiB)
QUEUE_BYTES = 8 * 1024 * 1024  # so long that nothing is dropped
# Links are lossless, and a connection that paused goes on at full speed, as between servers of one cluster.
SETTINGS = ("net.ipv4.tcp_slow_start_after_idle=0", "net.ipv4.tcp_congestion_control=reno")


class NotAllowed(Exception):
    """A box cannot be built here; says why."""


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise NotAllowed(f"{' '.join(command)}: {reason}")


class Box:
    """Two servers for the time of a ``with`` block. ``rate_mbit``: Mb/s of the link, each way."""

    def __init__(self, rate_mbit: float) -> None:
        self.names = [f"cinemesh-{os.getpid()}-{i}" for i in range(SERVERS)]
        self.rate_mbit = rate_mbit
        self._made: list[str] = []
        self._ranks: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        # Ended from outside, it leaves the box in order too.
        self._on_term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for tool in ("ip", "tc", "sysctl"):
                if shutil.which(tool) is None:
                    raise NotAllowed(f"there is no {tool} on this machine")
            self._build()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._tear_down()

    def _build(self) -> None:
        for name in self.names:
            call("ip", "netns", "add", name)
            self._made.append(name)
        first, second = self.names
        call(*f"ip link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}".split())
        for i, name in enumerate(self.names):
            inside = ("ip", "netns", "exec", name)
            call(*inside, "ip", "address", "add", f"{NETWORK}.{i + 1}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                call(*inside, "ip", "link", "set", interface, "up")
            limit = f"rate {self.rate_mbit:g}mbit burst {BURST_BYTES} limit {QUEUE_BYTES}"
            call(*inside, *f"tc qdisc add dev {INTERFACE} root tbf {limit}".split())
            for setting in SETTINGS:
                call(*inside, "sysctl", "-q", "-w", setting)

    def run(self, command: list[str], timeout_s: float = 1800.0, ranks_per_server: int = RANKS_PER_SERVER) -> str:
        """Run a Python command line as ranks, in the environment that torchrun would set; what rank 0 printed.

        Raises RuntimeError with the output of a rank that failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            ranks = SERVERS * ranks_per_server
            logs = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
            for rank, log in enumerate(logs):
                server, local = divmod(rank, ranks_per_server)
                variables = {
                    "RANK": rank,
                    "LOCAL_RANK": local,
                    "WORLD_SIZE": ranks,
                    "LOCAL_WORLD_SIZE": ranks_per_server,
                    "MASTER_ADDR": f"{NETWORK}.1",
                    "MASTER_PORT": PORT,
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "OMP_NUM_THREADS": 1,
                }
                environment = os.environ | {name: str(value) for name, value in variables.items()}
                inside = ("ip", "netns", "exec", self.names[server], sys.executable, *command)
                with log.open("wb") as out:
                    self._ranks.append(subprocess.Popen(inside, stdout=out, stderr=subprocess.STDOUT, env=environment))
            deadline = time.monotonic() + timeout_s
            while any(rank.poll() is None for rank in self._ranks):
                failed = [i for i, rank in enumerate(self._ranks) if rank.poll()]
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            failed = [i for i, rank in enumerate(self._ranks) if rank.poll() != 0]
            self._end_ranks()
            texts = [log.read_text(errors="replace") for log in logs]
        if failed:
            raise RuntimeError(
                f"rank {failed[0]} of the box failed or ran past {timeout_s:g} s:\n{texts[failed[0]][-3000:]}"
            )
        return texts[0]

    def _end_ranks(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        self._ranks.clear()

    def _tear_down(self) -> None:
        self._end_ranks()
        for name in self._made:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        self._made.clear()
        signal.signal(signal.SIGTERM, self._on_term)


def measure_link(mbytes: float, rounds: int = 10) -> None:
    """One rank of the box: all-gathers across the link, over pairs of ranks that lie in different servers."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([i, i + RANKS_PER_SERVER]) for i in range(RANKS_PER_SERVER)]
    source = torch.zeros(int(mbytes * 1e6 / 4))
    output = torch.zeros(2 * source.numel())
    times: list[float] = []
    for _ in range(rounds + 2):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather_single(output, source, group=groups[rank % RANKS_PER_SERVER])
        dist.barrier()
        times.append(time.perf_counter() - start)
    if rank == 0:
        seconds = sorted(times[2:])[rounds // 2]
        print(json.dumps({"seconds": seconds, "mbit": RANKS_PER_SERVER * source.numel() * 32 / seconds / 1e6}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=400.0, help="Mb/s of the link, each way")
    parser.add_argument("--mbytes", type=float, default=1.0, help="what every rank sends across")
    parser.add_argument("--rank", action="store_true", help="this process is a rank in the box")
    arguments = parser.parse_args()
    if arguments.rank:
        measure_link(arguments.mbytes)
        return
    try:
        with Box(arguments.rate) as box:
            print(box.run([__file__, "--rank", "--mbytes", str(arguments.mbytes)]), end="")
    except NotAllowed as reason:
        print(f"not measured: {reason}")


if __name__ == "__main__":
    main()
