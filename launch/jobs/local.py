"""A job on this machine: an agent of torchrun for every node, all of them here (torch-free)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from .job import ClusterJob
from .variables import STOP_S, variables

LOOPBACK = "127.0.0.1"


def agent_command(job: ClusterJob, node: int, port: int) -> list[str]:
    """Of one agent."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(job.nodes), "--node-rank", str(node)]
    agent += ["--nproc-per-node", str(job.ranks_of_a_node), "--max-restarts", "0"]
    return [*agent, "--master-addr", LOOPBACK, "--master-port", str(port), *job.training(str(job.recipe))]


def run(job: ClusterJob, interface: str | None) -> int:
    """Start the agents and wait for them; the first exit code that is not 0, or 0.

    SIGTERM and Ctrl-C ask the ranks to save and stop. No agent is left behind.
    """
    own = "lo0" if sys.platform == "darwin" else "lo"
    given = {one.name: one.value for one in variables(job, interface or own)}
    agents: list[subprocess.Popen[bytes]] = []

    def stop(signum: int, _: object) -> None:
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    port = _free_port()
    try:
        for node in range(job.nodes):
            agents.append(
                subprocess.Popen(agent_command(job, node, port), env=os.environ | given, start_new_session=True)
            )
        codes = [agent.wait() for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
        for agent in agents:
            agent.wait(STOP_S)
        for number, handler in before.items():
            signal.signal(number, handler)
    return next((code for code in codes if code), 0)


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        return listener.getsockname()[1]
