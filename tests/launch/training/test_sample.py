"""From a prompt to an mp4 file: the command on one process, and the clips of many prompts under any plan."""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from chat_server import KEY, breaks, fails, hangs, parts_of, rewrites, says, served
from checkpoints import body_of, rewrite
from harness import Pool
from PIL import Image
from torch import Tensor

from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.text import ByteEncoder
from cinemesh.data.video import frame_rate, read_frames
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr
from cinemesh.kernels.reference import REFERENCE
from cinemesh.launch.cluster.processes import Joined
from cinemesh.launch.training import clip_sampler, sample, showcase
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.launch.training.clip_sampler import ClipSampler
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.inputs import MASK, BatchShape, text_input
from cinemesh.model.runner import StepRunner
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import linear_quadratic
from cinemesh.model.step import Optimizer, unit_layout
from cinemesh.model.weights import fill_shard, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

LATENT = (2, 2, 2)
FRAMES = 12  # of 16 that two latent frames decode to
ENCODERS = [ByteEncoder(12, 5, "words"), ByteEncoder(6, 3, "letters")]
MODEL = ModelConfig(
    "small", 1, 24, 2, 32, tuple(Encoder(e.name, e.width, e.tokens) for e in ENCODERS), position_lengths=(4, 16, 16)
)
RECIPE = {
    "model": {"preset": "tiny-video", "layers": 1, "width": 24, "heads": 2, "ffn": 32},
    "plan": {"dp_shard": 2, "dtype": "float32"},
    "device": "cpu",
    "data": {
        "cache": "cache",
        "size": 16,
        "frames": FRAMES,
        "global_batch": 2,
        "encoders": [
            {"name": "words", "width": 12, "tokens": 5},
            {"name": "letters", "width": 6, "tokens": 3},
        ],
    },
    "optimizer": {"lr": 1e-3},
    "schedule": {"steps": 3},
    "logging": {"directory": "run"},
    "sample": {"guidance": 3.0},
}
PROMPTS = ["a red car", "rain", "", "a dog that runs"]


def sampler_of(
    plan: Plan, mesh: Mesh | None, prompts: list[str], samples: int, seed: int = 5, *, traced: bool = False
) -> ClipSampler:
    units = unit_layout(MODEL, plan)
    weights = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(weights, units, mesh.coordinates if mesh else coordinates(plan, 0), probe_values(2))
    values = {**RECIPE, "plan": plan.to_dict(), "sample": {"steps": 3, "guidance": 2.0, "seed": seed}}
    setting = Setting.of(check_config(values, "test"))
    place = Joined(mesh.rank if mesh else 0, "cpu", mesh)
    return ClipSampler(setting, place, weights, dict(enumerate(prompts)), samples=samples, traced=traced)


def clips(plan: Plan, mesh: Mesh | None, prompts: list[str], samples: int, seed: int = 5) -> list[Tensor]:
    sampler = sampler_of(plan, mesh, prompts, samples, seed)
    return [sampler.setting.encoding.codec.decode(latent) for _, latent in sampler.latents()]


def clips_on_rank(plan: Plan, prompts: list[str], samples: int) -> list[Tensor]:
    return clips(plan, Mesh(plan), prompts, samples)


@pytest.mark.parametrize(("text", "samples"), [("dp_shard=2", 1), ("dp_shard=2,tp=2", 4), ("dp_replicate=2,cp=2", 1)])
def test_any_plan_makes_the_same_clips(pool: Pool, text: str, samples: int) -> None:
    """Three prompts on two data ranks, in one round or two: padding is dropped and none changes its place."""
    prompts = PROMPTS[:3]
    want = clips(Plan(dtype="float64"), None, prompts, 3)
    plan = Plan.parse(text, dtype="float64")
    first, *others = pool.run(plan.world_size, clips_on_rank, plan, prompts, samples)
    assert [clip.shape for clip in first] == [(16, 16, 16, 3)] * 3
    for got, clip in zip(first, want, strict=True):
        assert (got.int() - clip.int()).abs().max() <= 1  # 1e-9 in a latent may round a pixel the other way
    assert others == [[]] * (plan.world_size - 1)


def test_prompt_and_seed_matter() -> None:
    a, b = clips(Plan(dtype="float64"), None, PROMPTS[:2], 2)
    (c,) = clips(Plan(dtype="float64"), None, PROMPTS[1:2], 1)  # index 0: the first one's noise, the second's text
    (d,) = clips(Plan(dtype="float64"), None, PROMPTS[:1], 1, seed=6)
    for x, y in ((a, b), (a, c), (b, c), (a, d)):
        assert not torch.equal(x, y)


def test_a_clip_is_made_by_the_kernels_that_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sampler] = []

    class Noted(Sampler):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(clip_sampler, "Sampler", Noted)
    monkeypatch.setitem(RECIPE, "kernels", {"attention": "reference"})
    clips(Plan(dtype="float64"), None, PROMPTS[:1], 1)
    for executor in (made[0].velocity, made[0].unpatchify):
        assert executor.kernels["attention"] is REFERENCE["attention"]


def test_what_a_run_ends_with_is_sampled_beside_its_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that its states, arena and graphs fill."""
    given: dict[str, Any] = {}

    def sampled(*_: Any, **named: Any) -> Any:
        given.update(named)
        return SimpleNamespace(latents=lambda: [])

    monkeypatch.setattr(showcase, "ClipSampler", sampled)
    runner: Any = SimpleNamespace(buffers={"ema": None}, batch=SimpleNamespace(samples=2))
    config = SimpleNamespace(sampled=None, weights="ema")
    setting: Any = SimpleNamespace(config=config, sampled_captions=lambda cache: {"a": "b"})
    nothing: Any = None
    showcase.show_samples(setting, Joined(1, "cpu", None), nothing, runner)
    assert given["beside"] is runner


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the current directory whose run has a checkpoint: probe weights, other EMA weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # joining a job sets it; the test run has its own
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(RECIPE))
    runner = StepRunner(MODEL, Plan(dtype="float32"), BatchShape(2, LATENT), Optimizer(), None)
    runner.initialise(probe_values(1))
    fill_shard(runner.buffers["ema"], runner.units, runner.coordinates, probe_values(2))
    for step in (3, 12):
        runner.buffers["counters"].fill_(step)
        save(Path("run/checkpoints"), runner, note={sample.FRAME_RATE: "30000/1001"})
    return path


def call(recipe: Path, **changed: object) -> None:
    asked = {"sample.steps": 3, "sample.guidance": None, "sample.seed": 5, "weights": changed.pop("weights", None)}
    given = {"config": recipe, "prompt": PROMPTS[0], "checkpoint": None, "out": Path("out/clip.mp4")}
    given |= {"asked": asked, "nproc": None, "trace_change": None}
    sample.run(**{**given, **changed})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("of_recipe", "asked", "probe"), [("ema", None, 2), ("master", None, 1), ("ema", "master", 1)])
def test_run_writes_the_clip_of_the_weights_that_are_asked_for(
    recipe: Path, capsys: pytest.CaptureFixture[str], of_recipe: str, asked: str | None, probe: int
) -> None:
    """On one process although the recipe's plan has two; guidance is the recipe's."""
    recipe.write_text(yaml.safe_dump(RECIPE | {"weights": of_recipe}))
    call(recipe, weights=asked)
    out, err = capsys.readouterr()
    cut, begun, told = err.splitlines()
    assert cut == (
        "the prompt is cut: text encoder words takes 5 of its 17 tokens, text encoder letters takes 3 of its 17 tokens"
    )
    assert begun == "sampling: clips 1 to 1, step 1 (1 of 3)"
    assert told.startswith("wrote out/clip.mp4 (29.97 frames/s); next: ")
    assert frame_rate(Path("out/clip.mp4")) == Fraction(30000, 1001)
    assert not out
    assert [path.name for path in Path("out").iterdir()] == ["clip.mp4"]
    frames = read_frames(Path("out/clip.mp4"), 16, 16)
    assert frames.shape == (FRAMES, 16, 16, 3)

    plan = Plan(dtype="float32")
    units = unit_layout(MODEL, plan)
    ema = torch.empty(1, units.flat_elements)
    fill_shard(ema, units, coordinates(plan, 0), probe_values(probe))
    encoded = [encoder.encode(f"FPS-30 {PROMPTS[0]}") for encoder in ENCODERS]
    given = {text_input(e.name): x[:, None] for e, (x, _) in zip(ENCODERS, encoded, strict=True)}
    given[MASK] = torch.cat([valid for _, valid in encoded])[None]
    sampler = Sampler(MODEL, plan, BatchShape(1, LATENT), None, ema, guidance=3.0)
    want = BlockDCTCodec().decode(sampler.sample(given, 5, torch.tensor([0]), linear_quadratic(3))[0])[:FRAMES]
    assert psnr(frames, want) > psnr(frames, want.flip(0)) + 5
    assert psnr(frames, want) > 25  # noise, which H.264 at this quality still keeps well


def test_weights_that_are_the_random_start_are_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("run/checkpoints/step-00000012")
    rewrite(path, body_of(path) | {"updates": 2})
    call(recipe)
    assert "the random start still weighs 4.5% in the average" in capsys.readouterr().err
    call(recipe, weights="master")
    assert "random start" not in capsys.readouterr().err


def test_a_rate_that_a_checkpoint_lacks_is_told_and_a_damaged_one_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("run/checkpoints/step-00000012")
    rewrite(path, body_of(path) | {"note": {}})
    call(recipe)
    assert "step-00000012 does not say at how many frames/s its clips play: 25\n" in capsys.readouterr().err
    assert frame_rate(Path("out/clip.mp4")) == 25
    for damaged in ("fast", "1/0", "0", "-25", "1e9", None, [25]):
        rewrite(path, body_of(path) | {"note": {sample.FRAME_RATE: damaged}})
        with pytest.raises(CinemeshError, match=r"step-00000012 .*frames/s"):
            call(recipe)


def test_named_checkpoint_is_used(recipe: Path) -> None:
    call(recipe, checkpoint=Path("run/checkpoints/step-00000003"))
    with pytest.raises(CinemeshError, match=r"cannot read the manifest .*step-00000004"):
        call(recipe, checkpoint=Path("run/checkpoints/step-00000004"))


@pytest.mark.parametrize(
    ("recipe_change", "call_change", "message"),
    [
        ({"logging": {"directory": "elsewhere"}}, {}, "no checkpoint in elsewhere/checkpoints; train"),
        ({"model": {**RECIPE["model"], "ffn": 64}}, {}, "ffn is 32 there and 64 here"),
        ({"model": {**RECIPE["model"], "patch": [1, 1, 4]}}, {}, r"patch"),
        ({}, {"nproc": 4}, "!= world size 4"),
        ({}, {"out": Path("run")}, "is a directory"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    recipe: Path, recipe_change: dict, call_change: dict, message: str
) -> None:
    recipe.write_text(yaml.safe_dump(RECIPE | recipe_change))
    with pytest.raises(CinemeshError, match=message):
        call(recipe, **call_change)
    assert not Path("out").exists()


def test_diverged_weights_make_no_file(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = StepRunner(MODEL, Plan(dtype="float32"), BatchShape(2, LATENT), Optimizer(), None)
    runner.buffers["ema"].fill_(torch.nan)
    runner.buffers["counters"].fill_(99)
    save(Path("run/checkpoints"), runner)
    with pytest.raises(SystemExit) as stop:
        call(recipe)
    assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
    assert not Path("out").exists()


def of_a_file(recipe: Path, texts: list[str], **changed: object) -> None:
    Path("prompts.yaml").write_text(yaml.safe_dump([{"name": f"clip-{t or 'none'}", "prompt": t} for t in texts]))
    call(recipe, **({"prompt": None, "prompts": Path("prompts.yaml"), "out": Path("clips")} | changed))


def test_clips_of_a_file_are_made_once_each(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped after the second and started again: the third alone is made, of the noise that it had before."""
    texts = ["a red car", "rain", "snow"]
    of_a_file(recipe, texts)
    names = [f"clips/clip-{text}.mp4" for text in texts]
    made = {name: Path(name).read_bytes() for name in names}
    assert len(set(made.values())) == 3
    assert "text encoder words: 3 of 3 captions (100%) have more than its 5 tokens" in capsys.readouterr().err
    Path(names[2]).unlink()
    of_a_file(recipe, texts)
    said = capsys.readouterr().err
    assert "2 of 3 clips are in clips" in said and said.count("wrote ") == 1
    assert {name: Path(name).read_bytes() for name in names} == made
    call(recipe)  # a prompt by itself has the first one's noise
    assert Path("out/clip.mp4").read_bytes() == made[names[0]]
    of_a_file(recipe, texts)
    assert "3 of 3 clips are in clips" in capsys.readouterr().err


def test_a_folder_has_clips_of_one_order(recipe: Path) -> None:
    """Other weights, another seed, another solver: half a folder each would look like one system's."""
    of_a_file(recipe, ["rain"])
    with pytest.raises(CinemeshError, match=r"its clips have weights ema, not master; name a new folder"):
        of_a_file(recipe, ["rain", "snow"], weights="master")
    with pytest.raises(CinemeshError, match=r"its clips have sample\.solver euler, not midpoint"):
        call(recipe, prompt=None, prompts=Path("prompts.yaml"), out=Path("clips"), asked={"sample.solver": "midpoint",
             "sample.steps": 3, "sample.seed": 5})  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": None}, "takes --prompt or --prompts"),
        ({"prompts": Path("prompts.yaml")}, "takes --prompt or --prompts"),
        ({"prompt": None, "prompts": Path("prompts.yaml"), "out": None}, "name a folder for them with --out"),
        ({"prompt": None, "prompts": Path("absent.yaml")}, "absent.yaml"),
    ],
)
def test_an_order_that_is_none_is_refused(recipe: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        call(recipe, **changed)


def test_prompts_given_twice_are_refused(recipe: Path) -> None:
    with pytest.raises(CinemeshError, match="have the same"):
        of_a_file(recipe, ["rain", "rain"])


REWRITER = "model: m\nguideline: short\ncache: kept\ntries: 1\ntimeout_s: 20\n"


def test_a_rewritten_prompt_makes_the_same_clip_with_the_endpoint_gone(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise; and it is the clip of the rewritten text."""
    monkeypatch.setattr(sample, "with_fps", lambda rate, text: text)  # of which the encoders would take no more
    Path("rewriting.yaml").write_text(REWRITER)
    with served(monkeypatch, rewrites) as server:
        call(recipe, prompt="a red car", rewrite=Path("rewriting.yaml"))
        assert len(server.asked) == 1
    text = parts_of("a red car").text
    said = capsys.readouterr().err
    assert f"the clip is of: {text}" in said and "rewritten: 1 of 1 prompts, 0 of them before" in said
    first = Path("out/clip.mp4").read_bytes()
    call(recipe, prompt="a red car", rewrite=Path("rewriting.yaml"))
    assert Path("out/clip.mp4").read_bytes() == first and "1 of them before" in capsys.readouterr().err
    call(recipe, prompt=text)
    assert Path("out/clip.mp4").read_bytes() == first
    call(recipe, prompt="a red car")
    assert Path("out/clip.mp4").read_bytes() != first


@pytest.mark.parametrize("answer", [fails, breaks, hangs, says("Ignore me"), says(parts_of("ein auto").answer())])
def test_the_clip_is_made_whatever_the_endpoint_does(
    answer: Any, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the user's prompt, with one message."""
    call(recipe, prompt="a red car")
    want = Path("out/clip.mp4").read_bytes()
    capsys.readouterr()
    Path("rewriting.yaml").write_text(REWRITER.replace("20", "0.5"))
    with served(monkeypatch, answer):
        call(recipe, prompt="a red car", rewrite=Path("rewriting.yaml"))
    said = capsys.readouterr().err
    assert said.count("the prompt is NOT rewritten, and taken as it is: ") == 1 and KEY not in said
    assert Path("out/clip.mp4").read_bytes() == want and not Path("kept").exists()


def sampled_of() -> dict[str, str]:
    """Prompts by name, as the folder of clips says them."""
    return {row["name"]: row["prompt"] for row in yaml.safe_load(Path("clips/rewritten.yaml").read_text())}


def test_clips_of_a_file_say_of_what_they_are(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a second start, which rewrites what is left alone; clips of two rewriters share no folder."""
    texts = ["a red car", "a dog"]
    Path("rewriting.yaml").write_text(REWRITER)
    with served(monkeypatch, rewrites, fails) as server:
        of_a_file(recipe, texts, rewrite=Path("rewriting.yaml"))
        want = {"clip-a red car": parts_of("a red car").text, "clip-a dog": "a dog"}
        assert sampled_of() == want
        assert "clip-a dog is NOT rewritten" in capsys.readouterr().err
        Path("clips/clip-a dog.mp4").unlink()
        of_a_file(recipe, texts, rewrite=Path("rewriting.yaml"))
        assert sampled_of() == want and len(server.asked) == 3
    with pytest.raises(CinemeshError, match="name a new folder"):
        of_a_file(recipe, texts)
    Path("rewriting.yaml").write_text(REWRITER + "examples: 0\n")
    with pytest.raises(CinemeshError, match="its clips have rewriter"):
        of_a_file(recipe, texts, rewrite=Path("rewriting.yaml"))


def test_a_rewriter_of_other_lengths_is_told_and_torchrun_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick start's captions have about ten words."""
    Path("rewriting.yaml").write_text("model: m\ncache: kept\ntries: 1\n")
    monkeypatch.delenv("CINEMESH_REWRITE_URL", raising=False)
    call(recipe, rewrite=Path("rewriting.yaml"))
    said = capsys.readouterr().err
    assert (
        "have 60 to 120 words, and the recipe's captions 10 to 16" in said and "CINEMESH_REWRITE_URL is not set" in said
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(CinemeshError, match="once a rank; rewrite first"):
        call(recipe, rewrite=Path("rewriting.yaml"))


def test_changes_of_every_block_are_drawn_and_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all clips of a file together, those that were made before left out; the clip is the one without it."""
    call(recipe)
    plain = Path("out/clip.mp4").read_bytes()
    call(recipe, out=Path("traced/clip.mp4"), trace_change=Path("traced/change.png"))
    assert Path("traced/clip.mp4").read_bytes() == plain
    with Image.open("traced/change.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 600
    told = json.loads(Path("traced/change.json").read_text())
    assert told["t"] == linear_quadratic(3) and (told["clips"], told["guidance"]) == (1, 3.0)
    assert len(told["change"]) == 3 and all(len(row) == 1 and row[0] > 0 for row in told["change"])
    assert len({row[0] for row in told["change"]}) == 3
    assert "wrote traced/change.png (change of every block, step by step); next: read traced/change.json" in (
        capsys.readouterr().err
    )
    of_a_file(recipe, ["rain"])
    of_a_file(recipe, ["rain", "snow", "fog"], trace_change=Path("change.png"))
    assert json.loads(Path("change.json").read_text())["clips"] == 2
    with pytest.raises(CinemeshError, match=r"--trace-change change\.pdf is no \.png file"):
        call(recipe, trace_change=Path("change.pdf"))
    Path("taken.json").mkdir()
    with pytest.raises(CinemeshError, match=r"--trace-change taken\.json is a directory"):
        call(recipe, trace_change=Path("taken.png"))


@pytest.mark.parametrize("text", ["dp_shard=2", "dp_replicate=2,cp=2"])
def test_any_plan_traces_the_same_changes(pool: Pool, text: str) -> None:
    """Three prompts on two data ranks, or one on two replicas: what fills the last round counts nowhere."""
    plan = Plan.parse(text, dtype="float64")
    prompts = PROMPTS[: 3 if plan.dp_shard > 1 else 1]
    wanted = traced(Plan(dtype="float64"), None, prompts)
    for changes in pool.run(plan.world_size, traced_on_rank, plan, prompts):
        torch.testing.assert_close(changes, wanted, rtol=1e-10, atol=0)


def traced(plan: Plan, mesh: Mesh | None, prompts: list[str]) -> Tensor:
    sampler = sampler_of(plan, mesh, prompts, 1, traced=True)
    for _ in sampler.latents():
        pass
    assert sampler.change is not None
    return sampler.change.changes()


def traced_on_rank(plan: Plan, prompts: list[str]) -> Tensor:
    return traced(plan, Mesh(plan), prompts)
