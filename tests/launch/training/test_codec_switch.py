"""A run that begins on latents of another codec: the two weights that know latents, by hand; and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY, filled, plan_of, runner_of, whole_states
from harness import Pool
from training import recipe, refusal, start

from cinemesh.data.codec import BlockDCTCodec
from cinemesh.errors import CinemeshError
from cinemesh.launch.training.checkpoint.choosing import FOLDER, VALIDATION_LOSS
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.launch.training.codec_switch import LATENTS_OF, check_switch, latents_noted, switched
from cinemesh.launch.training.recipe import StartFrom
from cinemesh.launch.training.start import begin
from cinemesh.launch.training.telemetry import LOG_FILE
from cinemesh.model.config import LatentCondition, ModelConfig, parameters
from cinemesh.model.weights import full, initial_values, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process")


class Coarse(BlockDCTCodec):
    """The fixed codec of TINY's four channels, standardised by numbers of its own."""

    channels = TINY.channels

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(TINY.channels), factor * torch.arange(1, TINY.channels + 1).float()
        self.factor = factor

    @property
    def fingerprint(self) -> str:
        return f"coarse-{self.factor}"


def written_by(codec: BlockDCTCodec, directory: Path) -> Path:
    save(
        directory, filled(runner_of(plan_of(""), None)), note={LATENTS_OF: latents_noted(codec), VALIDATION_LOSS: 0.75}
    )
    return directory / "step-00000007"


def switched_under(plan: Plan, section: StartFrom, codec: BlockDCTCodec) -> tuple[dict[str, Any], list[str]]:
    runner = runner_of(plan, Mesh(plan) if plan.world_size > 1 else None)
    told = begin(section, runner, 3, codec)
    return whole_states(runner), told.lines


@pytest.mark.parametrize("latents", ["rescale", "anew"])
def test_what_reads_and_makes_latents_follows_the_codec(pool: Pool, tmp_path: Path, latents: Any) -> None:
    """Every other weight is the checkpoint's; of these two a channel at a time, by hand; alike under any plan."""
    section = StartFrom(checkpoint=written_by(Coarse(1.0), tmp_path), weights="master", latents=latents)
    due = full(parameters(TINY), probe_values(0), torch.float64)
    first = full(parameters(TINY), initial_values(3), torch.float64)
    values = TINY.patch_features // TINY.channels
    for name in ("patchify.weight", "final.weight"):
        if latents == "anew":
            due[name] = first[name]
            continue
        for channel in range(TINY.channels):  # stds of (c + 1) become those of 2.5 (c + 1)
            rows = slice(channel * values, (channel + 1) * values)
            if name == "patchify.weight":
                due[name][rows] *= 2.5
            else:
                due[name][:, rows] /= 2.5
    (held, lines), *_ = pool.run(4, switched_under, plan_of("tp=2,cp=2"), section, Coarse(2.5))
    one, _ = switched_under(plan_of(""), section, Coarse(2.5))
    for name, value in due.items():
        for got in (one, held):
            assert (got["master"][name] - value).abs().max() <= 1e-14 * max(1.0, float(value.abs().max())), name
            assert torch.equal(got["ema"][name], got["master"][name])
    assert lines[-1].startswith("latents are those of coarse-2.5, of coarse-1.0 before")


def test_rescaled_it_says_of_data_what_it_said() -> None:
    """A pixel's latent under both codecs, at t = 1, where no noise is: velocities in raw units are the same."""
    before, after = Coarse(1.0), Coarse(2.5)
    row = {row.name: row for row in parameters(TINY)}
    reads, makes = (torch.randn(row[name].shape, dtype=torch.float64) for name in ("patchify.weight", "final.weight"))
    section = StartFrom(checkpoint=Path("there"), latents="rescale")
    note = {LATENTS_OF: latents_noted(before)}
    new_reads = switched(section, note, row["patchify.weight"], reads, after, 0)
    new_makes = switched(section, note, row["final.weight"], makes, after, 0)
    values = TINY.patch_features // TINY.channels
    raw = torch.randn(TINY.patch_features, dtype=torch.float64)
    there, here = (c.std.double().repeat_interleave(values) for c in (before, after))
    torch.testing.assert_close((raw / there) @ reads, (raw / here) @ new_reads)
    hidden = torch.randn(TINY.width, dtype=torch.float64)
    torch.testing.assert_close((hidden @ makes) * there, (hidden @ new_makes) * here)


def test_other_latents_are_refused_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = written_by(Coarse(1.0), tmp_path)
    runner = runner_of(plan_of(""), None)

    def refused(said: str, codec: BlockDCTCodec, config: ModelConfig = TINY, **section: Any) -> None:
        with pytest.raises(CinemeshError, match=said):
            check_switch(StartFrom(checkpoint=path, **section), read_manifest(path).note, config, codec)

    with pytest.raises(CinemeshError, match=r"trained on latents of coarse-1\.0, and the codec here makes those of"):
        begin(StartFrom(checkpoint=path, weights="master"), runner, 0, Coarse(2.0))
    refused("the moments are of other latents", Coarse(2.0), latents="anew", moments="keep")
    refused("to 16 channels", BlockDCTCodec(), latents="rescale")
    low = replace(TINY, latent_conditions=(LatentCondition("low", 4),))
    refused("with the latent condition low", Coarse(2.0), low, latents="rescale")
    with pytest.raises(CinemeshError, match="does not say the std of its latents"):
        check_switch(StartFrom(checkpoint=path, latents="rescale"), {}, TINY, Coarse(2.0))
    check_switch(StartFrom(checkpoint=path), {}, TINY, Coarse(2.0))  # an older one, which does not say
    begin(StartFrom(checkpoint=path, weights="master"), runner, 0, Coarse(1.0))


def test_a_run_says_both_losses_of_a_switch(clips: Path, tmp_path: Path) -> None:
    """Of clips' latents, then of stills': the loss before and after it in one line of the log."""
    first, then = (recipe(clips, tmp_path / name) for name in ("first", "then"))
    for values in (first, then):
        values["data"]["frames"] = 1
        values["schedule"]["steps"] = 3
    assert start(first, tmp_path) == 0
    checkpoint = tmp_path / "first" / "run" / FOLDER / "step-00000003"
    then |= {"codec": {"kind": "frame-dct"}, "start_from": {"checkpoint": str(checkpoint), "latents": "anew"}}
    assert start(then, tmp_path) == 0
    log = (tmp_path / "then" / "run" / LOG_FILE).read_text()
    assert "latents are those of frame-dct-" in log and "patchify.weight and final.weight begin anew" in log
    both = re.search(r"the codec was switched: validation loss (\S+) before, of the former latents, (\S+) after", log)
    assert both is not None
    assert float(both[1]) == pytest.approx(read_manifest(checkpoint).note[VALIDATION_LOSS], abs=1e-4)
    assert f"step 0: validation loss {both[2]}" in log
    del then["start_from"]["latents"]
    alone = tmp_path / "third"
    alone.mkdir()
    said = refusal(then | {"logging": {"directory": str(alone / "run")}}, alone)
    assert re.search("trained on latents of block-dct-.*, and the codec here makes those of frame-dct-", said)
