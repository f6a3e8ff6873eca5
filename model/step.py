"""The whole training step as a program (torch-free).

    step     cast weights; gather the replicated unit
             for each micro-batch: draw t, noise, caption dropout; embed; blocks; final layer; loss;
                                   backward through all of it, reducing each unit's gradient as it completes
             reduce the replicated unit; sum over replicas; global norm; clip; AdamW and EMA on the shards

Nothing of a step happens outside its program. ``build_step`` checks; ``prepare`` runs the passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import BATCH, NONE, REPLICATED_UNIT, TOKENS, WORLD, Placement, replicated
from ..parallel.ir.plan import Plan
from ..parallel.ir.program import Buffer, Program
from ..parallel.ir.units import Units, lay_out
from ..parallel.layers.sharded import ShardedUnits, decay_attributes
from ..parallel.passes.fuse import fuse
from ..parallel.passes.fuse_tp import fuse_tp, stage_symmetric
from ..parallel.passes.prefetch import elide, prefetch, stage_for_gloo
from ..parallel.passes.prices import RATES, Price
from ..parallel.passes.recompute import rematerialize
from ..parallel.passes.schedule import overlap
from .backbone import Block, SharedGradients
from .config import CAPTION_DROPOUT, CONDITIONING_UNIT, SIGMA_MIN, ModelConfig, block_unit, parameters_by_unit
from .config import REPLICATED_UNIT as ONCE
from .ends import Embedding, FinalLayer


@dataclass(frozen=True)
class Optimizer:
    """AdamW, clipping and EMA. The paper gives no values for video: these are the usual ones of large transformers."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.999  # the audio model's, Movie Gen 6.1


@dataclass(frozen=True)
class Batch:
    """Shape of one micro-batch: ``samples`` on one data rank, ``latent`` (T, H, W)."""

    samples: int
    latent: tuple[int, int, int]


def check(config: ModelConfig, plan: Plan, batch: Batch) -> None:
    """Raise CinemeshError when the plan cannot run this model on this batch."""
    plan.check_model(
        heads=config.heads,
        ffn=config.ffn,
        tokens=config.tokens(batch.latent),
        text_widths={encoder.name: encoder.width for encoder in config.encoders},
        latent="x".join(map(str, batch.latent)),
    )


def unit_layout(config: ModelConfig, plan: Plan) -> Units:
    return lay_out({name: list(rows) for name, rows in parameters_by_unit(config).items()}, plan)


class Inputs:
    """Declares what is filled before a step: one micro-batch's samples."""

    def __init__(self, b: Builder, c: ModelConfig, batch: Batch) -> None:
        self.samples = batch.samples * b.plan.data_ranks
        by_sample = Placement((BATCH,))
        self.ids = b.buffer("ids", (self.samples,), "int64", by_sample, "input")
        self.mask = b.buffer("mask", (self.samples, c.text_tokens), "bool", Placement((BATCH, NONE)), "input")
        self.text = {
            e.name: b.buffer(
                f"text.{e.name}",
                (e.tokens, self.samples, e.width),
                b.plan.compute_dtype,
                Placement((NONE, BATCH, ("tp",))),
                "input",
            )
            for e in c.encoders
        }


def build_step(
    config: ModelConfig,
    plan: Plan,
    batch: Batch,
    optimizer: Optimizer = Optimizer(),
    *,
    seed: int = 0,
    caption_dropout: float = CAPTION_DROPOUT,
) -> Program:
    """The training step, checked, before any pass.

    Inputs a micro-batch (``mb0/``, ``mb1/`` ...): ``latents`` [B, C, T, H, W], ``ids`` [B], ``text.NAME`` [L, B, W],
    ``mask`` [B, L]; and ``lr`` (). States: ``master``, ``exp_avg``, ``exp_avg_sq``, ``ema`` and ``counters``, which are
    (step, updates).
    Outputs: ``loss``, ``gradient_norm``.
    """
    check(config, plan, batch)
    b = Builder(plan)
    b.training = True
    c, stat = config, plan.stat_dtype
    units = ShardedUnits(b, unit_layout(config, plan), training=True)
    counters = b.buffer("counters", (2,), "int64", replicated(1), "state")
    lr = b.buffer("lr", (), stat, replicated(0), "input")
    loss = b.buffer("loss", (), stat, Placement((), frozenset(WORLD)), "state")
    norm = b.buffer("gradient_norm", (), stat, replicated(0), "state")

    units.cast_weights()
    with b.scope("replicated.weights"):
        once = units.gather(ONCE)
    loss_sum: Buffer | None = None
    once_total: Buffer | None = None
    recompute: dict[str, tuple[str, ...]] = {}
    for micro_batch in range(plan.micro_batches):
        mb = f"mb{micro_batch}"
        micro = _MicroBatch(b, c, batch, units, counters, mb, seed, caption_dropout, recompute)
        micro.forward(once, loss if loss_sum is None else loss_sum, first=loss_sum is None)
        loss_sum = micro.loss
        with b.backward():
            flat = micro.backward(once)
            with b.scope(f"{mb}/replicated.backward"):
                once_total = (
                    flat
                    if once_total is None
                    else b.op("accumulate", [flat], "accumulated", add_to=once_total, signature="xn->xn")[0]
                )
    assert loss_sum is not None and once_total is not None

    with b.scope("optimizer"), b.backward():
        units.reduce(ONCE, once_total, last=True)
        gradient = units.reduced_gradient()
        (squares,) = b.op("sum_of_squares", [gradient], "sum_of_squares")
        squares = b.all_reduce(squares, REPLICATED_UNIT, "sum_of_squares_total")
        _, factor, finite, advanced = b.op(
            "clip_factor",
            [squares, counters],
            ("norm", "clip", "finite", "counters"),
            dtypes=(stat, stat, "bool", "int64"),
            into={0: norm},
            clip_norm=optimizer.clip_norm,
        )
        states = [units.states[name] for name in ("master", "exp_avg", "exp_avg_sq", "ema")]
        updated = b.op(
            "adamw",
            [*states, gradient, factor, finite, advanced, lr],
            ("master", "exp_avg", "exp_avg_sq", "ema"),
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            ema_decay=optimizer.ema_decay,
            **decay_attributes(units.units),
        )
        total = b.all_reduce(loss_sum, WORLD, "loss")
    sharded = states[0].placement
    outputs = {
        "loss": (total, replicated(0)),
        "gradient_norm": (norm, replicated(0)),
        "counters": (advanced, replicated(1)),
    }
    outputs |= {
        name: (state, sharded) for name, state in zip(("master", "exp_avg", "exp_avg_sq", "ema"), updated, strict=True)
    }
    return b.finish(outputs, config=config, batch=batch, recompute=recompute)


class _MicroBatch:
    """Forward and backward of one micro-batch."""

    def __init__(
        self,
        b: Builder,
        c: ModelConfig,
        batch: Batch,
        units: ShardedUnits,
        counters: Buffer,
        mb: str,
        seed: int,
        caption_dropout: float,
        recompute: dict[str, tuple[str, ...]],
    ) -> None:
        self.b, self.c, self.units, self.mb, self.recompute = b, c, units, mb, recompute
        self.last = mb == f"mb{b.plan.micro_batches - 1}"
        self.grid = c.grid(batch.latent)
        self.latent = batch.latent
        self.draw: dict[str, Any] = {"seed": seed}
        self.dropout = caption_dropout
        self.counters = counters
        with b.scope(mb):
            self.inputs = Inputs(b, c, batch)
            latent_shape = (self.inputs.samples, c.channels, *batch.latent)
            self.latents = b.buffer(
                "latents",
                latent_shape,
                b.plan.stat_dtype,
                Placement((BATCH, NONE, NONE, NONE, NONE)),
                "input",
            )

    def _flow(self) -> tuple[Buffer, Buffer, Buffer, dict[str, Buffer], Buffer]:
        """x_t and velocity [T, B, P], t [B], captions after dropout."""
        b, c, inputs = self.b, self.c, self.inputs
        compute, stat = b.plan.compute_dtype, b.plan.stat_dtype
        tokens = c.tokens(self.latent)
        patches = (tokens, inputs.samples, c.patch_features)
        geometry: dict[str, Any] = {"patch": c.patch, "latent": self.latents.shape[1:], "rank_axes": TOKENS}
        (t,) = b.op("draw_time", [inputs.ids, self.counters], "t", dtypes=stat, **self.draw)
        (keep,) = b.op(
            "draw_keep_caption",
            [inputs.ids, self.counters],
            "keep_caption",
            dtypes="bool",
            dropout=self.dropout,
            **self.draw,
        )
        text = {n: b.op("drop_caption", [x, keep], f"text_kept.{n}")[0] for n, x in inputs.text.items()}
        (mask,) = b.op("drop_mask", [inputs.mask, keep], "mask_kept")
        (x1,) = b.op(
            "patchify",
            [self.latents],
            "x1",
            shapes={0: patches},
            place={"t": TOKENS},
            dtypes=stat,
            **geometry,
        )
        (x0,) = b.op(
            "draw_noise",
            [inputs.ids, self.counters],
            "x0",
            shapes={0: patches},
            place={"t": TOKENS},
            dtypes=stat,
            **geometry,
            **self.draw,
        )
        x_t, velocity = b.op("interpolate", [x1, x0, t], ("x_t", "target"), dtypes=(compute, stat), sigma_min=SIGMA_MIN)
        return x_t, velocity, t, text, mask

    def forward(self, once: dict[str, Buffer], loss: Buffer, *, first: bool) -> None:
        b, c, mb = self.b, self.c, self.mb
        with b.scope(f"{mb}/conditioning.weights"):
            conditioning = self.units.gather(CONDITIONING_UNIT)
        with b.scope(f"{mb}/embedding.forward"):
            x_t, self.target, t, text, mask = self._flow()
            self.embedding = Embedding(b, c, self.grid)
            x, self.cond = self.embedding.forward({**once, **conditioning}, x_t, t, text, mask)
        self.conditioning = conditioning
        self.blocks: list[tuple[Block, dict[str, Buffer]]] = []
        for layer in range(c.layers):
            unit = block_unit(layer)
            with b.scope(f"{mb}/{unit}.weights"):
                weights = self.units.gather(unit)
            with b.scope(f"{mb}/{unit}.forward"):
                block = Block(b, c, unit)
                x = block.forward({**once, **weights}, x, self.cond)
            self.blocks.append((block, weights))
        with b.scope(f"{mb}/final.forward"):
            self.final = FinalLayer(b, c)
            self.velocity = self.final.forward(once, x, self.cond)
            attrs: dict[str, Any] = {"micro_batches": b.plan.micro_batches}
            count = self._global_elements()
            if first:
                (self.loss,) = b.op(
                    "velocity_loss",
                    [self.velocity, self.target],
                    "loss",
                    into={0: loss},
                    dtypes=loss.dtype,
                    elements=count,
                    **attrs,
                )
            else:
                (self.loss,) = b.op(
                    "velocity_loss",
                    [self.velocity, self.target],
                    "loss",
                    add_to=loss,
                    dtypes=loss.dtype,
                    elements=count,
                    **attrs,
                )
        self.loss_op = b.producer(self.loss)

    def _global_elements(self) -> int:
        elements = 1
        for size in self.velocity.shape:
            elements *= size
        return elements

    def backward(self, once: dict[str, Buffer]) -> Buffer:
        """Reduces every unit but the replicated one, whose flat gradient is returned."""
        b, c, mb = self.b, self.c, self.mb
        shared = SharedGradients()
        with b.scope(f"{mb}/replicated.gradient"):
            donce = self.units.new_gradient(ONCE)
        with b.scope(f"{mb}/final.backward"):
            (dvelocity,) = b.op(
                "velocity_loss_backward",
                [self.velocity, self.target],
                "dvelocity",
                dtypes=b.plan.compute_dtype,
                elements=self._global_elements(),
                micro_batches=b.plan.micro_batches,
                of=self.loss_op,
                wrt={0: 0},
            )
            dx = self.final.backward(once, donce, dvelocity, self.cond, shared)
        for layer in reversed(range(c.layers)):
            block, weights = self.blocks[layer]
            unit = block_unit(layer)
            with b.scope(f"{mb}/{unit}.gradient"):
                dweights = self.units.new_gradient(unit)
            region = f"{mb}/{unit}.backward"
            self.recompute[region] = (f"{mb}/{unit}.weights", f"{mb}/{unit}.forward")
            with b.scope(region):
                dx = block.backward({**once, **weights}, {**donce, **dweights}, dx, self.cond, shared)
                self._reduce(unit, weights, dweights)
        with b.scope(f"{mb}/conditioning.gradient"):
            dconditioning = self.units.new_gradient(CONDITIONING_UNIT)
        region = f"{mb}/embedding.backward"
        self.recompute[region] = (f"{mb}/conditioning.weights",)
        with b.scope(region):
            self.embedding.backward({**once, **self.conditioning}, {**donce, **dconditioning}, dx, self.cond, shared)
            self._reduce(CONDITIONING_UNIT, self.conditioning, dconditioning)
        self.units.check(once, donce)
        return self.units.flat_of(donce)

    def _reduce(self, unit: str, weights: dict[str, Buffer], gradients: dict[str, Buffer]) -> None:
        self.units.check(weights, gradients)
        self.units.reduce(unit, self.units.flat_of(gradients), last=self.last)


def prepare(program: Program, *, backend: str, price: Price | None = None) -> Program:
    """The passes every program goes through before it runs or is priced: recompute, fusion, order, degree-1 aliases.

    ``backend`` is ``nccl`` or ``gloo``; gloo's reduce-scatter needs a staging buffer, which is then listed. ``price``
    gives the seconds of a record where the plan asks for overlap; every rank must pass one that says the same. Without
    it, the backend's ``RATES`` do.
    """
    program = fuse(rematerialize(program))
    program = elide(prefetch(program))
    if program.plan.fused_tp:
        program = fuse_tp(program)
    if program.plan.overlaps:
        program = overlap(program, price or RATES[backend].price)
    return stage_for_gloo(program) if backend == "gloo" else stage_symmetric(program)
