"""The doctor: a sound machine passes, and each thing that is wrong is named, with what there is to do."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.launch.cluster import alike
from cinemesh.launch.cluster.cards import CardFacts, cards_here
from cinemesh.launch.health import facts as module
from cinemesh.launch.health.checks import Wanted, check, fit
from cinemesh.launch.health.facts import MachineFacts, machine_facts
from cinemesh.perf_model.clusters.cluster import load

CARD = CardFacts(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85_000_000_000,
    used_bytes=600_000_000,
    clock_mhz=1980,
    most_clock_mhz=1980,
    power_cap_w=700.0,
    usual_cap_w=700.0,
    temperature_c=40,
    ecc_on=True,
    ecc_errors=0,
    rows_failed=False,
    links=(18, 18),
)
SOUND = MachineFacts(
    host="n1",
    software={"torch": "2.13.0"},
    overlap_lost="",
    cards=[replace(CARD, index=index) for index in range(8)],
    no_cards="",
    strangers=[],
    ports={f"mlx5_{index}/1": "ACTIVE" for index in range(8)},
    shm_bytes=10**12,
    open_files=10**6,
    memory_bytes=10**12,
    cores=96,
    directory="/runs",
    disk_bytes=10**12,
    clock_ahead_s=0.001,
)
WANTED = Wanted(device="cuda", ranks_of_a_node=8, cluster=load("grand-teton-h100"))


def with_card(**changes: Any) -> list[CardFacts]:
    return [*SOUND.cards[:5], replace(SOUND.cards[5], **changes), *SOUND.cards[6:]]


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "said"),
    [
        ({"cards": SOUND.cards[:7]}, "GPUs", "fault", "7 x NVIDIA H100 80GB HBM3: 8 are needed"),
        ({"cards": [], "no_cards": "NVML: no driver"}, "GPUs", "fault", "NVML: no driver: 8 are needed"),
        ({"cards": with_card(name="NVIDIA H100 PCIe")}, "GPUs", "fault", "H100 PCIe"),
        ({"cards": with_card(ecc_errors=2)}, "ECC", "fault", "uncorrected errors: GPU 5: 2"),
        ({"cards": with_card(rows_failed=True)}, "ECC", "fault", "GPU 5"),
        ({"cards": with_card(ecc_on=False)}, "ECC", "warning", "GPU 5"),
        ({"cards": with_card(used_bytes=40_000_000_000)}, "memory", "fault", "40.0 GB of GPU 5"),
        ({"cards": with_card(slowed=("power brake",))}, "clocks", "fault", "GPU 5: power brake"),
        ({"cards": with_card(power_cap_w=500.0)}, "power cap", "warning", "GPU 5: 500 of 700 W"),
        ({"cards": with_card(links=(17, 18))}, "NVLink", "fault", "GPU 5: 17 of 18"),
        ({"strangers": ["0-5"]}, "peer access", "warning", "GPUs 0-5"),
        ({"ports": SOUND.ports | {"mlx5_3/1": "DOWN"}}, "NICs", "fault", "down: mlx5_3/1 DOWN: 8 are needed"),
        ({"shm_bytes": 64 * 2**20}, "/dev/shm", "fault", "64 MiB free, 8,192 MiB are needed"),
        ({"open_files": 256}, "open files", "fault", "may open 256, 512 are needed"),
        ({"clock_ahead_s": -3.5}, "clock", "fault", "-3.5 s"),
        ({"disk_bytes": 10**8}, "disk", "fault", "/runs has 0.10 GB free"),
        ({"disk_bytes": -1}, "disk", "fault", "/runs is not there"),
        ({"overlap_lost": "NCCL 2.26 loses it"}, "overlap", "warning", "NCCL 2.26 loses it"),
    ],
)
def test_one_thing_that_is_wrong_is_named_alone(changes: dict[str, Any], name: str, verdict: str, said: str) -> None:
    """A rule the wrong way round would let the node in, or blame another part of it."""
    assert {one.verdict for one in check(SOUND, WANTED)} == {"ok"}
    wrong = [one for one in check(replace(SOUND, **changes), WANTED) if one.verdict != "ok"]
    (found,) = wrong
    assert (found.name, found.verdict) == (name, verdict) and said in found.said
    assert fit(wrong) == (verdict == "warning") and (found.remedy or name == "power cap")


def test_without_a_gpu_the_rest_is_looked_at_and_it_says_so() -> None:
    """Shared memory need not be a GPU's there; full, it is a fault all the same."""
    bare = replace(SOUND, cards=[], no_cards="NVML: no driver", ports={}, shm_bytes=2**26)
    found = {one.name: one for one in check(bare, Wanted(device="auto", ranks_of_a_node=2))}
    assert fit([*found.values()]) and "NVML: no driver" in found["GPUs"].said and "NVLink" not in found
    assert not fit(check(replace(bare, shm_bytes=2**20), Wanted(device="cpu", ranks_of_a_node=2)))


def test_a_nic_that_is_down_is_no_fault_where_nobody_says_how_many_there_are() -> None:
    down = replace(SOUND, ports={"mlx5_0/1": "ACTIVE", "mlx5_1/1": "DOWN"})
    assert fit(check(down, replace(WANTED, cluster=None))) and not fit(check(down, WANTED))


def test_this_machine_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the system's own words: a limit of another kind, or the wrong file system, would pass unseen."""
    here = machine_facts(tmp_path)
    assert here.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = os.statvfs(tmp_path)
    assert abs(here.disk_bytes - free.f_bavail * free.f_frsize) < 5e9 and here.clock_ahead_s is not None
    assert abs(here.clock_ahead_s) < 1 and here.software["python"] == ".".join(map(str, sys.version_info[:3]))
    real = time.time
    monkeypatch.setattr(module.time, "time", lambda: real() + 60)
    skewed = machine_facts(tmp_path).clock_ahead_s
    assert skewed is not None and 59 < skewed < 62
    assert machine_facts(tmp_path / "gone").disk_bytes == -1


def test_ports_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        (tmp_path / name / "ports" / "1").mkdir(parents=True)
        (tmp_path / name / "ports" / "1" / "state").write_text(state)
    assert module._ports(tmp_path) == {"mlx5_0/1": "ACTIVE", "mlx5_1/1": "DOWN"}


def test_a_file_that_differs_is_another_software(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Same release, edited on one node: only the code's own number tells."""
    copy = tmp_path / "launch" / "cluster" / "alike.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("a = 1\n")
    monkeypatch.setattr(alike, "__file__", str(copy))
    before = alike.code.__wrapped__()
    copy.write_text("a = 2\n")
    assert alike.code.__wrapped__() != before


def test_a_card_is_read_as_nvml_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliwatts, the bits of throttling, and what a card does not tell, which is no fault."""
    import pynvml

    memory = SimpleNamespace(total=80, used=1)
    told = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "card",
        "nvmlDeviceGetMemoryInfo": lambda handle: memory,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 500_000,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda handle: 700_000,
        "nvmlDeviceGetRemappedRows": lambda handle: (0, 1, 1, 0),
        "nvmlDeviceGetEccMode": lambda handle: (1, 1),
        "nvmlDeviceGetTotalEccErrors": lambda handle, kind, counter: 3,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4 | 0x40,
        "nvmlDeviceGetClockInfo": lambda handle, clock: 1500,
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: 1980,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 60,
    }
    for name, ask in told.items():
        monkeypatch.setattr(pynvml, name, ask)

    def links(handle: int, link: int) -> int:
        if link > 3:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(link != 2)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetNvLinkState", links)
    (card,), why = cards_here()
    assert why == "" and (card.power_cap_w, card.usual_cap_w, card.ecc_errors, card.rows_failed) == (500, 700, 3, True)
    assert card.slowed == ("heat (hardware)",) and card.links == (3, 4) and card.ecc_on


def test_the_command_says_it_and_its_exit_code_tells(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--directory", str(tmp_path)])
    assert good.exit_code == 0 and good.stdout.endswith("fit to train\n"), good.stdout
    bad = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--directory", str(tmp_path / "gone"), "--json"])
    told = json.loads(bad.stdout)
    assert bad.exit_code == 1 and not told["fit"]
    assert [one["name"] for one in told["machines"][0]["checks"] if one["verdict"] == "fault"] == ["disk"]
