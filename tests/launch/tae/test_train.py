"""Training of an autoencoder: the same weights on any number of ranks, across kills, and as a codec at the end."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import Tensor
from typer.testing import CliRunner

from cinemesh.data.clips import write_mp4
from cinemesh.data.encoding import codec_of
from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.tae.checkpoints import load
from cinemesh.launch.tae.feed import PixelFeed, open_pixels
from cinemesh.launch.tae.loop import TAELoop, plan_of
from cinemesh.launch.tae.networks import FLAT_STATES, Networks
from cinemesh.launch.tae.recipe import TAERecipe, check_tae_recipe, read_tae_recipe
from cinemesh.launch.tae.step import TrainStep
from cinemesh.model.tae.files import read_trained
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process")
Values = dict[str, Any]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured waves that move: two scenes of 40 frames, 32 px."""
    folder = tmp_path_factory.mktemp("films")
    x, y = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    rows = []
    for name, speed in (("slow", 0.1), ("fast", 0.4)):
        frames = [
            torch.stack([torch.sin(x * 0.3 + speed * t + c + y * 0.1 * c) for c in range(3)], -1) for t in range(40)
        ]
        write_mp4(folder / f"{name}.mp4", ((torch.stack(frames) + 1) * 127).to(torch.uint8), Fraction(24))
        rows.append({"name": name, "file": f"{name}.mp4", "first_frame": 0, "last_frame": 39, "caption": "Waves."})
    (folder / "captions.yaml").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture
def values(films: Path, tmp_path: Path) -> Values:
    """A tiny autoencoder of the paper's form with every term of the loss but features, in float64."""
    return {
        "model": {"preset": "tiny"},
        "data": {
            "clips": [str(films)], "captions": str(films / "captions.yaml"), "cache": str(tmp_path / "cache"),
            "size": 32, "crop": 32, "stride": 4, "global_batch": 4,
            "buckets": [{"frames": 8, "weight": 3}, {"frames": 1, "weight": 1}],
        },
        "losses": {"absolute": 1.0, "squared": 2.0, "outlier": 0.1, "adversarial": 0.5, "adversarial_from": 2},
        "discriminator": {"width": 8, "layers": 2},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.0},
        "schedule": {"steps": 5, "warmup_steps": 2},
        "logging": {"directory": str(tmp_path / "run"), "validate_every": 0, "checkpoint_every": 2, "every": 2},
        "dtype": "float64",
        "device": "cpu",
    }  # fmt: skip


def trained(values: Values) -> dict[str, Tensor]:
    """The states that a rank of a whole run ends with."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    recipe = check_tae_recipe(values, "test")
    plan = plan_of(recipe, ranks)
    mesh = Mesh(plan) if ranks > 1 else None
    place = Joined(mesh.rank if mesh else 0, "cpu", mesh)
    loop = TAELoop(recipe, place, plan, open_pixels(recipe, place))
    try:
        loop.run(StopSignal())
    finally:
        loop.close()
    if mesh:
        mesh.close()
    return {name: state.clone() for name, state in loop.networks.states.items()}


def test_the_weights_do_not_depend_on_how_many_ranks_there_are(pool: Pool, values: Values) -> None:
    """Float64, to 1e-10 of the largest: discriminator, adaptive weight, noise, crops and images included."""
    alone = trained(values)
    first = Networks(check_tae_recipe(values, "test"), "cpu").states["master"]
    assert (alone["master"] - first).abs().max() > 1e-3
    for ranks in (2, 4):
        other = copy.deepcopy(values)
        other["logging"]["directory"] += f"-{ranks}"
        for found in pool.run(ranks, trained, other):
            for name in FLAT_STATES:
                apart = (found[name] - alone[name]).abs().max() / alone[name].abs().max()
                assert apart < 1e-10, (ranks, name, apart)


def own_weight(values: Values) -> dict[str, Tensor]:
    """Planted: a rank takes the adversarial weight from its own gradients."""
    forget = TrainStep._summing

    def only_the_gradient(self: TrainStep, flat: Tensor) -> Any:
        return (lambda: None) if flat is self.last else forget(self, flat)

    setattr(TrainStep, "_summing", only_the_gradient)  # noqa: B010
    try:
        return trained(values)
    finally:
        setattr(TrainStep, "_summing", forget)  # noqa: B010


def test_an_adversarial_weight_of_a_ranks_own_is_seen(pool: Pool, values: Values) -> None:
    alone = trained(values)["master"]
    values["logging"]["directory"] += "-2"
    assert max((found["master"] - alone).abs().max() for found in pool.run(2, own_weight, values)) > 1e-6


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_that_was_killed_ends_as_if_it_was_not(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Bit by bit, every state: before the first checkpoint, at it, and past it with a step to take again."""
    other = copy.deepcopy(values)
    other["logging"]["directory"] += "-whole"
    whole = trained(other)
    take = TrainStep.take

    def dies(self: TrainStep, batch: Any, lr: float) -> Any:
        if batch.step == at:
            raise Killed
        return take(self, batch, lr)

    with monkeypatch.context() as planted:
        planted.setattr(TrainStep, "take", dies)
        with pytest.raises(Killed):
            trained(values)
    again = trained(values)
    assert all(torch.equal(again[name], whole[name]) for name in FLAT_STATES)


def test_what_four_ranks_saved_one_goes_on_from(pool: Pool, values: Values, tmp_path: Path) -> None:
    """Bit by bit what they held; each has written a part."""
    saved = pool.run(4, trained, values)[0]
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert len(list(path.glob("*.safetensors"))) == 4
    networks = Networks(check_tae_recipe(values, "test"), "cpu")
    found = load(path, networks)
    assert (networks.steps, networks.updates) == (5, 5) and found.step == 5
    assert all(torch.equal(networks.states[name], saved[name]) for name in FLAT_STATES)
    parameters = dict(networks.autoencoder.named_parameters())
    assert torch.equal(parameters["encoder.conv_in.weight"].flatten(), networks.states["master"][: 8 * 3 * 9])


def test_a_damaged_or_foreign_checkpoint_is_told(values: Values, tmp_path: Path) -> None:
    trained(values)
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    wider = copy.deepcopy(values)
    wider["model"]["width"] = 16
    with pytest.raises(CinemeshError, match="of another autoencoder: width is 8 there and 16 here"):
        trained(wider)
    with pytest.raises(CinemeshError, match="holds master as float64"):
        trained(values | {"dtype": "float32"})
    (file,) = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CinemeshError, match=r"not what was written, in block 0 of ema"):
        load(path, Networks(check_tae_recipe(values, "test"), "cpu"))


def test_the_discriminator_learns_from_its_step_on(values: Values) -> None:
    """Before, its weights and its part of the gradient stay; from then on both move, and the adversary is weighed."""
    recipe = check_tae_recipe(values, "test")
    networks = Networks(recipe, "cpu")
    place = Joined(0, "cpu", None)
    feed, step = PixelFeed(recipe, open_pixels(recipe, place), 0, 1), TrainStep(networks, None)
    judge = networks.states["master"][networks.generated :]
    begun = judge.clone()
    for number in range(4):
        before = judge.clone()
        taken = step.take(feed.take(number), 1e-3)
        moved = not torch.equal(judge, before)
        assert moved is (number >= 2) and ("adversarial_weight" in taken.terms) is (number >= 2)
    assert not torch.equal(judge, begun) and networks.updates == 4


def test_a_gradient_that_is_not_finite_changes_nothing(values: Values) -> None:
    recipe = check_tae_recipe(values, "test")
    networks = Networks(recipe, "cpu")
    feed = PixelFeed(recipe, open_pixels(recipe, Joined(0, "cpu", None)), 0, 1)
    batch = feed.take(0)
    batch.pixels[0, 0, 0, 0, 0] = torch.nan
    before = {name: state.clone() for name, state in networks.states.items()}
    taken = TrainStep(networks, None).take(batch, 1e-3)
    assert not taken.finite and (networks.steps, networks.updates) == (1, 0)
    assert all(torch.equal(networks.states[name], before[name]) for name in FLAT_STATES)


def test_batches_are_functions_of_the_step(values: Values) -> None:
    """Ranks share out the batch of one; crops lie inside, differ, and half of the samples are mirrored."""
    values["data"] |= {"crop": 16, "global_batch": 16}
    values["losses"]["outlier"] = 0.0  # four latents a frame
    recipe = check_tae_recipe(values, "test")
    cache = open_pixels(recipe, Joined(0, "cpu", None))
    whole = PixelFeed(recipe, cache, 0, 1)
    shares = [PixelFeed(recipe, cache, rank, 4) for rank in range(4)]
    for step in range(5):
        batch = whole.take(step)
        parts = [feed.take(step) for feed in shares]
        assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
        latent = torch.Size((16, 1, 4, 2, 2))
        noise = torch.cat([part.noise(0, torch.Size((4, *latent[1:]))) for part in parts])
        assert torch.equal(noise, batch.noise(0, latent)) and 0.5 < noise.std() < 1.5
        assert torch.equal(whole.take(step).pixels, batch.pixels)
    batch = whole.take(0)
    train = cache.buckets[batch.bucket].train
    windows = {train[i].id: train[i].latent.transpose(0, 1).float() / 127.5 - 1 for i in range(len(train))}
    mirrored = 0
    for sample, cut in zip(batch.ids.tolist(), batch.pixels, strict=True):
        views = windows[sample].unfold(2, 16, 1).unfold(3, 16, 1)  # [T, 3, 17, 17, 16, 16]
        plain, turned = (
            (views == c[:, :, None, None]).flatten(4).all(-1).all(0).all(0).any() for c in (cut, cut.flip(3))
        )
        assert plain or turned
        mirrored += bool(turned and not plain)
    assert 2 < mirrored < 14


def ran(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["tae", *map(str, words)])
    assert done.exit_code == 0, done.exception or done.output
    return done.output


def written(values: Values, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_run_ends_in_a_codec(values: Values, tmp_path: Path) -> None:
    """By the command: its latents are standardised over the training windows, and it is the average of the weights."""
    values |= {"dtype": "float32"}
    ran("train", written(values, tmp_path))
    folder = tmp_path / "run" / "autoencoder"
    assert json.loads((folder / "autoencoder.json").read_text())["about"]["steps"] == 5
    codec = codec_of(str(folder)).build()
    recipe = check_tae_recipe(values, "test")
    cache = open_pixels(recipe, Joined(0, "cpu", None))
    clips = [
        cache.buckets[b].train[i].latent.permute(1, 2, 3, 0) for b in (0, 1) for i in range(len(cache.buckets[b].train))
    ]
    latents = torch.cat([codec.encode(clip).flatten(1) for clip in clips], 1)
    assert latents.mean(1).abs().max() < 1e-3 and (latents.std(1) - 1).abs().max() < 1e-2
    networks = Networks(recipe, "cpu")
    load(tmp_path / "run" / "checkpoints" / "step-00000005", networks)
    ours = dict(read_trained(folder, "test").net.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in networks.average.named_parameters())
    assert "wrote" not in ran("train", written(values, tmp_path)).splitlines()[0]  # again: nothing is left to train


@pytest.mark.parametrize(("dtype", "apart_db"), [("float32", 1e-3), ("float64", 1e-3), ("bfloat16", 0.2)])
def test_held_out_windows_are_reconstructed_as_a_run_goes(
    values: Values, tmp_path: Path, dtype: str, apart_db: float
) -> None:
    """Not at the start, where random weights show nothing; the last is what the codec, float32, then does."""
    values |= {"dtype": dtype}
    values["logging"]["validate_every"] = 2
    ran("train", written(values, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {row["step"]: row["held_out/video_psnr_db"] for row in rows if "held_out/video_psnr_db" in row}
    assert sorted(told) == [2, 4, 5] and len({*told.values()}) == 3
    data = [f"data.{name}={values['data'][name]}" for name in ("clips", "captions", "size", "stride")]
    named = ["--codec", str(tmp_path / "run" / "autoencoder"), "--json"]
    sets = [word for each in [*data, "data.frames=8", "data.fps=24"] for word in ("--set", each)]
    again = CliRunner().invoke(app, ["codec", "eval", *named, *sets])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["video_psnr_db"] == pytest.approx(told[5], abs=apart_db)


def test_a_run_begins_with_another_and_an_image_autoencoder_is_inflated(values: Values, tmp_path: Path) -> None:
    """Frame by frame first, as the paper; then in time, from its weights. Moments and averages are new."""
    image = copy.deepcopy(values)
    image["model"]["time"] = "none"
    image["logging"]["directory"] = str(tmp_path / "image")
    image |= {"dtype": "float32"}
    ran("train", written(image, tmp_path))
    values["start_from"] = str(tmp_path / "image" / "autoencoder")
    recipe = check_tae_recipe(values, "test")
    place = Joined(0, "cpu", None)
    loop = TAELoop(recipe, place, plan_of(recipe, 1), open_pixels(recipe, place))
    loop.close()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "parameters are the image autoencoder's" in log and "other shapes" not in log
    source = read_trained(tmp_path / "image" / "autoencoder", "test").net
    own = dict(loop.networks.autoencoder.named_parameters())
    assert all(torch.equal(own[name].float(), value) for name, value in source.named_parameters())
    assert torch.equal(loop.networks.states["ema"], loop.networks.states["master"])


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("model", {"preset": "tinny"}, "there is no autoencoder 'tinny'; did you mean 'tiny'?"),
        ("model", {"width": 10}, r"width(10) * 1 % groups(4) = 2"),
        ("model", {"body": "grid"}, "body grid with time 1d and multipliers [1, 1, 2, 2]"),
        ("data", {"crop": 20}, "20 % 8 = 4"),
        ("data", {"crop": 24}, "have 9 positions, and of at most 10 none is beyond 3 standard deviations"),
        ("data", {"encoders": []}, "an autoencoder reads no captions"),
        ("data", {"sise": 32}, "unknown key 'data.sise'"),
        ("losses", {"outlier": -1}, "losses.outlier is -1"),
        ("losses", {"reduction": "sum"}, "losses.reduction is 'sum'"),
        ("discriminator", {"width": 12}, "discriminator.width(12) % 8 = 4"),
        ("schedule", {"decay": "plateau"}, "an autoencoder's is cosine or constant"),
    ],
)
def test_recipes_that_cannot_be_are_refused(values: Values, section: str, change: Values, said: str) -> None:
    values[section] |= change
    with pytest.raises(CinemeshError) as refused:
        check_tae_recipe(values, "test")
    assert said in str(refused.value)


def test_a_batch_that_ranks_do_not_divide_is_refused(values: Values) -> None:
    recipe: TAERecipe = check_tae_recipe(values, "test")
    with pytest.raises(CinemeshError, match=r"global_batch\(4\) of bucket 8x32x32 % processes\(3\) = 1"):
        plan_of(recipe, 3)


SHIPPED = sorted((Path(__file__).parents[3] / "configs" / "tae").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipes_that_ship_are_legal_on_one_and_two_processes(path: Path) -> None:
    recipe = read_tae_recipe(path)
    assert plan_of(recipe, 2).dp_replicate == 2 and recipe.model.build().channels in (8, 16)


def test_the_papers_weight_stands_with_its_reduction() -> None:
    (path,) = (path for path in SHIPPED if path.stem == "movie-gen")
    recipe = read_tae_recipe(path)
    assert (recipe.losses.outlier, recipe.losses.reduction) == (1e5, "frame")
    assert [(b.frames, b.height, b.weight) for b in recipe.data.shapes] == [(32, 1024, 3.0), (1, 1024, 1.0)]
