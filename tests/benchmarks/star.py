"""Servers in a box that meet at one switch, each by a link of its own rate; one rank a server.

As ``box.py``, of any number of servers: every server is a network namespace, and a bridge in one more is the switch.
Nothing outside is touched, and all of it goes when the star is left. Needs Linux, root, iproute2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from box import BURST_BYTES, INTERFACE, QUEUE_BYTES, SETTINGS, Box, call

NETWORK = "10.213.8"  # private to the star; server i is .i+1
PORT = 29518


class Star(Box):
    """Servers for the time of a ``with`` block. ``rates``: Mb/s of each one's link, each way."""

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__(max(rates))
        self.rates = rates
        self.names = [f"cinemesh-star-{os.getpid()}-{i}" for i in range(len(rates))]
        self.switch = f"cinemesh-star-{os.getpid()}-switch"

    def _build(self) -> None:
        for name in (self.switch, *self.names):
            call("ip", "netns", "add", name)
            self._made.append(name)
        at_switch = ("ip", "netns", "exec", self.switch)
        call(*at_switch, *["ip", "link", "add", "switch0", "type", "bridge"])
        call(*at_switch, *["ip", "link", "set", "switch0", "up"])
        for i, (name, rate) in enumerate(zip(self.names, self.rates, strict=True)):
            port, inside = f"port{i}", ("ip", "netns", "exec", name)
            call(*f"ip link add {INTERFACE} netns {name} type veth peer name {port} netns {self.switch}".split())
            call(*at_switch, *f"ip link set {port} master switch0 up".split())
            call(*inside, "ip", "address", "add", f"{NETWORK}.{i + 1}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                call(*inside, "ip", "link", "set", interface, "up")
            limit = f"rate {rate:g}mbit burst {BURST_BYTES} limit {QUEUE_BYTES}"
            call(*inside, *f"tc qdisc add dev {INTERFACE} root tbf {limit}".split())
            call(*at_switch, *f"tc qdisc add dev {port} root tbf {limit}".split())
            for setting in SETTINGS:
                call(*inside, "sysctl", "-q", "-w", setting)

    def run_each(
        self,
        command: Sequence[str],
        inside: Callable[[int], Sequence[str]],
        variables: Callable[[int], dict[str, str]],
        timeout_s: float = 300.0,
    ) -> tuple[int, str]:
        """Run a Python command line as one rank a server; rank 0's exit code, and what it said.

        ``inside``: words that go before it on a server; ``variables``: of its environment. A server is called server0,
        server1, ... as Slurm would name it.
        """
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"rank{rank}" for rank in range(len(self.names))]
            for rank, (name, log) in enumerate(zip(self.names, logs, strict=True)):
                of_job = {
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(len(self.names)),
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": f"{NETWORK}.1",
                    "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "OMP_NUM_THREADS": "1",
                    "SLURMD_NODENAME": f"server{rank}",
                }
                words = ["ip", "netns", "exec", name, *inside(rank), sys.executable, *command]
                with log.open("wb") as out:
                    environment = os.environ | of_job | variables(rank)
                    self._ranks.append(subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment))
            deadline = time.monotonic() + timeout_s
            first = self._ranks[0]
            while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
            self._end_ranks()
            return first.returncode, logs[0].read_text(errors="replace")
