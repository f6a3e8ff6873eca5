"""The recipe of a run: a YAML file with sections, read and checked before anything else happens.

Sections are dataclasses that pydantic checks: frozen, no unknown keys. Whatever is wrong becomes one ``CinemeshError``
that names the key, the value and the rule. Relative paths are relative to the current directory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationError, create_model
from pydantic.dataclasses import dataclass

from ...data.batches import Batches
from ...data.buckets import Bucket
from ...data.cache.version import changes_of
from ...data.encoding import BlockDCT, CodecSettings, codec_kind
from ...data.settings import DataSettings
from ...errors import CinemeshError
from ...model.flow import CAPTION_DROPOUT
from ...model.sampler import GUIDANCE
from ...model.solvers import ScheduleName, SolverName
from ...model.step import Optimizer
from ...parallel.ir.frozen_layers import TURN_STEPS
from ...parallel.ir.nccl_stack import Capture
from ...parallel.ir.plan import Plan
from ...ranges import BATCH_RANGE, EULER_RANGE, GUIDANCE_RANGE, MOST_STEPS, SEED_RANGE, STEPS_RANGE, integers, reals
from ..plans import held_fields, read_plan
from ..storage.places import Location
from .model_section import SECTION_CONFIG, ModelSection, StartFrom, named_place
from .plateau import Validated, plateaus
from .resolved import FILE as RESOLVED
from .resolved import Resolved
from .sections import from_values, read_values, section_error

BELOW_1 = 1 - 2**-24  # the largest float32 below 1
Every = Annotated[int, integers(1, MOST_STEPS, "no run has more", "steps")]
EveryOrNever = Annotated[int, integers(0, MOST_STEPS, "0 is never; no run has more", "steps")]
Share = Annotated[float, reals(0, 1, "it is a part of a whole")]
LR_RANGE = reals(
    1e-12, 10, "AdamW moves a weight by about lr a step: float32 weights are at most a few units, and not finer"
)
EPS_RANGE = reals(1e-30, 1, "below, it is lost in float32; above, it is no small number beside a gradient")
DECAY_RANGE = reals(0, 1000, "times lr it is the part of a weight that is lost a step")
CLIP_RANGE = reals(
    1e-9, 1e30, "shorter, every gradient would vanish; longer is finite in float32 no more", "global norm"
)
CUT_RANGE = reals(0.01, 0.99, "at 1 nothing is cut, far below nothing is learnt any more", "of the learning rate")
DROPOUT_RANGE = reals(0, 0.99, "some captions are left to learn from", "of the samples")
DRAWS_RANGE = integers(1, 10_000, "each is a forward pass of every validation sample", "draws")
KEEP_RANGE = integers(1, 10**6, "no run writes more; one is needed to go on from", "checkpoints")
DEVIATIONS_RANGE = reals(1, 1e6, "below, usual losses would be high", "standard deviations, as the median one tells")
WINDOW_RANGE = integers(5, 1000, "fewer tell no median; every checkpoint holds them", "losses")
IN_A_ROW_RANGE = integers(1, 100, "a run that waits longer has learnt from them", "losses")
LIMIT_RANGE = integers(1, 1000, "a run that goes back more often stands still", "times")
Decay = Annotated[float, reals(0, BELOW_1, "at 1, in float32, an average would never move")]


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class DataSection(DataSettings):
    """The data's settings, the directory of their cache, and what one optimizer step takes of them."""

    cache: Annotated[str, "folder of the latent cache, where what is missing is built; a URL too, with versions"]
    global_batch: Annotated[int, BATCH_RANGE, "samples of a step whose bucket does not give its own"]
    weigh: Annotated[
        Literal["steps", "samples"],
        "what the buckets' weights are shares of: samples makes a bucket's steps fewer where its batch is larger",
    ] = "steps"
    embeddings: Annotated[
        Literal["cached", "loop"],
        "of captions: in the cache, or made by the encoders while the run goes on, between two steps",
    ] = "cached"
    embedding_steps: Annotated[
        Every, "whose captions a loop encodes at once: so often are weights in shards gathered"
    ] = TURN_STEPS
    versions: Annotated[
        dict[str, str], "of the cache, by the step from which each is drawn from; default: what these settings make"
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        changes_of(self.versions)

    @property
    def global_batches(self) -> list[int]:
        """Samples of a step of every bucket."""
        return [bucket.global_batch or self.global_batch for bucket in self.shapes]

    @property
    def step_weights(self) -> tuple[float, ...]:
        """Of every bucket, its part of the steps, over the sum of all."""
        weights = [bucket.weight for bucket in self.shapes]
        if self.weigh == "samples":
            weights = [weight / batch for weight, batch in zip(weights, self.global_batches, strict=True)]
        return tuple(weights)


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class OptimizerSection(Optimizer):
    """AdamW and its peak learning rate."""

    lr: Annotated[float, LR_RANGE, "peak learning rate"]
    betas: Annotated[tuple[Decay, Decay], "decay of the first and the second moment"] = Optimizer.betas
    eps: Annotated[float, EPS_RANGE, "added to the root of the second moment"] = Optimizer.eps
    weight_decay: Annotated[float, DECAY_RANGE, "decoupled: weights lose lr * weight_decay of themselves a step"] = (
        Optimizer.weight_decay
    )
    clip_norm: Annotated[float, CLIP_RANGE, "a longer gradient is scaled to this global norm"] = Optimizer.clip_norm
    ema_decay: Annotated[Decay, "of the averaged weights, which are sampled"] = Optimizer.ema_decay

    def __post_init__(self) -> None:
        if self.lr * self.weight_decay >= 1:
            raise CinemeshError(
                f"optimizer: lr({self.lr:g}) * weight_decay({self.weight_decay:g}) = {self.lr * self.weight_decay:g}",
                remedy="it must be below 1, or a step would turn the sign of every weight: lower one of them",
            )


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class ScheduleSection:
    """``steps`` updates; the learning rate rises linearly over ``warmup_steps``, then falls, stays or is cut."""

    steps: Annotated[int, STEPS_RANGE, "of the run"]
    warmup_steps: Annotated[EveryOrNever, "over which the learning rate rises linearly; at most steps"] = 0
    decay: Annotated[
        Literal["cosine", "constant", "plateau"],
        "of the learning rate after the warm-up; plateau: cut whenever the validation loss stands still",
    ] = "cosine"
    final_share: Annotated[Share, "of the peak, where a cosine ends"] = 0.0
    cut: Annotated[float, CUT_RANGE, "what is left of the learning rate after a plateau"] = 0.5
    patience: Annotated[Every, "validations without a lower loss that are a plateau"] = 3

    def __post_init__(self) -> None:
        if self.warmup_steps > self.steps:
            raise CinemeshError(
                f"schedule: warmup_steps({self.warmup_steps}) > steps({self.steps})",
                remedy="the learning rate would never reach its peak: warm up for fewer steps, or train for more",
            )

    def lr(self, peak: float, step: int, validations: Sequence[Validated] = ()) -> float:
        """Learning rate of update ``step``, counted from 0, after these ``validations``.

        A function of nothing else, so a resumed run goes on.
        """
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return peak
        if self.decay == "plateau":
            return peak * self.cut ** plateaus(validations, self.patience)
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return peak * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class LoggingSection:
    """Where a run writes, and how often. A checkpoint is written at the end in any case."""

    directory: Annotated[Path, "of the run: checkpoints, metrics, samples"]
    checkpoints: Annotated[
        Location | None,
        BeforeValidator(named_place),
        "where checkpoints are kept: a folder, or a URL, `s3://bucket/run`; default: `checkpoints` in the directory",
    ] = None
    checkpoint_files: Annotated[
        Literal["rank", "server"], "a file of each rank, or one of all ranks of a server, which the first writes"
    ] = "rank"
    every: Annotated[Every, "from one report to the next"] = 10
    validate_every: Annotated[EveryOrNever, "from one validation to the next"] = 100
    validation_draws: Annotated[int, DRAWS_RANGE, "fixed (t, noise) of every validation sample"] = 4
    numerics_every: Annotated[EveryOrNever, "from one step whose every value is measured to the next"] = 0
    checkpoint_every: Annotated[EveryOrNever, "from one checkpoint to the next"] = 500
    keep: Annotated[int, KEEP_RANGE, "newest checkpoints that stay on disk"] = 2
    keep_every: Annotated[EveryOrNever, "from one checkpoint that stays for good to the next"] = 0
    keep_best: Annotated[bool, "the checkpoint of the lowest validation loss stays, if it was validated"] = False
    memory_every: Annotated[EveryOrNever, "from one copy of the states in the servers' memory to the next"] = 0
    memory_folder: Annotated[Path, "where a server keeps such copies, of a file system in memory"] = Path("/dev/shm")  # nosec B108  in a folder of the user's own, which is looked at


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class SpikesSection:
    """When the loss jumps, the run goes back to a checkpoint from before, and passes over the samples since."""

    deviations: Annotated[
        float, DEVIATIONS_RANGE, "above the median of its bucket's last losses, where one is high"
    ] = 8.0
    window: Annotated[int, WINDOW_RANGE, "losses of a bucket that the next one is compared with"] = 100
    steps: Annotated[int, IN_A_ROW_RANGE, "high losses in a row that are a spike"] = 3
    checkpoints: Annotated[int, KEEP_RANGE, "to go back: 1 is the newest that is older than the spike"] = 1
    limit: Annotated[int, LIMIT_RANGE, "times that a run goes back; after that it ends"] = 5


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class SampleSection:
    """Clips sampled when training is done, and while it goes on: of the named scenes' captions, or of every scene's."""

    scenes: Annotated[tuple[str, ...] | None, "whose captions are sampled; default: all"] = None
    bucket: Annotated[str | None, "FRAMESxHEIGHTxWIDTH of the clips, one of the data's; default: the first"] = None
    steps: Annotated[int, EULER_RANGE, "of the sampler"] = 50
    schedule: Annotated[
        ScheduleName, "the steps' lengths: linear, then quadratic, as the first half of 250 linear ones; or all equal"
    ] = "linear-quadratic"
    solver: Annotated[SolverName, "velocities of a step: euler one, midpoint two, dopri5 six"] = "euler"
    guidance: Annotated[float, GUIDANCE_RANGE, "scale of classifier-free guidance"] = GUIDANCE
    seed: Annotated[int, SEED_RANGE, "of the starting noise"] = 0
    every: Annotated[EveryOrNever, "from one set of clips in TensorBoard, while training goes on, to the next"] = 0


AUTO = "auto"


@dataclass(frozen=True)
class Auto:
    """``plan: auto``, or a plan with ``auto: true``: the planner chooses, for a cluster. ``held``: fields by hand."""

    cluster: str
    held: dict[str, Any]


def _plan(value: object) -> object:
    """A section of fields, or what ``--plan`` takes: a file that holds a plan, or a text."""
    if isinstance(value, str):
        return read_plan(value)
    return Plan.from_dict(value) if isinstance(value, dict) else value


def _codec(value: object) -> object:
    """The settings of the kind that is named, as strict as any section."""
    if not isinstance(value, dict):
        return value
    section: Any = create_model(
        "CodecSection", __config__=SECTION_CONFIG, codec=codec_kind(value.get("kind", BlockDCT.kind))
    )
    try:
        return section(codec=value).codec
    except ValidationError as error:
        raise section_error(error, section) from None


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class Config:
    """A whole recipe. Without ``sample``, nothing is sampled at the end; without ``spikes``, no step is taken back."""

    model: ModelSection
    plan: Annotated[Plan, BeforeValidator(_plan)] = Plan()
    codec: Annotated[CodecSettings, BeforeValidator(_codec)] = BlockDCT()
    cluster: Annotated[str | None, "whose devices the plan must fit, and for which `plan: auto` is chosen"] = None
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    logging: LoggingSection
    start_from: StartFrom | None = None
    spikes: SpikesSection | None = None
    sample: SampleSection | None = None
    weights: Annotated[
        Literal["ema", "master"],
        "what is validated and sampled: the running average, which has less of the noise of single steps and none of "
        "the random start, or the step's own",
    ] = "ema"
    seed: Annotated[int, SEED_RANGE, "of the weights, the order of samples, t, noise and caption dropout"] = 0
    caption_dropout: Annotated[
        float, DROPOUT_RANGE, "part of the samples that are trained on without their caption"
    ] = CAPTION_DROPOUT
    on_loss: Annotated[Literal["shrink", "exact"], "of ranks: a batch that those left divide no more"] = "shrink"
    capture: Annotated[Capture, "steps replay, as frozen calls or a CUDA Graph: where it can be, never, or always"] = (
        "auto"
    )
    marks: Annotated[
        Literal["auto", "on", "off"],
        "records in a step that tell the watchdog where it stands; auto: on a GPU, where a graph replays it and no "
        "host does",
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        "cuda: a GPU for each process; auto: where one is visible, else the CPU, and the run says so",
    ] = "auto"
    kernels: Annotated[dict[str, str], "op, or all, to the package that runs it in place of the registry's choice"] = (
        field(default_factory=dict)
    )
    packages: Annotated[
        tuple[str, ...] | None,
        "optional packages that the plan and its price count on, `fa3` or `flash-attn-3`; default: what is installed "
        "where the run starts",
    ] = None
    may_change: Annotated[
        tuple[str, ...],
        "keys, or sections, that may be others than those of the run that is resumed, where that is refused by itself: "
        "`[seed]`; docs/operations.md lists them",
    ] = ()
    deterministic: Annotated[
        bool,
        "only kernels that sum in one fixed order (docs/cost_model.md names them), so that a run on GPUs gives the "
        "same bits again; slower",
    ] = False

    def __post_init__(self) -> None:
        if self.schedule.decay == "plateau" and not (self.logging.validate_every and self.data.validation_share):
            raise CinemeshError(
                f"schedule.decay is plateau, with logging.validate_every({self.logging.validate_every}) and "
                f"data.validation_share({self.data.validation_share:g})",
                remedy="a plateau is seen in the validation loss: let both be above 0",
            )
        log, back = self.logging, self.spikes.checkpoints if self.spikes else 0
        if back and (not log.checkpoint_every or log.keep <= back):
            raise CinemeshError(
                f"spikes.checkpoints is {back}, with logging.keep({log.keep}) and "
                f"logging.checkpoint_every({log.checkpoint_every})",
                remedy="a run goes back to checkpoints that are kept: write some, and keep one more than it goes back",
            )
        if not log.memory_folder.is_absolute():
            raise CinemeshError(
                f"logging.memory_folder is {str(log.memory_folder)!r}, no absolute path: a server's own folder does "
                "not depend on where a process starts",
                remedy="name one of a file system in memory, as /dev/shm is",
            )
        if self.sample is not None and self.data.low_resolution is not None:
            raise CinemeshError(
                "sample with data.low_resolution: a spatial upsampler makes no clip of a caption alone",
                remedy="leave sample out, and make clips larger with cinemesh upsample",
            )
        if self.model.lora is not None and self.start_from is None:
            raise CinemeshError(
                "model.lora without start_from: low-rank factors are trained beside weights",
                remedy="name them with start_from.checkpoint, or take lora out",
            )
        if self.model.lora is not None and self.start_from is not None and self.start_from.changes:
            raise CinemeshError(
                f"model.lora with start_from.{self.start_from.changes}: the weights of the base stay as they are",
                remedy="take it out, or train all weights",
            )

    @property
    def sampled(self) -> Bucket:
        """The bucket whose shape sampled clips have. Raises CinemeshError when ``sample.bucket`` names none."""
        shapes = {str(bucket): bucket for bucket in self.data.shapes}
        name = (self.sample and self.sample.bucket) or next(iter(shapes))
        if name not in shapes:
            raise CinemeshError(f"sample.bucket is {name!r}", remedy=f"the data have the buckets {', '.join(shapes)}")
        return shapes[name]


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The recipe at ``path`` with ``a.b=value`` overrides, checked; ``plan: auto`` as it was resolved.

    Raises CinemeshError for a file that cannot be read, for keys that are unknown, missing or given twice, for values
    that break a rule, and for a plan that nobody has chosen yet.
    """
    return read_run(path, overrides)[0]


def read_run(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Batches]:
    """As ``read_config``, with the samples that a step of every bucket has: the recipe's, or fewer of ranks left."""
    config, auto = read_recipe(path, overrides)
    if auto is None:
        return config, tuple(config.data.global_batches)
    if (resolved := Resolved.read(config.logging.directory)) is None:
        raise CinemeshError(
            f"{path}: plan is auto, and {config.logging.directory / RESOLVED} does not say yet which",
            remedy="train with this recipe first, or give a plan",
        )
    return replace(config, plan=resolved.plan), resolved.global_batches


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Auto | None]:
    """As ``read_config``; where the plan is left to the planner, with the plan of one process in its place."""
    values = read_values(Config, path, overrides)
    plan = values.get("plan")
    held = dict(plan) if isinstance(plan, dict) else {AUTO: True} if plan == AUTO else {}
    if held.pop(AUTO, False) is not True:
        return check_config(values, str(path)), None
    config = check_config(values | {"plan": {}}, str(path))
    if config.cluster is None:
        raise CinemeshError(
            f"{path}: plan is auto, and no cluster is named to choose it for",
            remedy="add cluster: grand-teton-h100, or the file that cinemesh calibrate wrote",
        )
    return config, Auto(config.cluster, held_fields(held))


def check_config(values: dict[str, Any], where: str) -> Config:
    """A recipe from plain values; ``where`` names their origin in errors."""
    return from_values(Config, values, where)
