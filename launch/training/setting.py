"""What a recipe stands for, built in one place for training, sampling and showing: codec, encoders, model, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...data.batches import Batches
from ...data.buckets import latents_of
from ...data.cache.samples import Cache
from ...data.encoding import Encoding
from ...errors import CinemeshError, did_you_mean
from ...kernels.registry import Kernels, kernels_for
from ...model.blueprint import Blueprint, BuildSteps, build_here
from ...model.buckets import BucketRunner, Latent
from ...model.config import ModelConfig, latent_text
from ...model.inputs import BatchShape
from ...model.paths import PATHS
from ...model.step import check
from ...parallel.ir.plan import Plan
from ...parallel.runtime.mesh import backend_of
from ..cluster.environment import device_here, processes_here
from ..cluster.processes import Joined
from .captions import encoded_in_loop
from .marked import slot_of
from .recipe import Config


@dataclass(frozen=True)
class Setting:
    """A recipe, and what encodes and learns by it. No video, latent or weight is read.

    ``global_batches``: samples of a step of every bucket; the recipe's, or fewer where ranks were lost.
    """

    config: Config
    encoding: Encoding
    model: ModelConfig
    global_batches: Batches

    @classmethod
    def of(cls, config: Config, batches: Batches | None = None) -> Setting:
        """With the recipe's own batches, unless others are given.

        Raises CinemeshError for a codec, an encoder or a model that cannot be built.
        """
        encoding = Encoding.of(config.codec, config.data.encoders, config.data.low_resolution)
        own = tuple(config.data.global_batches)
        return cls(config, encoding, config.model.build(encoding), batches or own)

    def kernels(self, device: str) -> Kernels:
        """What runs the ops on a device, as the recipe wants it. Raises CinemeshError where that cannot be."""
        return kernels_for(device, self.config.kernels, deterministic=self.config.deterministic)

    def under(self, plan: Plan, batches: Batches | None = None) -> Setting:
        """The same with another plan, and other batches where these are given."""
        config = replace(self.config, plan=plan)
        return replace(self, config=config, global_batches=batches or self.global_batches)

    def marked(self, device: str) -> bool:
        """Whether records of a step tell on a device where it stands."""
        config = self.config
        return config.marks == "on" or (config.marks == "auto" and device != "cpu" and config.capture != "off")

    @cached_property
    def latents(self) -> list[Latent]:
        """(T, H, W) of every bucket. Raises CinemeshError for a bucket that the codec cannot make."""
        return latents_of(self.config.data.shapes, self.encoding.codec)

    @cached_property
    def batches(self) -> list[BatchShape]:
        """One data rank's micro-batch of every bucket. Raises CinemeshError when the plan does not divide one."""
        samples = map(self.config.plan.local_batch, self.global_batches)
        batches = [BatchShape(*of) for of in zip(samples, self.latents, strict=True)]
        for batch in dict.fromkeys(batches):
            check(self.model, self.config.plan, batch)
        return batches

    @cached_property
    def shapes(self) -> list[BatchShape]:
        """What is captured: a step of each shape, which several buckets may share. Raises CinemeshError as ``batches``.

        Raises it too for two buckets that make one latent and give it another number of samples.
        """
        shapes = list(dict.fromkeys(self.batches))
        known: dict[Latent, BatchShape] = {}
        for shape in shapes:
            if shape != known.setdefault(shape.latent, shape):
                raise CinemeshError(
                    f"data.buckets: latents of {latent_text(shape.latent)} come in steps of {shape.samples} and of "
                    f"{known[shape.latent].samples} samples a rank, and a shape has one captured step",
                    remedy="give buckets of one shape the same global_batch",
                )
        return shapes

    @property
    def encoder_bytes(self) -> int:
        """Of the text encoders' weights on one rank; none, where captions were encoded before."""
        return self.encoding.held_bytes(self.config.plan) if encoded_in_loop(self.config) else 0

    def check_sampled_scenes(self) -> None:
        """Raises CinemeshError for a scene or bucket that is to be sampled when training is done and does not exist."""
        self._check_sampler()
        section, captions, _ = self.config.sample, self.config.data.captions, self.config.sampled
        known = [scene.name for scene in self.config.data.scenes()]
        for name in (section.scenes if section else None) or ():
            if name not in known:
                raise CinemeshError(
                    f"sample.scenes: {captions} has no scene {name!r}", remedy=did_you_mean(name, known)
                )

    def sampled_captions(self, cache: Cache) -> dict[str, str]:
        """Caption by scene, of those that are sampled when training is done: all that have windows, or those named.

        Raises CinemeshError for a scene without windows in the sampled bucket: it is too short, or was skipped.
        """
        section, bucket = self.config.sample, self.config.sampled
        if section is None:
            return {}
        captions = next(windows.train for windows in cache.buckets if windows.bucket == str(bucket)).captions
        for name in section.scenes or ():
            if name not in captions:
                raise CinemeshError(
                    f"sample.scenes: {name} has no window in bucket {bucket}, which needs {bucket.needs}: there is "
                    "nothing to compare a clip with",
                    remedy="leave it out, or name a shorter sample.bucket",
                )
        return {name: captions[name] for name in section.scenes or captions}

    def check_training(self) -> None:
        """Raises CinemeshError for what would stop training before its first step and can be told without the clips."""
        _ = self.shapes
        self.check_sampled_scenes()

    def check_sampling(self) -> None:
        """Raises CinemeshError when the plan does not divide the model or a sampled clip."""
        check(self.model, self.config.plan, BatchShape(1, self.config.sampled.latent(self.encoding.codec)))
        self._check_sampler()

    def _check_sampler(self) -> None:
        """Raises CinemeshError for a sampler that the model's objective has not."""
        if (section := self.config.sample) is not None:
            PATHS[self.model.objective].check_sampler(section.solver, section.steps)

    def blueprints(self, device: str = "", batches: Sequence[BatchShape] | None = None) -> list[Blueprint]:
        """Of the steps of all buckets, or of these, on a ``device``; "": that of a rank which has joined no job yet.

        Raises CinemeshError as ``shapes``.
        """
        config, device = self.config, device or device_here(self.config.device, processes_here(1))
        facts = (config.optimizer, config.seed, config.caption_dropout, backend_of(device), self.marked(device))
        shapes = self.shapes if batches is None else batches
        return [Blueprint(self.model, config.plan, shape, *facts) for shape in shapes]

    def runners(
        self, place: Joined, batches: Sequence[BatchShape] | None = None, build: BuildSteps = build_here
    ) -> BucketRunner:
        """Steps of all buckets, or of these, on a rank. Raises CinemeshError as :class:`BucketRunner`."""
        return BucketRunner(
            self.blueprints(place.device, batches),
            place.mesh,
            device=place.device,
            kernels=self.kernels(place.device),
            slot=slot_of(place.marks, place.device) if self.marked(place.device) else None,
            build=build,
        )
