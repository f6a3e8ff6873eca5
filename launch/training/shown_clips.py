"""Clips that a run samples while it trains, of its weights as they are then, into TensorBoard.

They are GIFs, ``clips/SCENE``, where TensorBoard keeps its images. Beside each stands once a clip that was held out of
training: ``held out/SCENE``, decoded from its latent, so that the codec's own loss is in both.
"""

from __future__ import annotations

from torch import Tensor

from ...data.cache.samples import Cache
from ...data.clips import gif
from ...errors import CinemeshError
from ...model.runner import StepRunner
from ...parallel.layers.sharded import FROZEN_STATE
from ..cluster.processes import Joined
from .clip_sampler import ClipSampler
from .setting import Setting
from .telemetry import Telemetry


class ShownClips:
    """Of the scenes that the recipe samples when a run ends. Every rank has one; rank 0, with ``telemetry``, shows.

    Built behind the runner's captured steps, in whose memory it samples. Sampling reads the weights and changes
    nothing of a run: with or without it, training gives the same bits.
    """

    def __init__(
        self, setting: Setting, place: Joined, cache: Cache, runner: StepRunner, telemetry: Telemetry | None
    ) -> None:
        assert setting.config.sample is not None
        self.every = setting.config.sample.every  # steps
        self._setting, self._telemetry, self._cache = setting, telemetry, cache
        self._captions = setting.sampled_captions(cache)
        self._sampler = ClipSampler(
            setting,
            place,
            runner.buffers[setting.config.weights],
            dict(enumerate(self._captions.values())),
            samples=runner.batch.samples,
            beside=runner,
            frozen=runner.buffers.get(FROZEN_STATE),
        )

    def show(self, step: int) -> None:
        """Sample a clip of each scene. Collective. One that decodes to no picture is told, and training goes on."""
        scenes = [*self._captions]
        for number, latent in self._sampler.latents(silent=True):
            self._show(step, f"clips/{scenes[number]}", latent)

    def show_held_out(self) -> None:
        """A clip of each scene that has one among the held-out windows, at step 0."""
        held = next(of.validation for of in self._cache.buckets if of.bucket == str(self._setting.config.sampled))
        shown = set[str]()
        for index in range(len(held) if self._telemetry else 0):
            window = held[index]
            if window.scene in self._captions and window.scene not in shown:
                shown.add(window.scene)
                self._show(0, f"held out/{window.scene}", window.latent)

    def _show(self, step: int, name: str, latent: Tensor) -> None:
        if self._telemetry is None:
            return
        bucket = self._setting.config.sampled
        try:
            frames = self._setting.encoding.codec.decode(latent)[: bucket.frames]
        except CinemeshError as error:
            return self._telemetry.say(f"WARNING: step {step}: {name}: {error}")
        _, height, width, _ = frames.shape
        self._telemetry.picture(step, name, height, width, gif(frames, self._cache.frame_rate))
