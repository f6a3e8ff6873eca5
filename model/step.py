"""The whole training step as a program (torch-free).

    step     cast weights; gather the replicated unit
             for each micro-batch: draw t, noise, caption dropout; embed; blocks; final layer; loss;
                                   backward through all of it, reducing each unit's gradient as it completes
             reduce the replicated unit; sum over replicas; global norm; clip; AdamW and EMA on the shards

Nothing of a step happens outside its program. ``build_step`` checks it; the passes follow (``passes/pipeline.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import CinemeshError
from ..kernels.ops import MOST_ELEMENTS, MOST_PLACES
from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import REPLICATED_AXES, TOKENS, WORLD, Placement, replicated
from ..parallel.ir.plan import Plan
from ..parallel.ir.program import Program
from ..parallel.ir.records import Buffer, Phase, Place
from ..parallel.ir.units import Units, lay_out
from ..parallel.layers.sharded import ShardedUnits, decay_attributes
from .backbone import SharedGradients
from .config import (
    CAPTION_DROPOUT,
    CONDITIONING_UNIT,
    REPLICATED_UNIT,
    ModelConfig,
    latent_text,
    parameters_by_unit,
)
from .inputs import IDS, LATENTS, MASK, PLACES, BatchShape, declare, text_input, training_inputs
from .objective import OBJECTIVES
from .transformer import Given, Transformer


@dataclass(frozen=True)
class Optimizer:
    """AdamW, clipping and EMA. The paper gives no values for video: these are the usual ones of large transformers."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.999  # the audio model's, Movie Gen 6.1


def check(config: ModelConfig, plan: Plan, batch: BatchShape) -> None:
    """Raise CinemeshError when the plan cannot run this model on this batch."""
    plan.check_model(
        heads=config.heads,
        ffn=config.ffn,
        tokens=config.tokens(batch.latent),
        text_widths={encoder.name: encoder.width for encoder in config.encoders},
        latent=latent_text(batch.latent),
    )
    samples = batch.samples * plan.data_ranks * plan.micro_batches
    if samples > MOST_PLACES:
        raise CinemeshError(
            f"samples({batch.samples}) * data ranks({plan.data_ranks}) * micro_batches({plan.micro_batches}) = "
            f"{samples} > {MOST_PLACES}, the places of a step's global batch that draws can tell apart",
            remedy="take fewer samples a step",
        )
    if (elements := config.channels * math.prod(batch.latent)) > MOST_ELEMENTS:
        raise CinemeshError(
            f"channels({config.channels}) of a latent {latent_text(batch.latent)} are {elements} elements > "
            f"{MOST_ELEMENTS}, those that a sample's noise can tell apart",
            remedy="choose a smaller latent",
        )


def unit_layout(config: ModelConfig, plan: Plan) -> Units:
    return lay_out(parameters_by_unit(config), plan)


def build_step(
    config: ModelConfig,
    plan: Plan,
    batch: BatchShape,
    optimizer: Optimizer = Optimizer(),
    *,
    seed: int = 0,
    caption_dropout: float = CAPTION_DROPOUT,
) -> Program:
    """The training step, checked, before any pass.

    Inputs: those of ``training_inputs`` for every micro-batch, and ``lr`` (). States: ``master``, ``exp_avg``,
    ``exp_avg_sq``, ``ema``; ``counters``, which are (step, updates); ``loss`` and ``gradient_norm``, which are outputs
    too. Raises CinemeshError when the plan cannot run the model on this batch.
    """
    check(config, plan, batch)
    b = Builder(plan)
    b.training = True
    c, stat = config, plan.stat_dtype
    units = ShardedUnits(b, unit_layout(config, plan), training=True)
    counters = b.state("counters", (2,), "int64", replicated(1))
    lr = b.input("lr", (), stat, replicated(0))
    loss = b.state("loss", (), stat, Placement((), frozenset(WORLD)))
    norm = b.state("gradient_norm", (), stat, replicated(0))

    units.cast_weights()
    with b.scope("replicated.weights", Place(Phase.WEIGHTS, unit=REPLICATED_UNIT)):
        once = units.gather(REPLICATED_UNIT)
    loss_sum: Buffer | None = None
    once_total: Buffer | None = None
    for micro_batch in range(plan.micro_batches):
        micro = _MicroBatch(b, c, batch, units, counters, micro_batch, seed, caption_dropout)
        micro.forward(once, loss if loss_sum is None else loss_sum, first=loss_sum is None)
        loss_sum = micro.loss
        with b.backward():
            flat = micro.backward(once)
            with micro.scope("replicated", Phase.BACKWARD, REPLICATED_UNIT):
                once_total = (
                    flat
                    if once_total is None
                    else b.op("accumulate", [flat], "accumulated", add_to=once_total, signature="xn->xn")[0]
                )
    assert loss_sum is not None and once_total is not None

    with b.scope("optimizer", Place(Phase.UPDATE)), b.backward():
        units.reduce(REPLICATED_UNIT, once_total, last=True)
        gradient = units.reduced_gradient()
        (squares,) = b.op("sum_of_squares", [gradient], "sum_of_squares")
        squares = b.all_reduce(squares, REPLICATED_AXES, "sum_of_squares_total")
        _, factor, finite, advanced = b.op(
            "clip_factor",
            [squares, counters],
            ("norm", "clip", "finite", "counters"),
            dtypes=(stat, stat, "bool", "int64"),
            into={0: norm},
            clip_norm=optimizer.clip_norm,
        )
        updated = b.op(
            "adamw",
            [*units.states.values(), gradient, factor, finite, advanced, lr],
            tuple(units.states),
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            ema_decay=optimizer.ema_decay,
            **decay_attributes(units.units),
        )
        total = b.all_reduce(loss_sum, WORLD, "loss")
    outputs = {
        "loss": (total, replicated(0)),
        "gradient_norm": (norm, replicated(0)),
        "counters": (advanced, replicated(1)),
    }
    outputs |= {n: (made, state.placement) for (n, state), made in zip(units.states.items(), updated, strict=True)}
    return b.finish(outputs, blocks=c.layers)


class _MicroBatch(Transformer):
    """Forward and backward of one micro-batch."""

    def __init__(
        self,
        b: Builder,
        c: ModelConfig,
        batch: BatchShape,
        units: ShardedUnits,
        counters: Buffer,
        number: int,
        seed: int,
        caption_dropout: float,
    ) -> None:
        super().__init__(b, c, units, batch.latent, number)
        self.last = number == b.plan.micro_batches - 1
        self.draw: dict[str, Any] = {"seed": seed}
        self.dropout = caption_dropout
        self.counters = counters
        with b.scope("", Place(micro_batch=number)):
            self.inputs = declare(b, training_inputs(c, b.plan, batch), number)

    def _flow(self) -> Given:
        """Samples noised, and captions after dropout; the target [T, B, P] is kept."""
        b, c, inputs = self.b, self.c, self.inputs
        stat = b.plan.stat_dtype
        drawn_for, latents = [inputs[IDS], inputs[PLACES], self.counters], inputs[LATENTS]
        patches = (c.tokens(self.latent), latents.shape[0], c.patch_features)
        geometry: dict[str, Any] = {"patch": c.patch, "latent": latents.shape[1:], "rank_axes": TOKENS}
        objective = OBJECTIVES[c.objective]
        t = objective.draw_time(b, drawn_for, **self.draw)
        (keep,) = b.op(
            "draw_keep_caption",
            drawn_for,
            "keep_caption",
            dtypes="bool",
            dropout=self.dropout,
            **self.draw,
        )
        conditions = dict(inputs)
        for encoder in c.encoders:
            name = text_input(encoder.name)
            (conditions[name],) = b.op("drop_caption", [inputs[name], keep], f"text_kept.{encoder.name}")
        (conditions[MASK],) = b.op("drop_mask", [inputs[MASK], keep], "mask_kept")
        (x1,) = b.op(
            "patchify",
            [latents],
            "x1",
            shapes={0: patches},
            place={"t": TOKENS},
            dtypes=stat,
            **geometry,
        )
        (x0,) = b.op(
            "draw_noise",
            drawn_for,
            "x0",
            shapes={0: patches},
            place={"t": TOKENS},
            dtypes=stat,
            **geometry,
            **self.draw,
        )
        x_t, self.target = objective.noised(b, x1, x0, t)
        return x_t, t, conditions

    def forward(self, once: dict[str, Buffer], loss: Buffer, *, first: bool) -> None:
        b = self.b
        self.velocity = self.velocity_of(once, self._flow)
        with self.scope("final", Phase.FORWARD, REPLICATED_UNIT):
            (self.loss,) = b.op(
                "velocity_loss",
                [self.velocity, self.target],
                "loss",
                into={0: loss} if first else None,
                add_to=None if first else loss,
                dtypes=loss.dtype,
                elements=math.prod(self.velocity.shape),
                micro_batches=b.plan.micro_batches,
            )
        self.loss_op = b.producer(self.loss)

    def backward(self, once: dict[str, Buffer]) -> Buffer:
        """Reduces every unit but the replicated one, whose flat gradient is returned."""
        b, c = self.b, self.c
        shared = SharedGradients()
        with self.scope("replicated", Phase.GRADIENT, REPLICATED_UNIT):
            donce = self.units.new_gradient(REPLICATED_UNIT)
        with self.scope("final", Phase.BACKWARD, REPLICATED_UNIT):
            (dvelocity,) = b.op(
                "velocity_loss_backward",
                [self.velocity, self.target],
                "dvelocity",
                dtypes=b.plan.compute_dtype,
                elements=math.prod(self.velocity.shape),
                micro_batches=b.plan.micro_batches,
                of=self.loss_op,
                wrt={0: 0},
            )
            dx = self.final.backward(once, donce, dvelocity, shared)
        for layer in reversed(range(c.layers)):
            block, weights = self.blocks[layer]
            unit = block.unit
            with self.scope(unit, Phase.GRADIENT, unit, layer):
                dweights = self.units.new_gradient(unit)
            with self.scope(unit, Phase.BACKWARD, unit, layer):
                dx = block.backward({**donce, **dweights}, dx, self.cond, shared)
                self._reduce(unit, weights, dweights)
        if c.lora is not None:
            b.discard(dx)
            self.units.check(once, donce)
            return self.units.flat_of(donce)
        with self.scope("conditioning", Phase.GRADIENT, CONDITIONING_UNIT):
            dconditioning = self.units.new_gradient(CONDITIONING_UNIT)
        with self.scope("embedding", Phase.BACKWARD, CONDITIONING_UNIT):
            self.embedding.backward({**once, **self.conditioning}, {**donce, **dconditioning}, dx, self.cond, shared)
            self._reduce(CONDITIONING_UNIT, self.conditioning, dconditioning)
        self.units.check(once, donce)
        return self.units.flat_of(donce)

    def _reduce(self, unit: str, weights: dict[str, Buffer], gradients: dict[str, Buffer]) -> None:
        self.units.check(weights, gradients)
        self.units.reduce(unit, self.units.flat_of(gradients), last=self.last)
