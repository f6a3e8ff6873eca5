"""What stands before and behind the blocks: embeddings and final layer, forward and backward records (torch-free).

Patches, positions, time, text and shared modulation in front; the modulated norm and the projection to patches behind.
How each part is split: ``backbone.py``.
"""

from __future__ import annotations

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import BATCH, HEADS, NONE, TOKENS, Placement
from ..parallel.ir.records import Buffer
from ..parallel.layers import tensor
from .backbone import Conditioning, SharedGradients
from .block_parts import ModulatedNorm, Weights, local_row, modulation_gradient, rows
from .config import TIME_FEATURES, LatentCondition, ModelConfig
from .inputs import MASK, text_input


class Embedding:
    """Patches, positions, time and text: everything in front of the blocks."""

    def __init__(self, b: Builder, c: ModelConfig, grid: tuple[int, int, int]) -> None:
        self.b, self.c, self.grid = b, c, grid
        self._position_attrs = {"grid": grid, "rank_axes": TOKENS}

    def forward(self, w: Weights, x_t: Buffer, t: Buffer, conditions: dict[str, Buffer]) -> tuple[Buffer, Conditioning]:
        """x_t patches [T, B, P], t [B], and by name what ``condition_inputs`` declares -> x [T, B, D]."""
        b, c = self.b, self.c
        tables = [w[f"position.{axis}"] for axis in "thw"]
        tokens = x_t.shape[0]
        (position,) = b.op(
            "position",
            tables,
            "position",
            shapes={0: (tokens, c.width)},
            place={"t": TOKENS},
            **self._position_attrs,
        )
        (features,) = b.op(
            "time_features",
            [t],
            "time_features",
            shapes={0: (t.shape[0], TIME_FEATURES)},
            dtypes=b.plan.compute_dtype,
        )
        self.features = features
        self.time1 = tensor.linear(b, features, w["time.first"], "bw,wd->bd", "time1")
        (self.time1_act,) = b.op("silu", [self.time1], "time1_act")
        self.time = tensor.linear(b, self.time1_act, w["time.second"], "bi,io->bo", "time")
        (self.time_act,) = b.op("silu", [self.time], "time_act")
        (self.modulation_split,) = b.op(
            "matmul",
            [w["adaln.weight"], self.time_act],
            "modulation_split",
            signature="ori,bi->orb",
        )
        modulation = b.all_gather(self.modulation_split, HEADS, "modulation")

        context_shape = (c.text_tokens, x_t.shape[1], c.width)
        context_buffer = b.buffer("context", context_shape, b.plan.compute_dtype, Placement((NONE, BATCH, NONE)))
        self.text_in = {encoder.name: conditions[text_input(encoder.name)] for encoder in c.encoders}
        self.projected, self.norms = {}, {}
        first_token = 0
        for encoder in c.encoders:
            partial = tensor.linear(
                b,
                self.text_in[encoder.name],
                w[f"text.{encoder.name}.weight"],
                "lbw,wd->lbd",
                f"{encoder.name}_partial",
            )
            projected = b.all_reduce(partial, HEADS, f"{encoder.name}_projected")
            part = b.view(
                context_buffer,
                f"{encoder.name}_context",
                projected.shape,
                projected.placement,
                first_token * local_row(b, context_buffer),
            )
            gain, bias = w[f"text.{encoder.name}.gain"], w[f"text.{encoder.name}.bias"]
            self.norms[encoder.name] = b.op(
                "layer_norm",
                [projected, gain, bias],
                (f"{encoder.name}_norm", f"{encoder.name}_mean", f"{encoder.name}_rstd"),
                into={0: part},
                dtypes=(part.dtype, b.plan.stat_dtype, b.plan.stat_dtype),
                eps=c.norm_eps,
            )
            self.projected[encoder.name] = (partial, projected)
            first_token += encoder.tokens
        self.x_t = x_t
        self.of_x_t = x = tensor.linear(b, x_t, w["patchify.weight"], "tbp,pd->tbd", "x")
        self.patches: dict[str, tuple[Buffer, Buffer, Buffer]] = {}
        for condition in c.latent_conditions:
            x = self._concatenate(w, x, condition, conditions[condition.input])
        return x, Conditioning(position, modulation, context_buffer, conditions[MASK], self.time)

    def _concatenate(self, w: Weights, x: Buffer, condition: LatentCondition, latent: Buffer) -> Buffer:
        """``x`` with a latent beside x_t on channels: the product with its own rows of the patchifier is added."""
        b, c = self.b, self.c
        features = c.condition_features(condition)
        (patches,) = b.op(
            "patchify",
            [latent],
            f"{condition.name}_patches",
            shapes={0: (x.shape[0], x.shape[1], features)},
            place={"t": TOKENS},
            dtypes=b.plan.compute_dtype,
            patch=c.patch,
            latent=latent.shape[1:],
            rank_axes=TOKENS,
        )
        product = tensor.linear(b, patches, w[f"patchify.{condition.name}"], "tbp,pd->tbd", f"x_of_{condition.name}")
        (joined,) = b.op("residual", [x, product], f"x_with_{condition.name}")
        self.patches[condition.name] = patches, product, joined
        return joined

    def backward(self, w: Weights, dw: Weights, dx: Buffer, cond: Conditioning, shared: SharedGradients) -> None:
        """Weight gradients go to ``dw``; ``dx`` is that of what :meth:`forward` returned, ``shared`` is complete."""
        b, c = self.b, self.c
        stat, compute = b.plan.stat_dtype, b.plan.compute_dtype
        assert shared.position and shared.modulation and shared.text and shared.time
        for condition in reversed(c.latent_conditions):
            patches, product, joined = self.patches[condition.name]
            names = {f"dx_without_{condition.name}": 0, f"dx_of_{condition.name}": 1}
            dx, dproduct = b.pass_through(dx, b.producers(joined), names)
            tensor.linear_weight_backward(b, dproduct, product, patches, dw[f"patchify.{condition.name}"])
        tensor.linear_weight_backward(b, dx, self.of_x_t, self.x_t, dw["patchify.weight"])
        tables = [dw[f"position.{axis}"] for axis in "thw"]
        b.op(
            "position_backward",
            [shared.position],
            ("dposition_t", "dposition_h", "dposition_w"),
            shapes={i: table.shape for i, table in enumerate(tables)},
            into=dict(enumerate(tables)),
            dtypes=stat,
            of=b.producer(cond.position),
            gradient=shared.position,
            wrt={0: 0, 1: 1, 2: 2},
            **self._position_attrs,
        )

        (ordered,) = b.op("sum_to", [shared.modulation], "dmodulation", signature="rbd->drb", dtypes=compute)
        split = b.reduce_scatter(ordered, HEADS, "dmodulation_split", of=b.producer(cond.modulation))
        adaln = b.producer(self.modulation_split)
        b.op(
            "matmul",
            [split, self.time_act],
            "dadaln_weight",
            signature="orb,bi->ori",
            dtypes=stat,
            into={0: dw["adaln.weight"]},
            of=adaln,
            gradient=split,
            wrt={0: 0},
        )
        (dact,) = b.op(
            "matmul",
            [split, w["adaln.weight"]],
            "dtime_act",
            signature="orb,ori->bi",
            dtypes=stat,
            of=adaln,
            gradient=split,
            wrt={0: 1},
        )
        (dtime,) = b.op(
            "silu_backward",
            [dact, self.time],
            "dtime",
            add_to=shared.time,
            dtypes=stat,
            of=b.producer(self.time_act),
            gradient=dact,
            wrt={0: 0},
        )
        dtime = b.cast(dtime, compute, "dtime_cast")
        tensor.linear_weight_backward(b, dtime, self.time, self.time1_act, dw["time.second"])
        dact1 = tensor.linear_input_backward(b, dtime, self.time, w["time.second"], "dtime1_act")
        (dtime1,) = b.op(
            "silu_backward",
            [dact1, self.time1],
            "dtime1",
            of=b.producer(self.time1_act),
            gradient=dact1,
            wrt={0: 0},
        )
        tensor.linear_weight_backward(b, dtime1, self.time1, self.features, dw["time.first"])

        first_token = 0
        for encoder in c.encoders:
            name = encoder.name
            partial, projected = self.projected[name]
            dcontext = b.view(
                shared.text,
                f"d{name}_context",
                projected.shape,
                Placement(projected.placement.dims, shared.text.placement.partial),
                first_token * local_row(b, shared.text),
            )
            normed, mean, rstd = self.norms[name]
            gain = w[f"text.{name}.gain"]
            dprojected, _, _ = b.op(
                "layer_norm_backward",
                [dcontext, projected, mean, rstd, gain],
                (f"d{name}_projected", f"d{name}_gain", f"d{name}_bias"),
                dtypes=(compute, stat, stat),
                into={1: dw[f"text.{name}.gain"], 2: dw[f"text.{name}.bias"]},
                of=b.producer(normed),
                gradient=dcontext,
                wrt={0: 0, 1: 1, 2: 2},
            )
            whole = b.all_reduce(dprojected, HEADS, f"d{name}_partial", of=b.producer(projected))
            tensor.linear_weight_backward(b, whole, partial, self.text_in[name], dw[f"text.{name}.weight"])
            first_token += encoder.tokens


class FinalLayer:
    """Modulated norm and projection to patches; modulation is the time embedding plus a 2xD table (as in PixArt)."""

    def __init__(self, b: Builder, c: ModelConfig) -> None:
        self.b, self.c = b, c

    def forward(self, w: Weights, x: Buffer, cond: Conditioning) -> Buffer:
        """x [T, B, D] -> the velocity's patches [T, B, P], both split by (cp, tp)."""
        b = self.b
        (self.modulation,) = b.op("add_table", [cond.time, w["final.table"]], "modulation", signature="bd,rd->rbd")
        shift, scale = rows(b, self.modulation, ("shift", "scale"))
        self.norm = ModulatedNorm(b, self.c.norm_eps, w["final.norm"], by_token=False)
        self.h = self.norm.forward(x, scale, shift, "h", "rstd")
        self.velocity = tensor.linear(b, self.h, w["final.weight"], "tbi,ip->tbp", "velocity")
        return self.velocity

    def backward(self, w: Weights, dw: Weights, dvelocity: Buffer, shared: SharedGradients) -> Buffer:
        """The gradient of x; those of weights go to ``dw``, that of the time embedding begins ``shared.time``."""
        b = self.b
        dh = tensor.linear_input_backward(b, dvelocity, self.velocity, w["final.weight"], "dh")
        tensor.linear_weight_backward(b, dvelocity, self.velocity, self.h, dw.get("final.weight"))
        dmodulation, (dshift, dscale) = modulation_gradient(b, self.modulation, ("dshift", "dscale"))
        dx = self.norm.backward(dh, None, "dx", dw.get("final.norm"), dscale, dshift)
        if dmodulation is not None:
            self._modulation_backward(dw, dmodulation, shared)
        return dx

    def _modulation_backward(self, dw: Weights, dmodulation: Buffer, shared: SharedGradients) -> None:
        b, add_table = self.b, self.b.producer(self.modulation)
        facts = {"dtypes": b.plan.stat_dtype, "of": add_table, "gradient": dmodulation}
        b.op("sum_to", [dmodulation], "dtable", signature="rbd->rd", into={0: dw["final.table"]}, wrt={0: 1}, **facts)
        (shared.time,) = b.op("sum_to", [dmodulation], "dtime", signature="rbd->bd", wrt={0: 0}, **facts)
