"""The first run on a GPU, tried without one: what would fail there for a silly reason fails here.

Only this sees a stage that needs what that machine has not, takes another's time, or loses what it had measured.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from benchmarks import first_gpu
from benchmarks.first_gpu import STAGES, Stage
from benchmarks.on_card import cases, machine, suite, timings
from benchmarks.on_card.stage import Here

from cinemesh.errors import CinemeshError
from cinemesh.perf_model.calibration import card

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "tests/benchmarks/first_gpu.py")]

# What that machine has of what cinemesh asks for: see first_gpu.py. Everything else is not there.
THERE = {"torch", "numpy", "pyyaml", "safetensors", "typer", "rich", "triton", "pytest", "hypothesis", "jinja2"}
MODULES = {"nvidia-ml-py": "pynvml", "pillow": "PIL", "scikit-video": "skvideo"}  # where the name is another
BLOCKED = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
sys.path.insert(0, {tests!r})
import importlib, pytest
from benchmarks import first_gpu, kernels_gpu
from benchmarks.pretended_cuda import pretended
with pretended():
    for stage in first_gpu.STAGES:
        getattr(importlib.import_module("benchmarks.on_card." + stage.module), stage.function)
from benchmarks.on_card.suite import files_of_kernels, files_with_mark
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files_of_kernels(), *files_with_mark()]))
"""


def absent() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(name for names in project["optional-dependencies"].values() for name in names)]
    names = {re.split(r"[^A-Za-z0-9_-]", text)[0].lower() for text in asked} - THERE - {"cinemesh"}
    return sorted(MODULES.get(name, name.replace("-", "_")) for name in names)


def test_stages_load_without_what_that_machine_has_not() -> None:
    """The stages themselves, and every module of the suite that two of them run."""
    assert {"pydantic", "av", "pynvml", "tensorboard", "PIL"} <= set(absent())
    script = BLOCKED.format(absent=absent(), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# -- the order and the time of stages ---------------------------------------------------------------------------------


def test_what_there_is_to_know_first_comes_first() -> None:
    assert [stage.number for stage in STAGES[:4]] == [0, 2, 4, 6]
    assert sorted(stage.number for stage in STAGES) == [*range(8)]
    assert sum(stage.seconds for stage in STAGES) == 540


# A stage of its own kind by number. 1 does not load, and says so when 2 is there; 2 leaves a note and hangs with a
# process of its own, deaf to all but a kill; 0 and 3 end.
FAKE = """
import json, os, pathlib, signal, subprocess, sys, time
number, folder = int(sys.argv[sys.argv.index("--stage") + 1]), pathlib.Path({folder!r})
if number == 1:
    while not (folder / "two.json").exists():
        time.sleep(0.01)
    sys.exit("it cannot load")
if number == 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "part").write_text(json.dumps({{"other": other.pid}}))
    os.replace(folder / "part", folder / "two.json")
seconds = float(sys.stdin.readline())
if number == 2:
    time.sleep(600)
(folder / ("zero.json" if number == 0 else "three.json")).write_text(json.dumps({{"seconds": seconds}}))
"""


def test_a_stage_that_hangs_or_dies_takes_nothing_from_the_others(tmp_path: Path) -> None:
    """And it leaves no process behind. What a killed one had noted is there."""
    parts = {0: ("zero", 40.0), 1: ("one", 40.0), 2: ("two", 0.5), 3: ("three", 40.0)}
    stages = [Stage(number, name, seconds, "") for number, (name, seconds) in parts.items()]
    command = [sys.executable, "-c", FAKE.format(folder=str(tmp_path))]
    code = first_gpu.run(stages, tmp_path, 120.5, command, smoke=True)
    written = json.loads((tmp_path / first_gpu.RESULT).read_text())
    zero, one, two, three = written["stages"]
    assert code == 1 and written["smoke"] is True
    assert [stage["ended"] for stage in written["stages"]] == ["ok", "failed", "out of time", "ok"]
    assert "it cannot load" in (tmp_path / "one.log").read_text() and one["found"] == {}
    assert zero["found"]["seconds"] <= 40 < three["found"]["seconds"] <= 80, "its own, and what others left"
    assert not alive(two["found"]["other"])


def alive(pid: int) -> bool:
    """Not so of one that ended and that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


# -- the stages, on a pretended card ----------------------------------------------------------------------------------


def numbers(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key below."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield (*path, key)
            yield from numbers(value, (*path, key))
    elif isinstance(values, list):
        for value in values:
            yield from numbers(value, path)


def smoked(folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What every stage found in a smoke run, none of which may have failed, or call a number measured."""
    done = subprocess.run([*COMMAND, "--smoke", "--out", str(folder), *options], capture_output=True, text=True)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    written = json.loads((folder / first_gpu.RESULT).read_text())
    assert written["smoke"] is True
    assert not [path for path in numbers(written) if "measured" in path], "no number of a smoke run is a measurement"
    return {stage["name"]: stage["found"] for stage in written["stages"]}


def check_rank(found: dict[str, Any]) -> None:
    assert found["capture"] == "captured" and found["finite"] is True
    assert found["replay"]["predicted"].keys() == found["replay"]["smoke"].keys() == {"step_s", "host_s"}
    assert found["eager"]["predicted"]["step_s"] == found["replay"]["predicted"]["step_s"] > 0


def test_a_cut_of_the_smoke_run(tmp_path: Path) -> None:
    found = smoked(tmp_path, "--only", "0", "6", "--seconds", "600")
    assert found["machine"]["versions"]["torch"] == torch.__version__ and found["machine"]["usual"] == {}
    assert found["machine"]["limits"].keys() == {"predicted", "smoke"}
    check_rank(found["rank"])


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(tmp_path: Path) -> None:
    found = smoked(tmp_path, "--seconds", "1200")
    check_rank(found["rank"])
    assert found["parity"]["ok"] is True and len(found["parity"]["cases"]) == 2
    assert found["timings"]["complete"] is True and found["timings"]["failed"] == []
    assert len(found["timings"]["kernels"]) == len(cases.calls(smoke=True)), "one kernel of each call was chosen"
    assert all(row["predicted"]["seconds"] > 0 for row in found["timings"]["kernels"])
    for ran in (found["kernels"], found["marked"]):
        assert set(ran["exit_codes"].values()) == {0} and ran["failed"] == []
    assert found["kernels"]["passed"] > 20 and sum(found["marked"]["skipped"].values()) > 10
    training = found["training"]
    assert training["resumed"]["states_bitwise"] is True and training["resumed"]["next_loss_bitwise"] is True
    assert training["finite"] is True and training["capture"] == "captured"
    tiles = [row for row in found["tiles"]["tiles"] if not row["default"]]
    assert len(tiles) >= 15 and {row["tile"]["BLOCK_KEYS"] for row in tiles} >= {128}
    ours = {row["kernel"]: row["tile"].get("HELD") for row in found["tiles"]["tiles"] if row["default"]}
    turned = {row["kernel"] for row in tiles if row["tile"].get("HELD") != ours[row["kernel"]]}
    assert turned == {"attention.forward", "attention_backward.queries"}, "q in registers, or not"
    with pytest.raises(CinemeshError, match="unknown key 'smoke'"):
        card.write(tmp_path / "card.json", "dgx-h100-ib400", tmp_path / "x.yaml")


def test_what_nvidia_smi_says() -> None:
    line = "NVIDIA H200, 580.65.06, 1980 MHz, 1980 MHz, 3201 MHz, 118.34 W, 700.00 W, 31, 143771 MiB\n"
    found = machine.told(line)
    assert found["name"] == "NVIDIA H200" and found["power.limit"] == "700.00 W"
    assert found["temperature.gpu"] == "31" and len(found) == len(machine.ASKED)


def test_outcomes_of_tests_some_of_which_were_killed(tmp_path: Path) -> None:
    """A file of tests that hangs costs its own outcomes behind the last one, nobody else's."""
    hangs = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n"
    fails = "import pytest\ndef test_c(): assert 1 == 2\n@pytest.mark.skip(reason='why')\ndef test_d(): pass\n"
    for name, text in (("test_hangs.py", hangs), ("test_fails.py", fails)):
        (tmp_path / name).write_text(text)
    outcomes = tmp_path / "tests"
    here = Here("cpu", True, float("inf"), tmp_path, tmp_path / "tests.json")

    class Told(Here):
        @property
        def left_s(self) -> float:
            """Over when all that can end has ended."""
            told = "".join(file.read_text() for file in outcomes.glob("*.jsonl"))
            return 0.0 if all(name in told for name in ("test_a", "test_c", "test_d")) else 60.0

    suite.run(Told(**vars(here)), [str(tmp_path / "test_hangs.py"), str(tmp_path / "test_fails.py")])
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["passed"] == 1 and found["skipped"] == {"Skipped: why": 1}
    (failed,) = found["failed"]
    assert failed["test"].endswith("::test_c") and "assert 1 == 2" in failed["said"]
    assert found["exit_codes"][str(tmp_path / "test_hangs.py")] is None
    assert "tests/parallel/runtime/test_graph.py" in suite.files_with_mark()


def test_a_kernel_that_is_not_the_fastest_is_told() -> None:
    sizes = {"t": 2, "s": 2}
    row = {"op": "attention", "sizes": sizes, "dtype": "bfloat16", "of_limit": 0.5, "limit": "tensor", "error": 0.0}
    chosen = row | {"package": "cudnn", "seconds": 1.0, "chosen": True}
    slower, faster = (row | {"package": p, "seconds": s, "chosen": False} for p, s in (("a", 0.99), ("triton", 0.97)))
    assert timings.not_the_fastest([chosen, slower]) == []
    (said,) = timings.not_the_fastest([chosen, faster, slower])
    assert "cudnn" in said and "triton" in said
