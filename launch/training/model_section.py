"""What of a recipe says which model a run trains, and what it begins with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from ...data.encoding import Encoding
from ...errors import CinemeshError
from ...model.block_style import BlockName
from ...model.config import MOST_SIZE, Encoder, ModelConfig, preset
from ...model.lora import Lora
from ...model.objective import ObjectiveName
from ...parallel.ir.fields import MOST_BLOCKS
from ...ranges import integers, reals
from ..storage.places import Location, location_of

SECTION_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
BlockCount = Annotated[int, integers(1, MOST_BLOCKS, "no model has more", "blocks")]
ModelSize = Annotated[int, integers(1, MOST_SIZE, "no model is larger")]
ALPHA_RANGE = reals(1e-6, 1e6, "below, the factors would add nothing; above, nothing else would be left")


def named_place(value: object) -> object:
    """A URL, or a path: for pydantic."""
    return location_of(value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class LoraSection(Lora):
    """Low-rank factors of frozen products: y = x W + alpha / rank (x A) B."""

    rank: Annotated[ModelSize, "columns of A, rows of B"]
    alpha: Annotated[float, ALPHA_RANGE, "over the rank, the scale of what they add"]
    targets: Annotated[tuple[str, ...], "products of every block that have factors"] = Lora.targets


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class ModelSection:
    """A preset, and what is changed in it. Channels follow from the codec, text encoders from the data."""

    preset: Annotated[str, "the model to begin with; default of every other key of this section"]
    layers: Annotated[BlockCount | None, "blocks of the transformer"] = None
    width: Annotated[ModelSize | None, "of the residual stream; a multiple of heads"] = None
    heads: Annotated[ModelSize | None, "of attention"] = None
    ffn: Annotated[ModelSize | None, "width of the feed-forward part"] = None
    patch: Annotated[
        tuple[ModelSize, ModelSize, ModelSize] | None, "values of the latent in a token, over (T, H, W)"
    ] = None
    position_lengths: Annotated[
        tuple[ModelSize, ModelSize, ModelSize] | None, "of the position tables, in patches (T, H, W)"
    ] = None
    objective: Annotated[
        ObjectiveName | None, "what is predicted: the velocity of flow matching, or v of diffusion, zero terminal SNR"
    ] = None
    block: Annotated[
        BlockName | None,
        "form of the blocks: the backbone's, or DiT's, of layer norms, biases and SiLU",
    ] = None
    lora: Annotated[LoraSection | None, "trained beside the weights of start_from, which stay as they are"] = None

    def build(self, encoding: Encoding) -> ModelConfig:
        """The model for these latents and texts. Raises CinemeshError for one that wants latents that nobody makes."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        changed = {name: value for name, value in changed.items() if value is not None}
        if self.lora is not None:
            changed["lora"] = Lora(self.lora.rank, self.lora.alpha, self.lora.targets)
        texts = tuple(Encoder(e.name, e.width, e.tokens) for e in encoding.encoders)
        small = encoding.low_resolution
        conditions = () if small is None else (small.condition(encoding.codec),)
        if missing := {one.name for one in preset(self.preset).latent_conditions} - {one.name for one in conditions}:
            raise CinemeshError(
                f"model.preset {self.preset} is shown {', '.join(missing)} latents, and the data make none",
                remedy="add data.low_resolution, or choose another preset",
            )
        changed |= {"channels": encoding.codec.channels, "encoders": texts, "latent_conditions": conditions}
        return replace(preset(self.preset), **changed)


@dataclass(frozen=True, kw_only=True, config=SECTION_CONFIG)
class StartFrom:
    """What step 0 of a new run begins with, in place of random weights: those of a checkpoint of any plan."""

    checkpoint: Annotated[
        Location,
        BeforeValidator(named_place),
        "a step-* folder of another run, or its URL, of a model as wide and deep",
    ]
    weights: Annotated[Literal["master", "ema"], "which of its weights the new run begins with"] = "ema"
    positions: Annotated[
        Literal["same", "expand"],
        "expand: its position tables may grow to the model's, linearly, patch centres aligned",
    ] = "same"
    moments: Annotated[Literal["keep", "drop"], "AdamW's: the checkpoint's, or zero"] = "drop"
    latents: Annotated[
        Literal["same", "rescale", "anew"],
        "where the codec is another than the checkpoint's: patchifier and final layer rescaled by the channels' stds, "
        "or begun anew",
    ] = "same"

    @property
    def changes(self) -> str | None:
        """What frozen weights cannot have, as ``moments: keep``, if anything."""
        if self.positions == "expand":
            return "positions: expand"
        if self.latents != "same":
            return f"latents: {self.latents}"
        return "moments: keep" if self.moments == "keep" else None
