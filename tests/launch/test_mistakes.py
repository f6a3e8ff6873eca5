"""Mistakes that end a run: each is one clear message, exit code 2, and nothing half written."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from training import cinemesh, failure, recipe, refusal, start, states

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import processes
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.processes import Joined
from cinemesh.launch.storage import places
from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.checkpoint.manifest import COUNTERS
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model.inputs import LATENTS
from cinemesh.model.runner import Batch, StepRunner

pytestmark = pytest.mark.usefixtures("one_process")


def test_a_world_size_that_does_not_match(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "tp(1) * cp(1) * dp_shard(1) = 1 != world size 2" in refusal(values, tmp_path, nproc=2)
    assert "tp(2) * cp(1) * dp_shard(1) = 2 != world size 1" in refusal(values, tmp_path, "plan.tp=2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "!= world size 3" in refusal(values, tmp_path)
    assert "--nproc 2 inside a job of 3 processes" in refusal(values, tmp_path, nproc=2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.buckets=[{}, {frames: 21}]"], "21x32x32 needs 21 frames at 24 frames/s, 0.875 s, and no scene"),
        (["data.buckets=[{frames: 13}, {frames: 20}]"], "scene right lasts 0.5005 s, and no bucket takes it"),
        (["sample.scenes=[right]", "data.buckets=[{frames: 13}, {}]"], "sample.scenes: right has no window in bucket"),
    ],
)
def test_what_only_the_clips_tell_ends_a_run_before_its_first_step(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    """How long a scene lasts stands in its video alone."""
    values["sample"] = {"steps": 2}
    assert start(values, tmp_path, *overrides) == processes.USER_ERROR
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "nproc", "expected"),
    [
        (["plan.tp=4", "model.heads=6"], 4, "heads(6) % tp(4) = 2"),
        (["plan.cp=3"], 3, "tokens of a 1x4x4 latent(4) % (cp(3) * tp(1) = 3) = 1"),
        (["plan.dp_shard=3"], 3, "global batch(2) % (dp_shard(3) * dp_replicate(1) * micro_batches(1) = 3) = 2"),
        (["model.position_lengths=[1,1,1]"], None, "the table of model tiny has 1"),
        (["model.preset=tinny"], None, "did you mean 'tiny'?"),
        (["data.encoders.tokens=3"], None, "--set 'data.encoders.tokens=3'"),
        (["optimizer.lrr=3"], None, "did you mean 'lr'?"),
        (["sample.scenes=[lft]"], None, "no scene 'lft'; did you mean 'left'?"),
        (["data.buckets=[]"], None, "data.buckets is empty"),
        (["data.buckets=[{hight: 32}]"], None, "unknown key 'data.buckets.0.hight'; did you mean 'height'?"),
        (["data.buckets=[{width: 0}]"], None, "data.buckets.0.width is 0; it must be 1 to 8,192"),
        (["data.buckets=[{}, {weight: 0}]"], None, "data.buckets.1.weight is 0; it must be 1e-06 to 1000000"),
        (["data.buckets=[{weight: .inf}]"], None, "data.buckets.0.weight is '.inf'"),
        (["data.buckets=[{height: 20}]"], None, "height(20) % 8 = 4 in 8x20x32; the codec needs a multiple of 8"),
        (["data.buckets=[{}, {frames: 8}]"], None, "data.buckets: 2 are called 8x32x32"),
        (["data.buckets=[{}, {frames: 7, global_batch: 4}]"], None, "latents of 1x4x4 come in steps of 4 and of 2"),
        (["data.buckets=[{}, {height: 16}]", "plan.cp=4"], 4, "tokens of a 1x2x4 latent(2) % (cp(4) * tp(1) = 4) = 2"),
        (["data.buckets=[{}, {width: 128}]"], None, "the table of model tiny has 6"),
        (["sample.bucket=8x32x64"], None, "sample.bucket is '8x32x64'; the data have the buckets 8x32x32"),
    ],
)
def test_a_plan_or_recipe_that_does_not_fit_is_refused_before_anything_is_written(
    values: dict[str, Any], tmp_path: Path, overrides: list[str], nproc: int | None, expected: str
) -> None:
    assert expected in refusal(values, tmp_path, *overrides, nproc=nproc)


def test_a_port_in_use(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values["plan"]["tp"] = 2
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert f"port {port} (MASTER_PORT) is in use" in refusal(values, tmp_path, nproc=2)
    for wrong in ("many", "0", "65536"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        assert f"MASTER_PORT is '{wrong}'" in refusal(values, tmp_path, nproc=2)


def test_ranks_that_cannot_meet_say_where(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same port, under a launcher that does not look: the store itself finds it in use."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**names, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        values["plan"]["tp"] = 2
        message = failure(values, tmp_path, capsys)
    assert f"rank 0 cannot meet the others at 127.0.0.1:{port}" in message and "another MASTER_PORT" in message


@pytest.mark.slow
def test_one_failure_of_many_ranks_is_one_message(clips: Path, tmp_path: Path) -> None:
    """Through the real launcher: rank 0 finds the video missing while rank 1 waits for it."""
    values = recipe(clips, tmp_path, tp=2)
    values["data"]["clips"] = [str(tmp_path / "absent.mp4")]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = cinemesh("train", tmp_path / "recipe.yaml", "--nproc", 2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == processes.USER_ERROR
    assert done.stderr.count("error: ") == 1 and "no video file at" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


LATE = """
import atexit, sys, time
from pathlib import Path

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import processes
from cinemesh.parallel.ir.plan import Plan


def work(folder: Path) -> None:
    with processes.joined(Plan(tp=2), "cpu") as place:
        if place.rank == 0:
            atexit.register(linger, folder / "rank 1 has ended")
            raise CinemeshError("the cause")
        processes._meeting.store.wait([processes.FIRST_FAILURE])
        atexit.register((folder / "rank 1 has ended").touch)
        raise RuntimeError("connection closed by peer")


def linger(other: Path) -> None:
    until = time.monotonic() + 60
    while not other.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)


if __name__ == "__main__":
    sys.exit(processes.launch(2, work, Path(sys.argv[1])))
"""


def test_the_cause_is_reported_though_another_rank_ends_first(tmp_path: Path) -> None:
    """The order of ends that a loaded machine may give, made certain: rank 0 speaks, rank 1 is gone before it.

    A launcher that reports the code of whichever process it finds ended first exits with 1 here, not 2.
    """
    (tmp_path / "late.py").write_text(LATE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "late.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert (tmp_path / "rank 1 has ended").exists()
    assert done.returncode == processes.USER_ERROR
    assert "error: the cause\n" in done.stderr and "connection closed by peer" not in done.stderr, done.stderr


def test_the_first_rank_to_fail_speaks_and_a_bug_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    monkeypatch.setattr(processes, "_meeting", Meeting(HashStore(), "a", 0, 2))
    assert processes.rank_main(fail(CinemeshError("the cause"))) == processes.USER_ERROR
    monkeypatch.setenv("RANK", "1")
    # Whichever process ends first, the launcher then reports the cause's code.
    assert processes.rank_main(fail(RuntimeError("connection closed by peer"))) == processes.USER_ERROR
    assert capsys.readouterr().err == "error: the cause\n"
    monkeypatch.setattr(processes, "_meeting", None)
    assert processes.rank_main(fail(RuntimeError("a bug"))) == processes.BUG
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "RuntimeError: a bug" in shown


def test_a_video_that_is_missing_or_cut_short(
    values: dict[str, Any], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "a.mp4"
    values["data"]["clips"] = [str(video)]
    assert "no video file at" in failure(values, tmp_path, capsys)
    whole = (clips / "a.mp4").read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    assert f"clips cannot be trained on, and data.bad_share is 0.01: {video}" in failure(values, tmp_path, capsys)
    assert not (tmp_path / "cache" / "versions").exists() and not (tmp_path / "run").exists()


def test_a_shard_that_is_truncated_or_damaged(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting.of(check_config(values, "test"))
    open_history(setting, Joined(0, "cpu", None))
    (tar,) = (tmp_path / "cache" / "latents").glob("*/8x32x32.train.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000])
    message = failure(values, tmp_path, capsys)
    assert f"{tar} is cut short: " in message and " bytes at offset 512 are wanted, and there are 1,488" in message
    tar.write_bytes(whole[:1500] + bytes([whole[1500] ^ 1]) + whole[1501:])  # its first member ends at 1,616
    message = failure(values, tmp_path, capsys)
    assert f"{tar} is damaged at offset 512: its " in message and "and the index says" in message


def test_a_checkpoint_of_another_model(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["schedule"] = {"steps": 1}
    assert start(values, tmp_path) == 0
    capsys.readouterr()
    values["model"]["layers"] = 1
    message = failure(values, tmp_path, capsys)
    assert "is of another model: layers is 2 there and 1 here" in message and "output directory" in message


def test_too_little_disk_for_a_checkpoint(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "free_bytes", lambda path: 1000)
    assert "1,000 free" in failure(values, tmp_path, capsys)
    assert not list((tmp_path / "run" / FOLDER).iterdir())


def blow_up(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """In these steps (from 1) the latents are finite, but their squares are not."""
    load = StepRunner.load

    def loaded(self: StepRunner, micro_batch: int, batch: Batch) -> None:
        high = {LATENTS: batch[LATENTS] + 1e30} if self.steps_done + 1 in steps else {}
        load(self, micro_batch, {**batch, **high})

    monkeypatch.setattr(StepRunner, "load", loaded)


def test_a_gradient_that_is_not_finite_skips_the_update_and_is_told(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blow_up(monkeypatch, {2, 4})
    assert start(values, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("the update was skipped; samples [") == 2 and "step 4: loss inf" in out
    assert out.count("first not finite: mb0/final.forward/loss (velocity_loss), 1 of 1 values on rank 0") == 2
    assert states(tmp_path / "run", values)[COUNTERS].flatten().tolist() == [6, 4]
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 3 and all(loss < 10 for loss in losses)


def test_gradients_that_stay_infinite_end_the_run(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blow_up(monkeypatch, {2, 3, 4, 5, 6})
    message = failure(values, tmp_path, capsys)
    assert "step 6: loss inf" in message and "update 5 in a row" in message and "samples [" in message
    assert not (tmp_path / "run" / FOLDER).exists()  # nothing worth saving
