"""Validation loss: the velocity loss of the weights on held-out windows, with the same t and noise every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.cache.samples import Cache, Sample, collate
from ...kernels.dtypes import TORCH_DTYPES
from ...model.buckets import BucketRunner, Latent
from ...model.forward import build_velocity
from ...model.inputs import IDS, LATENTS
from ...model.paths import PATHS
from ...model.runner import StepRunner, load_inputs, named_buffers
from ...parallel.ir.layout import TOKENS
from ...parallel.ir.program import Program
from ...parallel.ir.units import nested_index
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.comm import sum_over_ranks
from ...parallel.runtime.executor import Executor
from ...parallel.runtime.mesh import backend_of
from .recipe import Config

SEED = 1  # of the draws: fixed, so that losses of different runs can be compared
BANDS = 10  # of t, equally wide: where along the path a model errs
WEIGHTS = ("master", "ema")

Encode = Callable[[Sequence[str]], dict[str, Tensor]]  # captions, to the text of a batch


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean over samples and draws, its standard ``error``, and the mean of each band of t (None: no draw there).

    The error is that of the differences within bands: t, which decides most of a loss, is the same in every validation.
    Windows that share frames are told apart no further, so it is rather too small.
    """

    loss: float
    error: float
    bands: tuple[float | None, ...]

    @classmethod
    def of(cls, losses: Tensor, times: Tensor) -> HeldOutLoss:
        """Of one loss a sample and draw, at t = ``times``: both float64 [N]."""
        band = (times * BANDS).long().clamp(0, BANDS - 1)
        count = torch.bincount(band, minlength=BANDS)
        mean = torch.zeros(BANDS, dtype=losses.dtype).index_add(0, band, losses) / count
        free = len(losses) - int((count > 0).sum())  # degrees of freedom
        spread = (losses - mean[band]).square().sum() / max(free, 1)
        means = tuple(value if number else None for value, number in zip(mean.tolist(), count.tolist(), strict=True))
        return cls(losses.mean().item(), (spread / len(losses)).sqrt().item(), means)

    @classmethod
    def mean(cls, parts: Sequence[tuple[float, HeldOutLoss]]) -> HeldOutLoss:
        """Of buckets with their weights; a band, over the buckets that have draws in it."""
        whole = sum(weight for weight, _ in parts)
        bands: list[float | None] = []
        for number in range(BANDS):
            found = [(w, value) for w, part in parts if (value := part.bands[number]) is not None]
            bands.append(sum(w * value for w, value in found) / sum(w for w, _ in found) if found else None)
        return cls(
            sum(weight * part.loss for weight, part in parts) / whole,
            sum((weight * part.error / whole) ** 2 for weight, part in parts) ** 0.5,
            tuple(bands),
        )


class Validation:
    """Runs the forward program on the runner's own shards of both weights; every rank takes part.

    Each sample is seen at ``logging.validation_draws`` fixed (t, noise), captions never dropped. The loss is the mean
    over a sample's elements, then over samples and draws. ``run`` runs the forward program. ``encode``: captions, whose
    embeddings are not in the cache; collective.
    """

    def __init__(
        self,
        runner: StepRunner,
        samples: Sequence[Sample],
        config: Config,
        run: Callable[[Executor], None] = Executor.run,
        encode: Encode | None = None,
    ) -> None:
        self._runner, self._run, self._encode = runner, run, encode
        self._draws = range(config.logging.validation_draws)
        self.look_at(samples)
        backend = backend_of(runner.executor.device)
        self.program = program = prepare(build_velocity(runner.config, runner.plan, runner.batch), backend=backend)
        train = runner.executor  # never runs while this does: the same arena serves
        place = runner.coordinates, runner.comm, train.device, train.kernels
        held = {at: runner.buffers[name] for name, at in program.states.items() if name in runner.buffers}
        self._forward = {
            weights: Executor(program, *place, held | {program.states["master"]: runner.buffers[weights]}, train.arena)
            for weights in WEIGHTS
        }

    def look_at(self, samples: Sequence[Sample]) -> None:
        """Measure on these from here on."""
        self.samples = samples
        self._items = [(index, draw) for draw in self._draws for index in range(len(samples))]

    def measure(self) -> dict[str, HeldOutLoss]:
        """Of all validation samples, by weights, the same on every rank. Collective."""
        config, size = self._runner.config, self._runner.batch.samples * self._runner.plan.data_ranks
        sums = torch.zeros(1 + len(WEIGHTS), len(self._items), dtype=torch.float64)  # t, and squared errors
        for start in range(0, len(self._items), size):
            items = self._items[start : start + size]
            self._add(items + items[:1] * (size - len(items)), sums[:, start : start + len(items)])
        if self._runner.mesh is not None:
            sums = sum_over_ranks(sums)
        times, *errors = sums
        elements = config.tokens(self._runner.batch.latent) * config.patch_features
        return {weights: HeldOutLoss.of(e / elements, times) for weights, e in zip(WEIGHTS, errors, strict=True)}

    def _add(self, items: list[tuple[int, int]], sums: Tensor) -> None:
        """This rank's tokens of ``items`` to ``sums`` [., n]; those from n on only fill the batch."""
        runner = self._runner
        plan, config = runner.plan, runner.config
        share, rank = runner.batch.samples, runner.mesh.data_rank if runner.mesh else 0
        mine = items[rank * share : (rank + 1) * share]
        seen = [self.samples[index] for index, _ in mine]
        batch = collate(seen, 0, 1)
        if self._encode is not None:
            batch |= self._encode([sample.caption for sample in seen])
        draws = torch.tensor([draw for _, draw in mine])
        path = PATHS[config.objective]
        t = path.draw_time(SEED, draws, batch[IDS], torch.zeros_like(batch[IDS]))
        here = nested_index(plan, TOKENS, runner.coordinates)
        sums = sums[:, rank * share : (rank + 1) * share]
        counted = sums.shape[1]
        if here == 0:  # one of the ranks that share a sample says its t
            sums[0] += t[:counted]

        # This rank's tokens, where and as wide as the model's own statistics are.
        forward = next(iter(self._forward.values()))
        x_t = named_buffers(forward)["x_t"]
        x0, x1 = (torch.empty_like(x_t, dtype=TORCH_DTYPES[plan.stat_dtype]) for _ in range(2))
        wide = {"device": x0.device, "dtype": x0.dtype}
        geometry = {"patch": config.patch, "latent": tuple(batch[LATENTS].shape[1:]), "rank": here}
        forward.kernels["patchify"]([batch[LATENTS].to(**wide)], [x1], **geometry)
        nowhere = torch.zeros(1, dtype=torch.int64, device=x0.device)  # in no step's batch
        for i in range(share):
            drawn = torch.empty_like(x0[:, :1], memory_format=torch.contiguous_format)
            of = batch[IDS][i : i + 1].to(x0.device), nowhere, torch.stack([draws[i], draws[i]]).to(x0.device)
            forward.kernels["draw_noise"]([*of], [drawn], seed=SEED, **geometry)
            x0[:, i : i + 1].copy_(drawn)
        mixed, wanted = (x.transpose(0, 1) for x in path.noised(x1.transpose(0, 1), x0.transpose(0, 1), t.to(**wide)))
        for row, executor in zip(sums[1:], self._forward.values(), strict=True):
            buffers = named_buffers(executor)
            buffers["x_t"].copy_(mixed)
            buffers["t"].copy_(t)
            load_inputs(executor, batch)
            self._run(executor)
            error = (buffers["velocity"].to(x0.dtype) - wanted)[:, :counted]
            row += error.square().sum((0, 2), dtype=torch.float64).cpu()


class HeldOutWindows:
    """The held-out windows of all buckets; one whose scenes are too short for any has no part."""

    def __init__(
        self,
        runners: BucketRunner,
        latents: Sequence[Latent],
        cache: Cache,
        config: Config,
        run: Callable[[Executor], None],
        encode: Encode | None = None,
    ) -> None:
        self._config = config
        how = config, run, encode
        self._parts = [
            (shape.weight, windows.bucket, Validation(runners.runners[latent], windows.validation, *how))
            for shape, latent, windows in zip(config.data.shapes, latents, cache.buckets, strict=True)
            if len(windows.validation)
        ]

    def __bool__(self) -> bool:
        return any(validation.samples for _, _, validation in self._parts)

    def look_at(self, cache: Cache) -> None:
        """The windows of this version, from here on."""
        windows = {of.bucket: of.validation for of in cache.buckets}
        for _, bucket, validation in self._parts:
            validation.look_at(windows[bucket])

    @property
    def programs(self) -> list[Program]:
        return [validation.program for _, _, validation in self._parts]

    def measure(self) -> tuple[HeldOutLoss, dict[str, float]]:
        """The loss of the recipe's weights, a mean over the buckets by weight, and all that is reported. Collective."""
        parts = [part for part in self._parts if part[2].samples]
        measured = [(weight, bucket, validation.measure()) for weight, bucket, validation in parts]
        means = {which: HeldOutLoss.mean([(weight, of[which]) for weight, _, of in measured]) for which in WEIGHTS}
        shown = means[self._config.weights]
        values = {"validation_loss": shown.loss, "validation_error": shown.error}
        if len(self._config.data.shapes) > 1:
            values |= {f"validation_loss/{bucket}": of[self._config.weights].loss for _, bucket, of in measured}
        for which, mean in means.items():
            values |= {f"validation_loss/{which}": mean.loss} | _by_band(which, mean.bands)
        return shown, values


def _by_band(which: str, bands: Sequence[float | None]) -> dict[str, float]:
    """As ``validation_loss/ema, t 0.1-0.2``."""
    told = [(number, loss) for number, loss in enumerate(bands) if loss is not None]
    return {f"validation_loss/{which}, t {n / BANDS:.1f}-{(n + 1) / BANDS:.1f}": loss for n, loss in told}
