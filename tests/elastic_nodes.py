"""Nodes of an elastic job that are lost and come back: an agent of torchrun's each, with two gloo ranks.

    python tests/elastic_nodes.py RECIPE.yaml PORT LEAST MOST HOLD

``HOLD``: at this step (from 0) a job of fewer than all ranks waits until it is asked to stop, as it is when a node
comes back; it is there to be seen by a test, not to be outrun.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from elastic_job import PRELOADED, RANKS
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from training import recipe, start

from cinemesh.launch.cluster.processes import StopSignal
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.perf_model.clusters.cluster import FOLDER

HELD = 8
WAIT_S = 240.0  # for what a test waits for: far more than it takes
SETTINGS = {"is_host": False, "last_call_timeout": 2, "keep_alive_interval": 1, "keep_alive_max_attempt": 3}


@dataclass
class Nodes:
    """Those of a job; ``said``: what all wrote."""

    recipe: Path
    most: int
    said: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it outlives every node

    def start(self, count: int) -> None:
        given = [__file__, self.recipe, self.store.port, self.most - 1, self.most, HELD]
        own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else a node that comes back looks for that of a round
        for _ in range(count):
            with self.said.open("ab") as file:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, given)],
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                        env=os.environ | own_store,
                    )
                )

    def lose_one(self) -> None:
        """The last of them, with all that runs there: as when its power goes."""
        node = self.running.pop()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def wait_for(self, words: str) -> None:
        """Until somebody has said it."""
        until = time.monotonic() + WAIT_S
        while words not in self.said.read_text():
            assert time.monotonic() < until and all(node.poll() is None for node in self.running), self.said.read_text()
            time.sleep(0.1)

    def close(self) -> None:
        for node in self.running:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def lose_and_regain(clips: Path, folder: Path, nodes: int) -> tuple[list[str], dict[int, float], dict[int, float]]:
    """A job that loses a node of two ranks, goes on, and has it back: plans, losses by step, and those undisturbed."""
    folder.mkdir()
    values = elastic_recipe(clips, folder, nodes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    job = Nodes(folder / "recipe.yaml", nodes, folder / "said")
    try:
        job.start(nodes)
        job.wait_for("step-00000004")
        job.lose_one()
        job.wait_for("held")
        job.start(1)
        codes = [node.wait(timeout=WAIT_S) for node in job.running]
    finally:
        job.close()
    said = job.said.read_text()
    assert codes == [0] * nodes, said
    check_lost(said)
    alone = values | {"plan": {"dtype": "float64"}, "cluster": None}
    alone["logging"] = values["logging"] | {"directory": str(folder / "alone")}
    assert start(alone, folder) == 0
    plans = [line for line in said.splitlines() if "processes on cpu; " in line]
    return plans, _losses(folder / "run"), _losses(folder / "alone")


def check_lost(said: str) -> None:
    """One message tells of the loss, with what was lost; nobody's connections are blamed."""
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "RuntimeError", "[rank"))]
    lost = r"ranks \d+, \d+ of .* \(node \d+\) do not answer, nor their watchdogs"
    of_the_store = "rank 0 on 127.0.0.1, which held the store of the job, is gone"
    assert len(errors) == 1 and re.match(f"error: ({lost}|{of_the_store})", errors[0]), errors


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}


def elastic_recipe(clips: Path, folder: Path, nodes: int) -> dict[str, Any]:
    """Planned for the ranks that are there, in float64; the global batch is the same whatever they are."""
    cluster = yaml.safe_load((FOLDER / "local-cpu.yaml").read_text())
    cluster["topology"]["gpus_per_server"]["value"] = RANKS * nodes  # of one machine
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    values = recipe(clips, folder)
    values |= {"plan": {"auto": True, "dtype": "float64"}, "cluster": str(folder / "cluster.yaml")}
    values["data"]["global_batch"], values["schedule"]["steps"] = 24, 14
    values["logging"] |= {"every": 1, "checkpoint_every": 2, "validate_every": 0}
    values["logging"] |= {"memory_every": 1, "memory_folder": str(folder / "memory")}  # of no use to another plan
    return values


# -- on a node --------------------------------------------------------------------------------------------------------


def main() -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    recipe, port, least, most, hold = sys.argv[1:]
    multiprocessing.set_forkserver_preload(PRELOADED)
    config = LaunchConfig(
        min_nodes=int(least),
        max_nodes=int(most),
        nproc_per_node=RANKS,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs=dict(SETTINGS),
        max_restarts=3,
        start_method="forkserver",
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    elastic_launch(config, life)(recipe, int(most) * RANKS, int(hold))


def life(recipe: str, all_ranks: int, hold: int) -> None:
    """Of one rank."""
    from cinemesh.launch import train
    from cinemesh.launch.cluster import sidecar
    from cinemesh.launch.training import steps

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sidecar.LEAST_S = WAIT_S  # a node that starts is slow
    load = steps.StepLoop._load

    def loaded(self: Any, step: int, stop: StopSignal) -> bool:
        if int(os.environ["WORLD_SIZE"]) < all_ranks and step == hold:
            print("held", flush=True)
            while stop.signum is None:
                time.sleep(0.05)
        return load(self, step, stop)

    steps.StepLoop._load = loaded
    sys.argv = ["train", recipe]
    train.main()


if __name__ == "__main__":
    main()
