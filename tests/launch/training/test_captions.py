"""Captions encoded in the loop: bit by bit the run of a cache that holds their embeddings, whatever the plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from text_models import minilm, random_clip, random_t5
from torch import Tensor
from training import STATES, recipe

from cinemesh.data.cache.history import History
from cinemesh.data.cache.samples import CaptionDraw
from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training.captions import TextAhead
from cinemesh.launch.training.clip_sampler import ClipSampler
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import fill_shard, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

pytestmark = pytest.mark.usefixtures("one_process")
Values = dict[str, Any]
CAPTIONS = """
- {name: left, file: a.mp4, first_frame: 0, last_frame: 19, captions: [
    {text: "It moves."}, {text: 'A sign reads "GO" and "home".', weight: 2}]}
- {name: right, file: a.mp4, first_frame: 20, last_frame: 31, caption: "It waits, and then waits on, and on, and on."}
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("byt5", "clip")}
    random_t5(found["byt5"])
    random_clip(found["clip"], positions=24)
    return found


@pytest.fixture
def values(clips: Path, tmp_path: Path, directories: dict[str, Path]) -> Values:
    """The paper's three encoders: of real weights and in shards, of a stretched tower, of what is quoted."""
    (tmp_path / "captions.yaml").write_text(CAPTIONS)
    values = recipe(clips, tmp_path)
    values["data"] |= {
        "captions": str(tmp_path / "captions.yaml"),
        "global_batch": 4,
        "encoders": [
            {"name": "ul2", "width": None, "tokens": 20, "directory": str(minilm()), "sharded": True},
            {"name": "metaclip", "width": None, "tokens": 40, "directory": str(directories["clip"]),
             "positions": "stretched"},
            {"name": "byt5", "width": None, "tokens": 6, "directory": str(directories["byt5"]), "reads": "quoted",
             "sharded": True},
        ],
        "embedding_steps": 3,
    }  # fmt: skip
    values["schedule"] = {"steps": 8, "warmup_steps": 2}
    values["logging"] |= {"validate_every": 4, "every": 1, "checkpoint_every": 4}
    return values


def in_loop(values: Values, name: str, **plan: Any) -> Values:
    """The same run, in another place, with captions encoded while it goes on."""
    other = copy.deepcopy(values)
    other["data"] |= {"embeddings": "loop", "cache": other["data"]["cache"] + "-latents"}
    other["logging"]["directory"] += f"-{name}"
    other["plan"] |= plan
    return other


def trained(values: Values) -> tuple[dict[str, Tensor], int]:
    """What a rank holds in the end, and how many encoders are in shards there."""
    setting = Setting.of(check_config(values, "test"))
    plan = setting.config.plan
    mesh = Mesh(plan) if plan.world_size > 1 else None
    place = Joined(mesh.rank if mesh else 0, "cpu", mesh)
    runner = train_steps(setting, place, open_history(setting, place), StopSignal())
    held = {name: runner.buffers[name].clone() for name in STATES}
    towers = [getattr(encoder, "_tower", None) for encoder in setting.encoding.encoders]
    gathered = [tower.gathered is not None for tower in towers if tower is not None]
    if mesh:
        mesh.close()
    return held, sum(gathered)


def rows(values: Values) -> list[dict[str, Any]]:
    found = read_metrics(Path(values["logging"]["directory"]))
    kept = ("step", "loss", "gradient_norm", "validation_loss")
    return [{key: row[key] for key in kept if key in row} for row in found]


def test_a_loop_trains_as_the_cache(values: Values, pool: Pool) -> None:
    """Bitwise: weights, moments, averages, losses and validations; on one rank, and on the same plan of four."""
    cached, none = trained(values)
    loop = in_loop(values, "loop")
    alone, whole = trained(loop)
    assert all(torch.equal(alone[name], cached[name]) for name in STATES) and none == whole == 0
    assert rows(loop) == rows(values) and sum("validation_loss" in row for row in rows(loop)) == 3
    log = (Path(loop["logging"]["directory"]) / "train.log").read_text()
    assert "text encoder byt5: 1 of 3 captions (33%) have more than its 6 tokens" in log, log
    four = {"dp_shard": 2, "cp": 2}
    values["plan"] |= four
    values["logging"]["directory"] += "-cached-4"
    expected = [held for held, _ in pool.run(4, trained, values)]
    for rank, (held, gathered) in enumerate(pool.run(4, trained, in_loop(values, "loop-4"))):
        assert gathered == 2, "two encoders are in shards"
        assert all(torch.equal(held[name], expected[rank][name]) for name in STATES)


def test_a_cache_of_a_loop_holds_no_embeddings(values: Values, tmp_path: Path) -> None:
    """Captions stand in the index; the tars of the others hold 4 bytes a value of them."""
    loop = in_loop(values, "loop")

    def caption_bytes(of: Values) -> int:
        setting = Setting.of(check_config(of, "test"))
        open_history(setting, Joined(0, "cpu", None))
        return sum(path.stat().st_size for path in Path(of["data"]["cache"]).glob("captions/*/captions.tar"))

    embeddings = 3 * 4 * (20 * 384 + 40 * 24 + 6 * 24)
    assert caption_bytes(values) > embeddings > 10 * caption_bytes(loop)


def sampled(values: Values, prompts: list[str]) -> tuple[list[Tensor], int]:
    """Latents of clips, by weights that depend on the plan's shapes alone, and how many encoders are in shards."""
    setting = Setting.of(check_config(values, "test"))
    plan = setting.config.plan
    mesh = Mesh(plan) if plan.world_size > 1 else None
    units = unit_layout(setting.model, plan)
    weights = torch.empty(1, units.flat_elements)
    fill_shard(weights, units, mesh.coordinates if mesh else coordinates(plan, 0), probe_values(2))
    place = Joined(mesh.rank if mesh else 0, "cpu", mesh)
    sampler = ClipSampler(setting, place, weights, dict(enumerate(prompts)))
    made = [latent for _, latent in sampler.latents(silent=True)]
    towers = [getattr(encoder, "_tower", None) for encoder in setting.encoding.encoders]
    gathered = [tower.gathered is not None for tower in towers if tower is not None]
    if mesh:
        mesh.close()
    return made, sum(gathered)


def test_a_loop_samples_as_the_cache(values: Values, pool: Pool) -> None:
    """Bitwise, prompt by prompt, also where two encoders are in shards; and a prompt without quotes has no sign."""
    values["sample"] = {"steps": 3, "guidance": 2.0}
    prompts = ["It moves.", 'A sign reads "GO".', "", "It waits, and then waits on, and on, and on, and on, and on."]
    cached, _ = sampled(values, prompts)
    loop = in_loop(values, "loop")
    found, whole = sampled(loop, prompts)
    assert whole == 0 and len(found) == 4 and all(map(torch.equal, found, cached))
    assert not any(torch.equal(found[0], other) for other in found[1:])
    four = {"dp_shard": 2, "cp": 2}
    values["plan"] |= four
    (expected, _), *_ = pool.run(4, sampled, values, prompts)
    (found, gathered), *others = pool.run(4, sampled, in_loop(values, "loop-4"), prompts)
    assert gathered == 2 and all(of == [] for of, _ in others)
    assert len(found) == 4 and all(map(torch.equal, found, expected))
    for latent, alone in zip(found, cached, strict=True):
        assert torch.allclose(latent, alone, atol=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [2, 5])
def test_a_loop_that_was_killed_ends_as_if_it_was_not(values: Values, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a turn, before a checkpoint and after one."""
    whole, _ = trained(in_loop(values, "whole"))
    encode, turns = TextAhead.encode, [0]

    def dies(self: TextAhead) -> None:
        turns[0] += 1
        if turns[0] == at + 1:
            raise Killed
        encode(self)

    loop = in_loop(values, "killed")
    with monkeypatch.context() as planted:
        planted.setattr(TextAhead, "encode", dies)
        with pytest.raises(Killed):
            trained(loop)
    again, _ = trained(loop)
    assert all(torch.equal(again[name], whole[name]) for name in STATES)


def wrong_order(self: TextAhead, step: int) -> list[Any]:
    """Planted: a step has the text of the samples in another order."""
    return [{name: value.flip(0 if name == "mask" else 1) for name, value in of.items()} for of in TAKE(self, step)]


def of_the_next(self: TextAhead, step: int) -> list[Any]:
    """Planted: a step has the text of the one before, as one that is a turn late."""
    found = TAKE(self, step)
    before = vars(self).get("late", found)
    vars(self)["late"] = found
    return before


TAKE = TextAhead.take


@pytest.mark.parametrize("fault", [wrong_order, of_the_next])
def test_text_of_other_samples_is_seen(values: Values, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained(in_loop(values, "whole"))
    monkeypatch.setattr(TextAhead, "take", fault)
    found, _ = trained(in_loop(values, "faulty"))
    assert not torch.equal(found["master"], expected["master"])


def test_an_encoder_that_changed_is_told_when_a_loop_goes_on(
    values: Values, directories: dict[str, Path], tmp_path: Path
) -> None:
    own = tmp_path / "byt5"
    own.mkdir()
    random_t5(own)
    values["data"]["encoders"][2]["directory"] = str(own)
    loop = in_loop(values, "loop")
    trained({**loop, "schedule": {"steps": 4, "warmup_steps": 2}})
    random_t5(own, d_ff=48)
    with pytest.raises(CinemeshError, match=r"not as in the run so far: data\.contents"):
        trained(loop)


def test_memory_of_encoders_is_counted(values: Values) -> None:
    """Of each rank: those in shards by their shards and two buffers, the others whole; none of a cached run."""
    setting = Setting.of(check_config(in_loop(values, "loop"), "test"))
    ul2, metaclip, byt5 = (encoder.layers for encoder in setting.encoding.encoders)
    assert ul2 is not None and metaclip is not None and byt5 is not None
    assert setting.encoder_bytes == ul2.bytes + metaclip.bytes + byt5.bytes
    shared = setting.under(Plan(dp_shard=2, cp=2)).encoder_bytes
    assert shared == ul2.held_bytes(4) + metaclip.bytes + byt5.held_bytes(4)
    assert ul2.held_bytes(4) < 0.9 * ul2.bytes, "half of this one is its embedding table"
    assert Setting.of(check_config(values, "test")).encoder_bytes == 0


def test_captions_are_those_of_the_samples(values: Values) -> None:
    """Read without their latents, in whatever wording is drawn."""
    setting = Setting.of(check_config(values, "test"))
    history: History = open_history(setting, Joined(0, "cpu", None))
    train = history.at(0).buckets[0].train
    drawn = [train.select(range(len(train)), CaptionDraw(0, step, 0)) for step in range(3)]
    told = [[samples.text(number) for number in range(len(samples))] for samples in drawn]
    assert told == [[sample.caption for sample in samples] for samples in drawn] and told[0] != told[1]
