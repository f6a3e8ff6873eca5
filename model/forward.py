"""Forward passes without a backward, as programs: the sampler's velocity, and tokens back to a latent (torch-free)."""

from __future__ import annotations

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import BATCH, NONE, TOKENS, Placement
from ..parallel.ir.plan import Plan
from ..parallel.ir.program import Program
from ..parallel.layers.sharded import ShardedUnits
from .backbone import Block
from .config import CONDITIONING_UNIT, ModelConfig, block_unit
from .config import REPLICATED_UNIT as ONCE
from .ends import Embedding, FinalLayer
from .step import Batch, Inputs, check, unit_layout


def build_velocity(config: ModelConfig, plan: Plan, batch: Batch) -> Program:
    """The forward pass of the sampler: the velocity at (x_t, t), tokens where they are.

    Inputs: ``x_t`` [S, B, P] split over cp and tp, ``t`` [B], ``text.NAME``, ``mask``. State: ``master`` (any weights).
    Output: ``velocity`` [S, B, P], placed like ``x_t``.
    """
    check(config, plan, batch)
    b, c = Builder(plan), config
    units = ShardedUnits(b, unit_layout(config, plan), training=False)
    inputs = Inputs(b, c, batch)
    patches = (c.tokens(batch.latent), inputs.samples, c.patch_features)
    x_t = b.buffer("x_t", patches, plan.compute_dtype, Placement((TOKENS, BATCH, NONE)), "input")
    t = b.buffer("t", (inputs.samples,), plan.stat_dtype, Placement((BATCH,)), "input")
    velocity = b.buffer("velocity", patches, plan.compute_dtype, x_t.placement, "state")
    units.cast_weights()
    with b.scope("replicated.weights"):
        once = units.gather(ONCE)
    with b.scope("conditioning.weights"):
        conditioning = units.gather(CONDITIONING_UNIT)
    with b.scope("embedding.forward"):
        x, cond = Embedding(b, c, c.grid(batch.latent)).forward(
            {**once, **conditioning}, x_t, t, inputs.text, inputs.mask
        )
    for layer in range(c.layers):
        unit = block_unit(layer)
        with b.scope(f"{unit}.weights"):
            weights = units.gather(unit)
        with b.scope(f"{unit}.forward"):
            x = Block(b, c, unit).forward({**once, **weights}, x, cond)
    with b.scope("final.forward"):
        result = FinalLayer(b, c).forward(once, x, cond)
        (velocity,) = b.op("copy", [result], "copied", signature="tbp->tbp", into={0: velocity})
    return b.finish({"velocity": (velocity, x_t.placement)}, config=config, batch=batch, recompute={})


def build_unpatchify(config: ModelConfig, plan: Plan, batch: Batch) -> Program:
    """Tokens [S, B, P] split over cp and tp -> latents [B, C, T, H, W] on every rank of a sample."""
    b, c = Builder(plan), config
    samples = batch.samples * plan.data_ranks
    shape = (c.tokens(batch.latent), samples, c.patch_features)
    tokens = b.buffer("tokens", shape, plan.compute_dtype, Placement((TOKENS, BATCH, NONE)), "input")
    latents = b.buffer(
        "latents",
        (samples, c.channels, *batch.latent),
        plan.compute_dtype,
        Placement((BATCH, NONE, NONE, NONE, NONE)),
        "state",
    )
    gathered = b.all_gather(b.all_gather(tokens, ("tp",), "over_tp"), ("cp",), "over_cp")
    b.op(
        "unpatchify",
        [gathered],
        "unpatchified",
        shapes={0: latents.shape},
        into={0: latents},
        patch=c.patch,
        grid=c.grid(batch.latent),
    )
    return b.finish({"latents": (latents, latents.placement)}, config=config, batch=batch, recompute={})
