"""What a recipe stands for, built in one place for training, sampling and showing: codec, encoders, model, batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ...data.buckets import latents_of
from ...data.cache import CACHE_FILE, Cache, build_cache
from ...data.clips import read_captions
from ...data.encoding import Encoding
from ...errors import CinemeshError, did_you_mean
from ...kernels.registry import Kernels, kernels_for
from ...model.buckets import Latent
from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...model.step import check
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import barrier
from ..cluster.processes import Joined
from .recipe import Config


@dataclass(frozen=True)
class Setting:
    """A recipe, and what encodes and learns by it. No video, latent or weight is read."""

    config: Config
    encoding: Encoding
    model: ModelConfig

    @classmethod
    def of(cls, config: Config) -> Setting:
        """Raises CinemeshError for a codec, an encoder or a model that cannot be built."""
        encoding = Encoding.of(config.codec, config.data.encoders)
        return cls(config, encoding, config.model.build(encoding))

    def kernels(self, device: str) -> Kernels:
        """What runs the ops on a device, as the recipe wants it. Raises CinemeshError where that cannot be."""
        return kernels_for(device, self.config.kernels, deterministic=self.config.deterministic)

    def under(self, plan: Plan) -> Setting:
        """The same with another plan."""
        return replace(self, config=replace(self.config, plan=plan))

    @cached_property
    def latents(self) -> list[Latent]:
        """(T, H, W) of every bucket. Raises CinemeshError for a bucket that the codec cannot make."""
        return latents_of(self.config.data.shapes, self.encoding.codec)

    @cached_property
    def batches(self) -> list[BatchShape]:
        """One data rank's micro-batch of every bucket. Raises CinemeshError when the plan does not divide one."""
        samples = map(self.config.plan.local_batch, self.config.data.global_batches)
        batches = [BatchShape(*of) for of in zip(samples, self.latents, strict=True)]
        for batch in batches:
            check(self.model, self.config.plan, batch)
        return batches

    @cached_property
    def captions(self) -> dict[str, str]:
        """Caption by scene, of those that are sampled when training is done: all that have windows, or those named.

        Raises CinemeshError for a scene that does not exist, or is too short for the sampled bucket.
        """
        section, data, bucket = self.config.sample, self.config.data, self.config.sampled
        if section is None:
            return {}
        scenes = {scene.name: scene for scene in read_captions(data.captions)}
        captions = {scene.name: scene.caption for scene in scenes.values() if scene.frames >= bucket.frames}
        for name in section.scenes or ():
            if name in scenes and name not in captions:
                raise CinemeshError(
                    f"sample.scenes: {name} has {scenes[name].frames} frames, fewer than bucket {bucket} needs: there "
                    "is nothing to compare a clip with",
                    remedy="leave it out, or name a shorter sample.bucket",
                )
            if name not in captions:
                raise CinemeshError(
                    f"sample.scenes: {data.captions} has no scene {name!r}", remedy=did_you_mean(name, captions)
                )
        return {name: captions[name] for name in section.scenes or captions}

    def check_training(self) -> None:
        """Raises CinemeshError for what would stop training before its first step and can be told without the clips."""
        _ = self.batches
        self.config.data.scenes()
        _ = self.captions

    def check_sampling(self) -> None:
        """Raises CinemeshError when the plan does not divide the model or a sampled clip."""
        check(self.model, self.config.plan, BatchShape(1, self.config.sampled.latent(self.encoding.codec)))

    def open_cache(self, place: Joined) -> Cache:
        """The latent cache: rank 0 builds it where it is missing or of other data, the others wait."""
        data = self.config.data
        if place.rank == 0:
            build_cache(data, self.encoding, data.cache)
        if place.mesh is not None:
            barrier()
        return Cache.open(data.cache / CACHE_FILE)
