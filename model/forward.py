"""Forward passes without a backward, as programs: the sampler's velocity, and tokens back to a latent (torch-free)."""

from __future__ import annotations

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import BATCH, NONE, REPLICA_AXES, TOKENS, Placement
from ..parallel.ir.plan import Plan
from ..parallel.ir.program import Program
from ..parallel.ir.records import Phase, Place
from ..parallel.layers.sharded import ShardedUnits
from .config import REPLICATED_UNIT, ModelConfig
from .inputs import BY_SAMPLE, LATENTS, BatchShape, condition_inputs, declare
from .step import check, unit_layout
from .transformer import Transformer

SHARES = "shares"  # the input of what each half of a guided sample counts


def build_velocity(config: ModelConfig, plan: Plan, batch: BatchShape, *, apart: bool = False) -> Program:
    """The forward pass of the sampler: the velocity at (x_t, t), tokens where they are.

    Inputs: ``x_t`` [S, B, P] split over cp and tp, ``t`` [B], and those of ``condition_inputs``. State: ``master`` (any
    weights). Output: ``velocity`` [S, B, P], placed like ``x_t``.

    ``apart``, under two replicas: each makes one half of every guided sample, with the caption and without it; by the
    input ``shares`` [2] they are summed, [S, B / 2, P] in the statistics dtype, on both.
    """
    check(config, plan, batch)
    b, c = Builder(plan), config
    units = ShardedUnits(b, unit_layout(config, plan), training=False)
    conditions = declare(b, condition_inputs(c, plan, batch))
    samples = batch.samples * plan.data_ranks
    patches = (c.tokens(batch.latent), samples, c.patch_features)
    x_t = b.input("x_t", patches, plan.compute_dtype, Placement((TOKENS, BATCH, NONE)))
    t = b.input("t", (samples,), plan.stat_dtype, Placement((BATCH,)))
    guided = Placement((TOKENS, ("dp_shard",), NONE)) if apart else x_t.placement
    made = (patches[0], samples // 2, patches[2]) if apart else patches
    velocity = b.state("velocity", made, plan.stat_dtype if apart else plan.compute_dtype, guided)
    shares = b.input(SHARES, (2,), plan.stat_dtype, Placement((REPLICA_AXES,))) if apart else None
    units.cast_weights()
    with b.scope("replicated.weights", Place(Phase.WEIGHTS, unit=REPLICATED_UNIT)):
        once = units.gather(REPLICATED_UNIT)
    transformer = Transformer(b, c, units, batch.latent)
    result = transformer.velocity_of(once, lambda: (x_t, t, conditions))
    with transformer.scope("final", Phase.FORWARD, REPLICATED_UNIT):
        if shares is not None:
            halves = Placement((TOKENS, REPLICA_AXES, ("dp_shard",), NONE))
            split = b.view(result, "halves", (patches[0], 2, samples // 2, patches[2]), halves)
            (weighed,) = b.op("weigh", [split, shares], "weighed", dtypes=plan.stat_dtype)
            result = b.all_reduce(weighed, REPLICA_AXES, "guided")
        (velocity,) = b.op("copy", [result], "copied", signature="tbp->tbp", into={0: velocity})
    return b.finish({"velocity": (velocity, guided)}, blocks=c.layers)


def build_unpatchify(config: ModelConfig, plan: Plan, batch: BatchShape) -> Program:
    """Tokens [S, B, P] split over cp and tp -> latents [B, C, T, H, W] on every rank of a sample."""
    b, c = Builder(plan), config
    samples = batch.samples * plan.data_ranks
    shape = (c.tokens(batch.latent), samples, c.patch_features)
    tokens = b.input("tokens", shape, plan.compute_dtype, Placement((TOKENS, BATCH, NONE)))
    latents = b.state(LATENTS, (samples, c.channels, *batch.latent), plan.compute_dtype, BY_SAMPLE)
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
    return b.finish({LATENTS: (latents, latents.placement)})
