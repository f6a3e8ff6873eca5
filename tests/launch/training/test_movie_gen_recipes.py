"""The recipes of the paper's stages: their numbers are Table 3's, each begins where the one before ends, and all fit.

    python tests/launch/training/test_movie_gen_recipes.py        # writes the table of docs/stages.md anew

Only this sees a recipe that departs from the paper's row, a chain that is broken, or a plan that no GPU holds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.launch.proof.lint import lint_program
from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.checkpoint.manifest import step_folder
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.config import preset
from cinemesh.model.step import build_step
from cinemesh.perf_model.published.paper import STAGES, Stage

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "movie-gen").glob("*.yaml"))
PAGE = ROOT / "docs" / "stages.md"
HEAD = "| recipe | GPUs | plan | batch | tokens | step | steps | GPU hours |\n|---|---|---|---|---|---|---|---|\n"


@cache
def setting_of(path: Path) -> Setting:
    """Tables of stand-in encoders as wide take most of a second: each recipe once."""
    return Setting.of(read_config(path))


def test_every_row_of_the_table_has_its_recipe() -> None:
    """Named in order; then what follows pre-training."""
    names = [path.stem for path in RECIPES]
    assert [name[0] for name in names[: len(STAGES)]] == [str(n + 1) for n in range(len(STAGES))]
    assert names[len(STAGES) :] == ["sft", "t2i-1024-switch", "t2i-1024", "t2i-7b-1024", "upsampler"]


@pytest.mark.parametrize(("path", "stage"), [*zip(RECIPES, STAGES, strict=False)], ids=lambda x: getattr(x, "stem", ""))
def test_a_recipe_says_what_its_row_says(path: Path, stage: Stage) -> None:
    config = setting_of(path).config
    plan, data = config.plan, config.data
    assert (plan.tp, plan.cp, plan.world_size) == (stage.tp, stage.cp, stage.gpus) and plan.dp_replicate == 1
    assert (data.global_batch, data.global_batch // plan.data_ranks) == (stage.global_batch, stage.samples)
    assert (config.optimizer.lr, config.schedule.steps, config.schedule.decay) == (stage.lr, stage.steps, "constant")
    latents = setting_of(path).latents
    assert latents[0] == stage.latent and {latent[1:] for latent in latents} == {stage.latent[1:]}
    assert [latent[0] for latent in latents] == ([1] if stage.latent[0] == 1 else [32, 32, 32, 24, 16, 1])
    weights = [bucket.weight for bucket in data.shapes]
    if len(weights) > 1:
        assert data.weigh == "samples" and weights[-1] * 10 == sum(weights[:-1]), "images 1 to 10 of video"
        rules = [(bucket.fps if bucket.squeeze_from_s is None else bucket.squeeze_from_s) for bucket in data.shapes]
        assert rules == [24, 16, 12, 8, 4, 24], "Table 2: 24 and 16 frames/s, then clips from 12, 8 and 4 s, squeezed"
        assert len(setting_of(path).shapes) == 4


def begins_behind(setting: Setting, former: Setting) -> None:
    """With its last checkpoint, of a model whose tables are no longer."""
    config, before = setting.config, former.config
    begun = config.start_from
    assert begun is not None
    assert begun.checkpoint == step_folder(before.logging.directory / FOLDER, before.schedule.steps)
    there, here = former.model, setting.model
    assert replace(there, position_lengths=here.position_lengths) == here
    grows = there.position_lengths != here.position_lengths
    assert grows == (begun.positions == "expand") and not (grows and begun.moments == "keep")
    assert all(a <= b for a, b in zip(there.position_lengths, here.position_lengths, strict=True))


def test_each_recipe_begins_where_the_one_before_ends() -> None:
    chain = [setting_of(path) for path in RECIPES]
    for before, setting in pairwise(chain[: len(STAGES)]):
        begins_behind(setting, before)
    sft, switch, tuning, small, upsampler = chain[len(STAGES) :]
    for setting, before in ((sft, chain[len(STAGES) - 1]), (switch, chain[len(STAGES) - 1]), (tuning, switch)):
        begins_behind(setting, before)
    begun = upsampler.config.start_from
    assert small.config.start_from is None and begun is not None
    steps = small.config.schedule.steps
    assert begun.checkpoint == step_folder(small.config.logging.directory / FOLDER, steps)
    lengths = [setting.model.position_lengths for setting in chain[:4]]
    assert lengths == [(1, 16, 16), (32, 32, 32), (32, 32, 32), (32, 96, 96)]


def test_the_upsampler_takes_the_papers_windows_and_begins_with_a_model_of_images() -> None:
    """14 frames at 24 frames/s, 2x, 1080 rows filled up to whole patches: 114,240 tokens (3.1.5)."""
    setting = setting_of(RECIPES[-1])
    data, begun = setting.config.data, setting.config.start_from
    (bucket,) = data.shapes
    assert (str(bucket), bucket.fps) == ("14x1088x1920", 24) and bucket.height == -(-1080 // 16) * 16
    assert setting.model == replace(preset("movie-gen-upsampler-7b"), encoders=setting.model.encoders)
    assert setting.model.tokens(setting.latents[0]) == 114_240
    assert data.low_resolution is not None and data.low_resolution.scale == 2
    assert begun is not None and (begun.positions, begun.moments) == ("expand", "drop")
    images = preset("movie-gen-t2i-7b")
    assert replace(images, name="", position_lengths=(1, 1, 1)) == replace(
        setting.model, name="", position_lengths=(1, 1, 1), latent_conditions=(), encoders=images.encoders
    )


def test_images_have_a_codec_of_their_own() -> None:
    """3.7: it takes the TAE's place, and what reads its latents begins anew; then 6k steps of 64, 2,000 to warm up."""
    switch, tuning, small = (setting_of(path) for path in RECIPES[len(STAGES) + 1 : -1])
    assert {setting.encoding.codec.temporal_stride for setting in (switch, tuning, small)} == {1}
    assert [of.latents for of in (switch.config.start_from, tuning.config.start_from) if of] == ["anew", "same"]
    config = tuning.config
    assert (config.schedule.steps, config.schedule.warmup_steps, config.schedule.decay) == (6000, 2000, "constant")
    assert (config.optimizer.lr, config.data.global_batches) == (1e-5, [64])
    assert small.model.name == "movie-gen-t2i-7b" and small.model.tokens(small.latents[0]) == 4096
    upsampler = preset("movie-gen-upsampler-7b")
    begun = replace(upsampler, name=small.model.name, latent_conditions=(), position_lengths=(1, 64, 64))
    assert begun == small.model, "the upsampler can begin with it"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_would_start_and_its_step_may_be_captured(path: Path) -> None:
    """What a start looks at; the lint of two of its blocks in its largest bucket, at full width."""
    setting = setting_of(path)
    config = setting.config
    setting.check_training()
    plan = config.plan if config.plan.recompute_last is None else replace(config.plan, last_blocks=1)
    assert lint_program(build_step(replace(setting.model, layers=2), plan, setting.batches[0], config.optimizer)) == []


def rows(paths: list[Path]) -> list[str]:
    """Of the table: what a dry run predicts. It refuses a plan that does not fit."""
    found: list[str] = []
    for path in paths:
        done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--json"])
        if done.exception is not None:
            raise done.exception
        said = json.loads(done.stdout)
        plan = ", ".join(f"{axis} {said['plan'][axis]}" for axis in ("tp", "cp", "dp_shard") if said["plan"][axis] > 1)
        batch = f"{said['buckets'][0]['global_batch']:,}"
        tokens = f"{max(bucket['tokens'] for bucket in said['buckets']):,}"
        step, hours = f"{said['step_s']:.3g} s", f"{said['device_hours']:,.3g}"
        cells = (
            path.stem,
            f"{said['ranks']:,}",
            plan,
            batch,
            tokens,
            step,
            f"{said['steps']:,}",
            f"{float(hours):,.0f}",
        )
        found.append(f"| {' | '.join(cells)} |\n")
    return found


def test_the_table_says_what_a_dry_run_says() -> None:
    """Of the cheapest recipe."""
    path = RECIPES[-1]
    assert rows([path])[0] in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_whole_table_says_what_dry_runs_say() -> None:
    """At full size, on the GPUs of each: it fits."""
    assert HEAD + "".join(rows(RECIPES)) in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index(HEAD)
    end = text.index("\n\n", begin)
    PAGE.write_text(text[:begin] + HEAD + "".join(rows(RECIPES)).rstrip() + text[end:], encoding="utf-8")
