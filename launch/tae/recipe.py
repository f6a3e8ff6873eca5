"""The recipe of an autoencoder's training: a YAML file with sections, as that of the transformer's (``sections``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from ...data.context_codec import SHIPPED
from ...errors import CinemeshError
from ...model.tae.config import BlockDepth, Body, Channels, Factor, TAEConfig, Time, Width, tae_preset
from ...model.tae.losses import LossWeights, check_positions
from ...ranges import SEED_RANGE, integers
from ..training.checkpoint.choosing import Keep
from ..training.model_section import SECTION_CONFIG
from ..training.recipe import KEEP_RANGE, DataSection, Every, EveryOrNever, OptimizerSection, ScheduleSection
from ..training.sections import from_values, read_values

CropPixels = Annotated[int, integers(8, 8192, "no crop is smaller than a block, or larger than a window", "pixels")]
Layers = Annotated[int, integers(1, 8, "each but the last halves the picture")]


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class TAESection:
    """A preset, and what is changed in it."""

    preset: Annotated[str, "the autoencoder to begin with; default of every other key of this section"]
    channels: Annotated[Channels | None, "of a latent"] = None
    body: Annotated[Body | None, "pyramid: the paper's; grid: begins as the linear codec dct-context"] = None
    time: Annotated[
        Time | None, "1d: 2.5D; 3d: convolutions over all at once; none: frame by frame, an image autoencoder"
    ] = None
    width: Annotated[Width | None, "channels of the finest level"] = None
    multipliers: Annotated[tuple[Factor, ...] | None, "of the width, at every level; from one to the next, half"] = None
    blocks: Annotated[BlockDepth | None, "residual blocks of a level"] = None
    groups: Annotated[Width | None, "of the norms"] = None

    def build(self) -> TAEConfig:
        """Raises CinemeshError for a preset that is none, and as TAEConfig."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        return replace(tae_preset(self.preset), **{name: value for name, value in changed.items() if value is not None})


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class TAEData(DataSection):
    """As of the transformer's recipe, without captions' encoders; the cache holds pixels.

    Images are a bucket of one frame: with weight 1 beside clips with weight 3, one batch of images to three of video
    (Movie Gen 3.1.1).
    """

    crop: Annotated[CropPixels | None, "height and width of what is taken of a window, anywhere; default: all"] = None
    mirror: Annotated[bool, "half of the samples are mirrored, left to right"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoders != type(self).encoders:
            raise CinemeshError("data.encoders: an autoencoder reads no captions", remedy="leave the key out")


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class DiscriminatorSection:
    """The adversary, a patch discriminator. It is there where losses.adversarial is above 0."""

    width: Annotated[Width, "channels of its first layer; a multiple of 8"] = 64
    layers: Annotated[Layers, "between the first and the last"] = 3

    def __post_init__(self) -> None:
        if self.width % 8:
            raise CinemeshError(
                f"discriminator.width({self.width}) % 8 = {self.width % 8}", remedy="its norms have 8 groups"
            )


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class TAELogging:
    """Where a run writes, and how often. A checkpoint is written at the end in any case."""

    directory: Annotated[Path, "of the run: checkpoints, metrics, the trained autoencoder"]
    every: Annotated[Every, "from one report to the next"] = 10
    validate_every: Annotated[EveryOrNever, "from one reconstruction of held-out windows to the next"] = 500
    checkpoint_every: Annotated[EveryOrNever, "from one checkpoint to the next"] = 500
    keep: Annotated[int, KEEP_RANGE, "newest checkpoints that stay on disk"] = 2
    keep_every: Annotated[EveryOrNever, "from one checkpoint that stays for good to the next"] = 0

    @property
    def kept(self) -> Keep:
        return Keep(self.keep, self.keep_every)


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class TAERecipe:
    """A whole recipe."""

    model: TAESection
    data: TAEData
    losses: LossWeights = LossWeights()
    discriminator: DiscriminatorSection = DiscriminatorSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    logging: TAELogging
    start_from: Annotated[
        Path | None,
        "directory of an autoencoder whose weights are taken, by name, where shapes match: of cinemesh tae train, or "
        "an AutoencoderKL of diffusers; one of images is inflated",
    ] = None
    linear: Annotated[Path, "the map of dct-context that a body grid begins as; default: the one that ships"] = SHIPPED
    recompute: Annotated[bool, "inner activations are computed again in backward: slower, in less memory"] = False
    seed: Annotated[int, SEED_RANGE, "of the weights, the order of samples, crops and noise"] = 0
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16"],
        "bfloat16: products and convolutions; weights, their moments and averages are float32",
    ] = "float32"
    device: Annotated[Literal["auto", "cpu", "cuda"], "cuda: a GPU for each process; auto: where one is visible"] = (
        "auto"
    )
    statistics_from: Annotated[int, integers(1, 10**6, "each is encoded when training is done", "windows")] = 256

    def __post_init__(self) -> None:
        if self.schedule.decay == "plateau":
            raise CinemeshError("schedule.decay is plateau", remedy="an autoencoder's is cosine or constant")
        config = self.model.build()
        for bucket in self.data.shapes:
            height, width = (min(size, self.data.crop or size) for size in (bucket.height, bucket.width))
            _, h, w = config.latent(bucket.frames, height, width)
            if self.losses.outlier:
                check_positions(h, w)

    @property
    def state_dtype(self) -> Literal["float32", "float64"]:
        """Of weights and moments."""
        return "float64" if self.dtype == "float64" else "float32"


def read_tae_recipe(path: Path, overrides: Sequence[str] = ()) -> TAERecipe:
    """The recipe at ``path`` with ``a.b=value`` overrides, checked. Raises CinemeshError for what breaks a rule."""
    return check_tae_recipe(read_values(TAERecipe, path, overrides), str(path))


def check_tae_recipe(values: dict[str, Any], where: str) -> TAERecipe:
    """A recipe from plain values; ``where`` names their origin in errors."""
    return from_values(TAERecipe, values, where)
