"""Which device a process computes on, by what it sees: with a pretended CUDA, there need be no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import typer
import yaml
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from training import refusal

from cinemesh.errors import CinemeshError
from cinemesh.launch import cli
from cinemesh.launch import train as entry
from cinemesh.launch.cluster import environment
from cinemesh.launch.cluster.environment import check_kernel_cache, claim, device_here
from cinemesh.launch.cluster.processes import launch
from cinemesh.launch.elastic import missing_own_store
from cinemesh.launch.options import Device
from cinemesh.launch.training import needs
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting

pytestmark = pytest.mark.usefixtures("one_process")
CONFIGS = Path(cli.__file__).parent.parent / "configs"


def sees(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: gpus)


@pytest.mark.parametrize(
    ("wanted", "gpus", "local", "local_rank", "device"),
    [
        ("auto", 0, 8, 3, "cpu"),
        ("auto", 8, 8, 3, "cuda:3"),  # all visible
        ("auto", 8, 2, 1, "cuda:1"),
        ("auto", 1, 8, 3, "cuda:0"),  # one left to each process
        ("auto", 1, 1, 3, "cuda:0"),  # the same of a launcher that does not tell LOCAL_WORLD_SIZE
        ("cuda", 1, 8, 3, "cuda:0"),
        ("cpu", 8, 8, 3, "cpu"),
        ("auto", 1, 1, None, "cuda:0"),  # started by hand: no launcher
        ("auto", 4, 4, None, "cuda:0"),
        ("auto", 0, 4, None, "cpu"),
    ],
)
def test_a_process_finds_its_gpu_by_what_it_sees(
    wanted: Device, gpus: int, local: int, local_rank: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of another rank's number was looked for beside ``srun --gpus-per-task=1``: the job ran on CPUs."""
    sees(gpus, monkeypatch)
    if local_rank is not None:
        for name, value in {"RANK": 11, "WORLD_SIZE": 16, "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, str(value))
    assert device_here(wanted, local) == device


@pytest.mark.parametrize(
    ("wanted", "gpus", "local", "rank", "said"),
    [
        ("auto", 1, 2, None, "2 processes on this machine, and GPUs visible: 1"),  # their parent: they see what it sees
        ("cuda", 3, 4, None, "4 processes on this machine, and GPUs visible: 3"),
        ("auto", 2, 4, 3, "4 processes on this machine, and GPUs visible: 2"),
        ("auto", 2, 1, 5, "6 processes on this machine, and GPUs visible: 2"),  # LOCAL_WORLD_SIZE is not told
        ("cuda", 0, 1, None, "device is cuda, and "),
        ("cuda", 0, 8, 3, "device is cuda, and "),
    ],
)
def test_fewer_gpus_than_processes_never_end_on_the_cpu_by_themselves(
    wanted: Device, gpus: int, local: int, rank: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sees(gpus, monkeypatch)
    if rank is not None:
        for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(CinemeshError) as refused:
        device_here(wanted, local)
    assert str(refused.value).startswith(said)
    assert "--device cpu, or device: cpu in the recipe" in str(refused.value)


def test_two_ranks_on_one_gpu_or_on_two_kinds_of_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a GPU tells one that is shared from one that each process calls cuda:0."""
    numbers = iter(["GPU-a", "GPU-b", "GPU-a"])
    monkeypatch.setattr(environment, "number_of", lambda device: next(numbers))
    store = HashStore()
    claim(store, 5, "cuda:0")
    claim(store, 2, "cuda:0")
    with pytest.raises(CinemeshError, match=r"^ranks 5 and 7 compute on one GPU, GPU-a; .*--device cpu"):
        claim(store, 7, "cuda:3")
    with pytest.raises(CinemeshError, match=r"^rank 6 computes on cpu, rank 5 on cuda; .*--device cpu"):
        claim(store, 6, "cpu")
    store = HashStore()
    for rank in (1, 0):
        claim(store, rank, "cpu")
    with pytest.raises(CinemeshError, match=r"^rank 2 computes on cuda, rank 1 on cpu; "):
        claim(store, 2, "cuda:0")


# Two ranks that each see one GPU, whose numbers are given, up to where NCCL would begin: there one that is not refused
# waits for the one that is, or ends.
SEEING_ONE = """
import os
from pathlib import Path

import torch
from cinemesh.launch.cluster import environment, processes
from cinemesh.parallel.ir.plan import Plan

environment.visible_gpus = lambda: 1
environment.number_of = lambda device: NUMBERS[int(os.environ["RANK"])]
torch.cuda.set_device = Path(FOLDER, os.environ["RANK"]).write_text
def instead_of_nccl():
    if NUMBERS[0] == NUMBERS[1]:
        processes._meeting.store.wait([processes.FIRST_FAILURE])
    os._exit(0)

processes.set_up_nccl = instead_of_nccl
with processes.joined(Plan(tp=2), "auto"):
    pass
"""


@pytest.mark.parametrize("numbers", [("GPU-a", "GPU-a"), ("GPU-a", "GPU-b")])
def test_ranks_compare_their_gpus_when_they_meet(
    numbers: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real processes, through the store of their job: what one alone cannot know."""
    code = SEEING_ONE.replace("NUMBERS", repr(numbers)).replace("FOLDER", repr(str(tmp_path)))
    ended = launch(2, exec, code, {})
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    said = capfd.readouterr().err
    assert found == {"0": "cuda:0", "1": "cuda:0"}
    if numbers[0] == numbers[1]:
        assert ended == 2 and said.count("error: ") == 1
        assert "compute on one GPU, GPU-a; start one process a GPU" in said
    else:
        assert ended == 0 and "error" not in said


def test_a_run_that_ends_on_the_cpu_unasked_says_so_in_its_first_line(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of the kind where the recipe asks for the CPU."""
    sees(0, monkeypatch)
    values["schedule"] = {"steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for device, said in (("auto", True), ("cpu", False)):
        entry.run(config=tmp_path / "recipe.yaml", nproc=None, overrides=[f"device={device}"])
        told = capsys.readouterr()
        assert ("computing on the CPU: " in told.err.partition("\n")[0]) == said == ("computing" in told.err)
        assert "processes on cpu" in told.out


def test_a_run_of_more_processes_than_gpus_is_refused_before_it_writes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process that would start them: it knows that they will see what it sees."""
    values["plan"]["tp"] = 2
    sees(1, monkeypatch)
    for device in ("auto", "cuda"):
        said = refusal(values, tmp_path, f"device={device}", nproc=2)
        assert "2 processes on this machine, and GPUs visible: 1" in said and "device: cpu in the recipe" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(("device", "on_gpus"), [("auto", True), ("cpu", False)])
def test_memory_is_asked_for_where_processes_compute(
    device: str, on_gpus: bool, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same decision as the ranks': of the GPUs, or of the host alone."""
    sees(2, monkeypatch)
    of_host, of_gpus = list[bool](), list[int]()
    monkeypatch.setattr(needs, "check_host_memory", lambda *_, on_gpus=False, **__: of_host.append(on_gpus))
    monkeypatch.setattr(needs, "check_device_memory", lambda programs, *_: of_gpus.append(len(programs)))
    setting = Setting.of(check_config(values | {"device": device, "plan": {"tp": 2, "dtype": "float32"}}, "test"))
    needs.check_training_memory(setting)
    assert of_host[-1] is on_gpus and of_gpus == ([1] if on_gpus else [])


def test_every_command_that_starts_ranks_takes_a_device_and_every_recipe_names_one() -> None:
    """A CPU recipe without it would be refused on a machine with one GPU, where it asks for two processes."""
    group: Any = typer.main.get_command(cli.app)
    options = {name: {option.name for option in command.params} for name, command in group.commands.items()}
    starting = {name for name, names in options.items() if "nproc" in names}
    assert starting == {"train", "stages", "sample", "upsample", "replay", "profile", "calibrate"}
    assert all("device" in options[name] for name in starting)
    recipes = {path.name: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    recipes = {
        name: cast(dict[str, Any], values)
        for name, values in recipes.items()
        if isinstance(values, dict) and {"model", "data"} <= {*values}
    }
    assert recipes.keys() >= {"quickstart.yaml", "buckets.yaml"}
    for name, values in recipes.items():
        assert values.get("device") == ("cuda" if values.get("cluster", "local-cpu") != "local-cpu" else "cpu"), name


@pytest.mark.parametrize(
    ("nodes", "restarts", "agents", "warned"),
    [(4, 3, "True", True), (1, 3, "True", False), (4, 0, "True", False), (4, 3, "False", False)],
)
def test_a_job_whose_nodes_may_come_back_is_told_how_to_start_it(
    nodes: int, restarts: int, agents: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what torchrun tells its ranks; where it keeps no store over all rounds, nobody needs to be told."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agents)
    lacks = missing_own_store()
    assert (lacks is not None) == warned
    assert lacks is None or lacks.startswith("start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: ")


def test_kernels_are_loaded_from_a_folder_of_ones_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user of a node may have made it first, with theirs inside; compiled kernels are code."""
    mine = tmp_path / "a" / "mine"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(mine))
    check_kernel_cache()
    assert mine.is_dir() and mine.stat().st_mode & 0o777 == 0o700
    check_kernel_cache()  # again: it is there
    mine.chmod(0o777)
    with pytest.raises(CinemeshError, match="with mode 777: kernels there are run as code"):
        check_kernel_cache()
    mine.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(mine)
    for bad in (link, tmp_path / "file"):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(bad))
        with pytest.raises(CinemeshError, match="TRITON_CACHE_DIR"):
            check_kernel_cache()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(mine))
    monkeypatch.setattr(environment.os, "getuid", lambda: 12345)
    with pytest.raises(CinemeshError, match="must be a folder of user 12345"):
        check_kernel_cache()
