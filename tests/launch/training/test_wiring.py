"""Every key of a recipe changes what it names, and nothing else: a run with another value, observed from outside.

A value that is read, checked and never reaches its user passes every other test; so does one that reaches another's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from checkpoints import plain_states
from torch import Tensor
from training import CAPTIONS, RATE, recipe

from cinemesh.data.cache.building import CacheBuild
from cinemesh.data.clips import write_mp4
from cinemesh.data.video import read_frames
from cinemesh.errors import CinemeshError
from cinemesh.kernels.philox import Purpose
from cinemesh.launch import train as entry
from cinemesh.launch.storage.remote import RemotePath
from cinemesh.launch.training import clip_sampler, resolve, showcase
from cinemesh.launch.training import loop as train
from cinemesh.launch.training import setting as setting_of
from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.recipe import Config, check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import Telemetry, read_metrics
from cinemesh.model import flow
from cinemesh.model.inputs import IDS, LATENTS, MASK, text_input
from cinemesh.model.reference import Reference
from cinemesh.model.runner import StepRunner
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import linear_quadratic
from cinemesh.parallel.ir.plan import Plan

STATES = ("master", "exp_avg", "exp_avg_sq", "ema")


# -- the keys ---------------------------------------------------------------------------------------------------------


def sections(kind: Any) -> Iterator[tuple[str, Any]]:
    """(what stands between, dataclass) of a field's type: itself, one of a union, or of a list."""
    if isinstance(kind, type) and is_dataclass(kind) and kind is not RemotePath:
        yield "", kind
    for part in get_args(kind):
        yield from ((f".0{below}" if get_args(kind)[1:] == (...,) else below, found) for below, found in sections(part))


def keys(section: type, where: str = "") -> Iterator[str]:
    """Every leaf below a section. A plan is one: its fields are those of tests/parallel/ir/test_knobs.py."""
    hints = get_type_hints(section)
    for leaf in fields(section):
        name, below = f"{where}{leaf.name}", list(sections(hints[leaf.name]))
        if below and below[0][1] is not Plan:
            for between, inner in below:
                yield from keys(inner, f"{name}{between}.")
        else:
            yield name


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Into a recipe, a list's entry by its number."""
    *path, last = key.split(".")
    at: Any = values
    for part in path:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    at[last] = value


# -- a run, observed --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run did, by name; and what its reports are compared with."""

    values: dict[str, Any]
    did: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def differs(self, other: Run) -> set[str]:
        return {name for name in self.did.keys() | other.did.keys() if not same(self.did[name], other.did[name])}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(Path(self.values["logging"]["directory"]))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def observe(values: dict[str, Any], folder: Path) -> Run:
    """Train by the entry of training, with doors where the run touches data, weights and files."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    did: dict[str, Any] = {name: [] for name in ("lr", "ids", "latents", "text", "plans", "shown")}
    did |= {
        "clips": {},
        "packages": (),
    }
    run = Run(values, did)
    load, step, steps = StepRunner.load, StepRunner.step, train.train_steps
    skip = CacheBuild._skip
    choose, predict, join = setting_of.kernels_for, resolve.predict_run, train.joined

    def loaded(self: StepRunner, micro_batch: int, batch: Mapping[str, Tensor]) -> None:
        did["ids"].append(batch[IDS].tolist())
        did["latents"].append(batch[LATENTS])
        did["text"].append({name: value for name, value in batch.items() if name not in (IDS, LATENTS)})
        load(self, micro_batch, batch)

    def stepped(self: StepRunner, lr: float, *given: Any, **how: Any) -> None:
        first = self.steps_done == 0
        step(self, lr, *given, **how)
        did["lr"].append(lr)
        run.losses.append(self.loss.item())
        run.norms.append(self.gradient_norm.item())
        if first:
            did.update({name: self.buffers[name].clone() for name in STATES})

    def trained(setting: Setting, place: Any, history: Any, *rest: Any) -> StepRunner:
        runner = steps(setting, place, history, *rest)
        slots = [slot for unit in runner.units.units for slot in unit.slots]
        did["parameters"] = {slot.parameter.name: slot.parameter.shape for slot in slots}
        did["tokens"] = runner.config.tokens(runner.batch.latent)
        did["windows"] = [(w.bucket, len(w.train), len(w.validation)) for w in history.at(0).buckets]
        did["replay"] = type(runner.replay).__name__
        did["marks"] = sum(op.kind == "mark" for op in runner.program.ops)
        did["kernels"] = {op: f"{k.__module__}.{k.__qualname__}" for op, k in runner.executor.kernels.items()}
        did["plans"].append(runner.plan)
        did["final"] = {name: runner.buffers[name].clone() for name in STATES}
        return runner

    def shared(self: CacheBuild, *rest: Any) -> None:
        did["bad_share"] = self.settings.bad_share
        skip(self, *rest)

    def chosen(*given: Any, **asked: Any) -> Any:
        did["asked"] = asked
        return choose(*given, **asked)

    def predicted(setting: Setting, cluster: Any, **rest: Any) -> Any:
        did["packages"] = cluster.software.packages
        return predict(setting, cluster, **rest)

    def joined(plan: Plan, wanted: Any, *given: Any) -> Any:
        did["device"] = wanted
        return join(plan, wanted, *given)

    def shown(_: Path, clips: dict[str, Tensor], *rest: Any) -> list[Any]:
        did["clips"] = clips
        return []

    class Watched(Sampler):
        def __init__(self, config: Any, plan: Plan, *rest: Any, **doors: Any) -> None:
            did["plans"].append(plan)
            super().__init__(config, plan, *rest, **doors)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setattr(torch, "set_num_threads", lambda _: None)  # more would wait for one another, on these sizes
        patch.setattr(StepRunner, "load", loaded)
        patch.setattr(StepRunner, "step", stepped)
        patch.setattr(train, "train_steps", trained)
        patch.setattr(setting_of, "kernels_for", chosen)
        patch.setattr(CacheBuild, "_skip", shared)
        patch.setattr(train, "joined", joined)
        patch.setattr(resolve, "predict_run", predicted)
        patch.setattr(showcase, "show", shown)
        patch.setattr(clip_sampler, "Sampler", Watched)
        patch.setattr(Telemetry, "picture", lambda self, step, name, *rest: did["shown"].append((step, name)))
        entry.run(config=folder / "recipe.yaml", nproc=None, overrides=[])
    torch.set_num_threads(threads)
    directory = Path(values["logging"]["directory"])
    did["reported"] = [row["step"] for row in run.rows if "loss" in row]
    did["validated"] = [row["step"] for row in run.rows if "validation_loss" in row]
    did["validation"] = [row["validation_loss"] for row in run.rows if "validation_loss" in row]
    kept = Path(values["logging"].get("checkpoints", directory / FOLDER))
    did["checkpoints"] = sorted(path.name for path in kept.iterdir())
    did["files"] = sorted(path.name for path in directory.iterdir())
    did["directory"], did["cache"] = directory.name, Path(values["data"]["cache"]).name
    return run


def base(clips: Path, folder: Path) -> dict[str, Any]:
    """Three steps with everything on. What a key changes is seen at the first step, or at the end."""
    values = recipe(clips, folder)
    values["model"] = {"preset": "tiny", "layers": 1}
    values["data"]["buckets"] = [{}]
    values["optimizer"] |= {"clip_norm": 0.05, "ema_decay": 0.1}
    values["schedule"] |= {"steps": 3, "warmup_steps": 1, "final_share": 0.1}
    values["logging"] |= {"validation_draws": 1, "every": 2, "validate_every": 2}
    return values | {"sample": {"scenes": ["left"], "steps": 2}, "seed": 3, "caption_dropout": 0.3, "capture": "off"}


@pytest.fixture(scope="module")
def before(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("before")
    return observe(base(clips, folder), folder)


# -- what each key changes --------------------------------------------------------------------------------------------

LATER = frozenset({"final", "validation", "clips"})  # what other weights change
GRADIENT = frozenset({"master", "exp_avg", "exp_avg_sq", "ema"}) | LATER  # what another gradient changes
MODEL = GRADIENT | {"parameters"}
SAMPLES = GRADIENT | {"ids", "latents", "text"}
SHAPE = GRADIENT | {"latents", "tokens", "windows"}
# At such a rate no validation is better than the first: a plateau.
RISING = {"schedule.decay": "plateau", "schedule.patience": 1, "logging.validate_every": 1, "optimizer.lr": 5.0}
TWO_BUCKETS = {"data.buckets": [{}, {"width": 64}]}


@dataclass(frozen=True)
class Effect:
    """Another ``value``, and what it ``changes``; both runs with ``beside``. ``rounded``: by rounding, or not."""

    value: Any
    changes: frozenset[str]
    beside: Mapping[str, Any] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()


EFFECTS: Mapping[str, Sequence[Effect]] = {
    "model.preset": [Effect("tiny-video", MODEL)],
    "model.layers": [Effect(2, MODEL)],
    "model.block": [Effect("dit", MODEL)],
    "model.objective": [Effect("v-prediction", MODEL - {"parameters"})],
    "model.width": [Effect(96, MODEL)],
    "model.heads": [Effect(3, MODEL)],
    "model.ffn": [Effect(48, MODEL)],
    "model.patch": [Effect([1, 1, 2], MODEL | {"tokens"})],
    "model.position_lengths": [Effect([5, 6, 6], MODEL - {"validation", "clips"})],  # rows that nothing here reads
    "plan": [  # a step loads each half of its batch by itself; the same samples
        Effect(
            {"dtype": "float32", "recompute": "full", "micro_batches": 2},
            frozenset({"plans", "ids", "latents", "text"}),
            rounded=GRADIENT,
        )
    ],
    "cluster": [Effect("local-cpu", frozenset({"files"}))],
    "data.clips": [Effect(["{folder}/other/a.mp4"], GRADIENT | {"latents"})],
    "data.captions": [Effect("{folder}/other/captions.yaml", GRADIENT | {"text"})],
    "data.size": [Effect(64, SHAPE)],
    "data.frames": [Effect(9, SHAPE | {"ids", "text"})],
    "data.buckets.0.frames": [Effect(9, SHAPE | {"ids", "text"})],
    "data.buckets.0.height": [Effect(64, SHAPE)],
    "data.buckets.0.width": [Effect(64, SHAPE)],
    "data.buckets.0.weight": [Effect(0.01, SAMPLES - GRADIENT | LATER, {**TWO_BUCKETS, "seed": 4})],
    "data.buckets.0.global_batch": [Effect(4, SAMPLES)],
    "data.buckets.0.fps": [Effect(20, SAMPLES | {"windows"})],
    "data.buckets.0.squeeze_from_s": [  # takes the right scene alone
        Effect(0.4, SAMPLES | {"windows"}, {**TWO_BUCKETS, "sample.scenes": ["right"]})
    ],
    "data.buckets.0.name": [Effect("short", frozenset({"windows"}))],
    "data.weigh": [
        Effect("samples", SAMPLES - GRADIENT | LATER, {**TWO_BUCKETS, "seed": 4, "data.buckets.0.global_batch": 32})
    ],
    "data.crop_limit": [Effect(0.2, frozenset())],
    "data.fps": [Effect(20, SAMPLES | {"windows"})],
    "data.bad_share": [Effect(0.5, frozenset({"bad_share"}))],
    "data.stride": [Effect(1, SAMPLES | {"windows"})],
    "data.validation_share": [Effect(0.0, SAMPLES | {"windows", "validated"})],
    "data.encoders.0.name": [Effect("letters", MODEL | {"text"})],
    "data.encoders.0.tokens": [Effect(8, GRADIENT | {"text"})],
    "data.encoders.0.width": [Effect(16, MODEL | {"text"})],
    "data.cache": [Effect("{folder}/elsewhere", frozenset({"cache"}))],
    "data.embeddings": [Effect("loop", frozenset())],  # the same bits: tests/launch/training/test_captions.py
    "data.embedding_steps": [Effect(2, frozenset(), {"data.embeddings": "loop"})],
    "data.global_batch": [Effect(4, SAMPLES)],
    "data.balance": [Effect(1.0, SAMPLES - {"validation"} | {"windows"}, {"data.validation_share": 0.0})],
    "optimizer.lr": [Effect(2e-2, LATER | {"lr", "master", "ema"})],
    "optimizer.betas": [
        Effect([0.8, 0.95], LATER | {"exp_avg", "master", "ema"}),
        Effect([0.9, 0.9], LATER | {"exp_avg_sq", "master", "ema"}),
    ],
    "optimizer.eps": [Effect(1e-3, LATER | {"master", "ema"})],
    "optimizer.weight_decay": [Effect(0.5, LATER | {"master", "ema"})],
    "optimizer.clip_norm": [Effect(0.1, GRADIENT)],
    "optimizer.ema_decay": [Effect(0.05, LATER | {"ema"})],
    "schedule.steps": [
        Effect(4, SAMPLES - GRADIENT | LATER | {"lr", "checkpoints", "reported", "validated"}),
    ],
    "schedule.warmup_steps": [Effect(2, LATER | {"lr", "master", "ema"})],
    "schedule.decay": [Effect("constant", LATER | {"lr"})],
    "schedule.cut": [Effect(0.1, LATER | {"lr"}, {**RISING})],
    "schedule.patience": [Effect(2, LATER | {"lr"}, {**RISING})],
    "schedule.final_share": [Effect(0.5, LATER | {"lr"})],
    "logging.directory": [Effect("{folder}/elsewhere", frozenset({"directory"}))],
    "logging.checkpoints": [Effect("{folder}/kept", frozenset({"files"}))],
    "logging.every": [Effect(1, frozenset({"reported"}))],
    "logging.validate_every": [Effect(0, frozenset({"validated", "validation"}))],
    "logging.validation_draws": [Effect(2, frozenset({"validation"}))],
    "logging.numerics_every": [Effect(2, frozenset({"files"}))],
    "logging.checkpoint_every": [Effect(2, frozenset({"checkpoints"}))],
    "logging.keep": [Effect(1, frozenset({"checkpoints"}), {"logging.checkpoint_every": 1})],
    "logging.keep_every": [Effect(1, frozenset({"checkpoints"}), {"logging.checkpoint_every": 1})],
    "logging.keep_best": [
        Effect(  # at such a rate the loss rises from the first step on
            *(True, frozenset({"checkpoints"})),
            {"logging.checkpoint_every": 1, "logging.validate_every": 1, "logging.keep": 1, "optimizer.lr": 5.0},
        )
    ],
    "sample.scenes": [Effect(["right"], frozenset({"clips"}))],
    "sample.bucket": [Effect("8x32x64", frozenset({"clips"}), TWO_BUCKETS)],
    "sample.steps": [Effect(3, frozenset({"clips"}))],
    "sample.schedule": [Effect("linear", frozenset({"clips"}))],
    "sample.solver": [Effect("midpoint", frozenset({"clips"}))],
    "sample.guidance": [Effect(2.0, frozenset({"clips"}))],
    "sample.seed": [Effect(4, frozenset({"clips"}))],
    "sample.every": [Effect(2, frozenset({"shown", "plans"}))],
    "seed": [Effect(4, SAMPLES)],
    "caption_dropout": [Effect(0.9, GRADIENT)],
    "on_loss": [Effect("exact", frozenset())],  # of a run that lost ranks: test_resolve.py
    "may_change": [Effect(["seed"], frozenset())],  # of a run that goes on with nothing
    "weights": [Effect("master", frozenset({"validation", "clips"}))],
    "capture": [Effect("required", frozenset({"replay"}))],
    "marks": [Effect("on", frozenset({"marks"}))],  # auto: on a GPU, test_marked.py
    "kernels": [Effect({"attention": "reference"}, frozenset({"kernels"}), rounded=GRADIENT)],
    "packages": [Effect(["fa3"], frozenset({"packages"}), {"cluster": "local-cpu"})],
    "device": [Effect("auto", frozenset({"device"}))],  # without a GPU, the same
    "deterministic": [Effect(True, frozenset({"asked"}))],  # of the registry; on a CPU it has no others
}
# Keys of which another value cannot run here: the refusal names what they say.
REFUSED = {
    "codec.kind": ("another", "codec.kind is 'another'"),
    "data.versions": ({"5": "a"}, "data.versions begins at step 5"),  # obeyed: tests/data/cache/test_versions.py
    "data.encoders.0.directory": ("{folder}/absent", "{folder}/absent"),
    # obeyed, of a directory: tests/data/encoders, tests/launch/training/test_captions.py
    "data.encoders.0.dtype": ("bfloat16", "are of a directory's weights"),
    "data.encoders.0.reads": ("quoted", "are of a directory's weights"),
    "data.encoders.0.positions": ("stretched", "are of a directory's weights"),
    "data.encoders.0.sharded": (True, "are of a directory's weights"),
}
# Keys of a run that begins with another's end: tests/launch/training/test_start.py has one, and obeys each of them.
STARTED = {f"start_from.{name}" for name in ("checkpoint", "weights", "positions", "moments", "latents")}
STARTED |= {"on_loss"}  # of a job that lost ranks: tests/launch/training/test_batches.py
STARTED |= {  # of a run whose loss jumps: tests/launch/training/test_spikes.py
    f"spikes.{name}" for name in ("deviations", "window", "steps", "checkpoints", "limit")
}
STARTED |= {"logging.checkpoint_files"}  # of several ranks: tests/launch/training/checkpoint/test_remote.py
STARTED |= {"logging.memory_every", "logging.memory_folder"}  # of a job of several lives: test_in_memory.py
STARTED |= {f"model.lora.{name}" for name in ("rank", "alpha", "targets")}  # tests/launch/training/test_base.py
STARTED |= {  # of a spatial upsampler, which samples no captions: tests/data/test_low_resolution.py
    f"data.low_resolution.{name}" for name in ("scale", "strength", "seed", "round_trip", "round_trip_share")
}


def test_every_key_of_a_recipe_is_here() -> None:
    assert sorted(keys(Config)) == sorted({*EFFECTS, *REFUSED, *STARTED})


def other_data(clips: Path, folder: Path) -> None:
    """The clip upside down, and other captions, in ``folder``/other."""
    (folder / "other").mkdir()
    write_mp4(folder / "other" / "a.mp4", read_frames(clips / "a.mp4", 32, 32).flip(1), RATE)
    (folder / "other" / "captions.yaml").write_text(CAPTIONS.replace("It moves", "They move"))


def written(value: Any, folder: Path) -> Any:
    """With the folder in its place."""
    if isinstance(value, list):
        return [written(part, folder) for part in value]
    return value.format(folder=folder) if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("key", "effect"),
    [(key, effect) for key, effects in EFFECTS.items() for effect in effects],
    ids=lambda x: x if isinstance(x, str) else str(x.value)[:30],  # not its set: each process orders it otherwise
)
def test_a_key_changes_what_it_names(key: str, effect: Effect, before: Run, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "after"
    folder.mkdir()
    other_data(clips, folder)
    values = base(clips, folder)
    for name, value in effect.beside.items():
        put(values, name, copy.deepcopy(value))
    if effect.beside:
        start = tmp_path / "before"
        start.mkdir()
        unchanged = copy.deepcopy(values)
        put(unchanged, "data.cache", str(start / "cache"))
        put(unchanged, "logging.directory", str(start / "run"))
        before = observe(unchanged, start)
    put(values, key, written(effect.value, folder))
    changed = observe(values, folder).differs(before)
    assert changed - effect.rounded == effect.changes - effect.rounded


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_be_obeyed_is_told(key: str, clips: Path, tmp_path: Path) -> None:
    value, said = (written(text, tmp_path) for text in REFUSED[key])
    values = base(clips, tmp_path)
    put(values, key, value)
    with pytest.raises(CinemeshError) as refused:
        Setting.of(check_config(values, "test"))
    assert said in str(refused.value)


# -- reports and clips, made again ------------------------------------------------------------------------------------


def test_reports_are_means_since_the_last_one(before: Run) -> None:
    """Of losses and norms as they were read after every step; the learning rate is the last."""
    first, last = [row for row in before.rows if "loss" in row]
    assert (first["step"], last["step"]) == (2, 3) and min(abs(a - b) for a, b in pairwise(before.losses)) > 1e-4
    assert first["loss"] == pytest.approx(sum(before.losses[:2]) / 2, rel=1e-12)
    assert first["gradient_norm"] == pytest.approx(sum(before.norms[:2]) / 2, rel=1e-12)
    assert (last["loss"], last["gradient_norm"]) == (before.losses[2], before.norms[2])
    assert [first["lr"], last["lr"]] == before.did["lr"][1:]


def read_back(run: Run, state: str) -> dict[str, Tensor]:
    """A state of the last checkpoint by name, read without the package."""
    path = Path(run.values["logging"]["directory"]) / FOLDER / run.did["checkpoints"][-1]
    return {name: value.double() for name, value in plain_states(path)[state].items()}


def clip_of(run: Run, weights: dict[str, Tensor]) -> Tensor:
    """Euler on the plain model, guided, from the weights of a file: the clip of the one scene that is shown."""
    config = check_config(run.values, "test")
    setting, section = Setting.of(config), config.sample
    assert section is not None
    model = Reference(setting.model).double()
    model.load_state_dict(weights)
    given = {
        n: v.double() if v.is_floating_point() else v
        for n, v in setting.encoding.captions(["FPS-24 It moves."]).items()
    }
    null = {n: torch.zeros_like(v) for n, v in given.items()} | {MASK: torch.ones_like(given[MASK])}
    assert given.keys() == {MASK, *(text_input(e.name) for e in setting.model.encoders)}
    shape = (setting.model.channels, *setting.latents[0])
    zero = torch.tensor([0])  # its sample id is its index among the clips
    x = flow.draw_noise(section.seed, zero, zero, zero, shape, Purpose.SAMPLING)
    with torch.no_grad():
        for now, then in pairwise(linear_quadratic(section.steps)):
            t = torch.full((1,), now, dtype=torch.float64)
            unguided = model(x, t, null)
            x = x + (then - now) * (unguided + section.guidance * (model(x, t, given) - unguided))
    return setting.encoding.codec.decode(x[0].float())


def test_the_clips_of_a_finished_run_are_those_of_its_ema_weights(before: Run) -> None:
    """And of no other state: the file is read by torch's reader, the clip is made by the plain model."""
    shown = before.did["clips"]["left"].int()
    assert before.did["clips"].keys() == {"left"}
    assert (shown - clip_of(before, read_back(before, "ema")).int()).abs().max() <= 1
    assert (shown - clip_of(before, read_back(before, "master")).int()).abs().max() > 1
