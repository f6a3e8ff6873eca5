"""``cinemesh model`` and ``cinemesh program``: parameters and records as tables or JSON (torch-free)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from ...kernels.ops import OPS
from ...model.config import ModelConfig, latent_text, parameters
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.flops import model_flops
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op, Phase, Place, Space
from ...parallel.ir.units import Parameter
from ...parallel.passes.liveness import lifetimes
from ...parallel.passes.pipeline import prepare
from ..models import read_model
from ..plans import read_plan
from ..tables import DTYPES, new_console, plain_table, quantity

MOST_DIFFERENCES = 8  # records in which a block may differ from another to be shown as "as that one, but"

# -- cinemesh model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model that are all split over tp, or all replicated."""

    name: str
    tp_sharded: bool
    rows: tuple[Parameter, ...]

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    def tensors(self) -> list[str]:
        """``blocks.*.q [6144, 48, 128]``: names with their shape, layers and encoders told once."""
        shown: dict[str, None] = {}
        for row in self.rows:
            name = re.sub(r"^blocks\.\d+\.", "blocks.*.", row.name)
            shown.setdefault(f"{name} [{', '.join(map(str, row.shape))}]")
        return list(shown)


def parts(config: ModelConfig) -> list[Part]:
    """In the order of the forward pass."""
    grouped: dict[tuple[str, bool], list[Parameter]] = {}
    for row in parameters(config):
        grouped.setdefault((row.part, row.tp_dim is not None), []).append(row)
    return [Part(name, sharded, tuple(rows)) for (name, sharded), rows in grouped.items()]


def model_table(name: str, as_json: bool) -> None:
    """Print the parameters of a model part by part. Raises CinemeshError when there is no such model."""
    config = read_model(name).config
    found = parts(config)
    total = sum(part.elements for part in found)
    sharded = sum(part.elements for part in found if part.tp_sharded)
    if as_json:
        shown = [
            {
                "part": part.name,
                "tp_sharded": part.tp_sharded,
                "elements": part.elements,
                "parameters": {row.name: list(row.shape) for row in part.rows},
            }
            for part in found
        ]
        totals = {"parameters": total, "tp_sharded": sharded, "tp_replicated": total - sharded}
        print(json.dumps({"model": name, "parts": shown, "totals": totals}, indent=1))
        return
    console = new_console()
    console.print(
        f"{name}: {config.layers} layers, width {config.width}, {config.heads} heads of {config.head_dim}, "
        f"FFN {config.ffn}, {config.channels} latent channels, patch {'x'.join(map(str, config.patch))}, "
        f"block {config.block}, {config.objective}; text "
        + ", ".join(f"{e.name} {e.tokens} x {e.width}" for e in config.encoders)
        + "\n"
    )
    table = plain_table(
        "part", "over tp", "parameters", "share", "tensors", right=("parameters", "share"), breaks=("tensors",)
    )
    for part in found:
        over = "sharded" if part.tp_sharded else "replicated"
        share = f"{100 * part.elements / total:.2f} %"
        table.add_row(part.name, over, f"{part.elements:,}", share, "\n".join(part.tensors()))
    for label, over, value in (
        ("total", "sharded", sharded),
        ("total", "replicated", total - sharded),
        ("total", "", total),
    ):
        table.add_row(label, over, f"{value:,}", f"{100 * value / total:.2f} %", "", style="bold")
    console.print(table)


# -- cinemesh program: records ----------------------------------------------------------------------------------------


def program_listing(
    *, model: str, plan: str, latent: str | None, text_tokens: int | None, batch: int, as_json: bool
) -> None:
    """Print the records of a training step as it runs on NCCL, and what they add up to, on one rank.

    Raises CinemeshError for an unknown model, an illegal plan, and a plan that does not divide the model or ``latent``.
    """
    named = read_model(model)
    config = named.config
    if text_tokens is not None:
        config = config.with_text_tokens(text_tokens)
    degrees = read_plan(plan)
    size = named.latent(latent)
    program = prepare(build_step(config, degrees, BatchShape(batch, size)), backend="nccl")
    if as_json:
        given = {"model": model, "plan": degrees.to_dict(), "latent": size, "batch": batch}
        given["text_tokens"] = config.text_tokens
        print(json.dumps({**given, "records": [record(program, op) for op in program.ops], "totals": totals(program)}))
        return
    console = new_console()
    kept = degrees.recompute if isinstance(degrees.recompute, str) else f"all but {', '.join(degrees.recompute)}"
    kept += f", offload {', '.join(degrees.offload)}" if degrees.offload else ""
    console.print(
        f"{model}, latent {latent_text(size)} = {config.tokens(size):,} tokens, {config.text_tokens} text tokens, "
        f"{batch} sample(s) a data rank and micro-batch\n"
        f"{degrees.equation()} ranks, {degrees.micro_batches} micro-batch(es), {degrees.dtype}, recompute {kept}\n"
        f"{len(program.ops):,} records of one rank, in the order of execution\n\n"
        "columns   op (after ~: recomputed), kind, lane, work, outputs\n"
        "work      FLOPs of products, else bytes read and written; of a collective payload > wire bytes\n"
        "outputs   local: [cp*tp:9216, 6144] is a rank's 9216 of a dim split by cp (outer) and tp, and a whole dim"
    )
    _print_sections(console, program)
    _print_totals(console, program)


def record(program: Program, op: Op) -> dict[str, object]:
    """One record as JSON values; FLOPs and bytes are those of one rank."""
    values: dict[str, object] = {
        "name": op.name,
        "kind": op.kind,
        "lane": op.lane,
        "place": {"phase": op.place.phase, "micro_batch": op.place.micro_batch, "block": op.place.block},
        "recomputed": op.clone,
        "inputs": list(op.inputs),
        "outputs": [
            {
                "name": name,
                "shape": list(program.buffers[name].shape),
                "local_shape": list(program.local_shape(name)),
                "dtype": program.buffers[name].dtype,
                "placement": str(program.buffers[name].placement),
            }
            for name in op.outputs
        ],
    }
    if op.kind in OPS or op.kind in FUSED:
        values |= {"flops": program.flops(op), "bytes": program.bytes_moved(op)}
    if op.kind not in OPS and not op.is_wait:
        values |= {"payload_bytes": program.payload_bytes(op), "wire_bytes": program.wire_bytes(op)}
    return values


def totals(program: Program) -> dict[str, object]:
    """Of one rank: collectives and compute by lane, its share of model FLOPs, the peak and where it is reached."""
    compute = [op for op in program.ops if op.kind in OPS or op.kind in FUSED]
    lanes: dict[str, dict[str, float]] = {}
    for op in program.ops:
        if op.kind not in OPS and not op.is_wait:
            lane = lanes.setdefault(f"{op.lane} {op.kind}", {"collectives": 0, "payload_bytes": 0, "wire_bytes": 0})
            lane["collectives"] += 1
            lane["payload_bytes"] += program.payload_bytes(op)
            lane["wire_bytes"] += program.wire_bytes(op)
    lives = lifetimes(program)
    return {
        "records": len(program.ops),
        "compute": {
            "records": len(compute),
            "flops": sum(program.flops(op) for op in compute),
            "model_flops": model_flops(program) / program.plan.world_size,
            "recompute_flops": sum(program.flops(op) for op in compute if op.clone),
            "bytes": sum(program.bytes_moved(op) for op in compute),
        },
        "collectives": dict(sorted(lanes.items())),
        "peak_bytes": lives.peak_bytes,
        "peak_at": lives.peak_op(program).name,
        "persistent_bytes": lives.persistent_bytes,
        "host_bytes": lifetimes(program, Space.HOST).peak_bytes,
    }


# -- cinemesh program: sections ---------------------------------------------------------------------------------------


START = Place(title="start")  # in front of the first section


@dataclass(frozen=True)
class Section:
    """Consecutive records of one place; gathers of weights belong to the section that they are issued in."""

    place: Place
    ops: tuple[Op, ...]

    @property
    def title(self) -> str:
        number = self.place.micro_batch
        return (f"mb{number}/" if number is not None else "") + self.place.title


def sections(program: Program) -> list[Section]:
    """The program cut into embedding, blocks, final layer and optimizer, forward and backward."""
    backward = {
        (op.place.micro_batch, op.place.block): op.place for op in program.ops if op.place.phase is Phase.BACKWARD
    }
    places: list[Place] = []
    following = START
    for op in reversed(program.ops):
        if op.place.phase not in (Phase.WEIGHTS, Phase.GRADIENT):
            following = backward[op.place.micro_batch, op.place.block] if op.clone else op.place
        places.append(following)
    places.reverse()
    cut = groupby(zip(places, program.ops, strict=True), key=lambda pair: (pair[0], pair[0].title))
    return [Section(place, tuple(op for _, op in pairs)) for (place, _), pairs in cut]


def _row(program: Program, op: Op, section: Section) -> tuple[str, str, str, str, str]:
    """Op, kind, lane, work, outputs. Names are told relative to the section, neighbouring blocks by their distance.

    So that records which do the same in the same place of another block have equal rows.
    """
    here = section.place

    def short(place: Place, label: str) -> str:
        same_block = place.block == here.block and place.micro_batch == here.micro_batch
        if place == here or place.phase is Phase.GRADIENT or (same_block and place.phase is Phase.FORWARD):
            return label
        if here.block is not None and place.block is not None:
            return f"{_neighbour(place.block - here.block)}{place.phase}/{label}"
        return f"{place.title}/{label}" if place.title else label

    name = short(op.place, op.label)
    outputs: list[str] = []
    for output in op.outputs:
        made = program.buffers[output]
        label = short(made.place, f"{made.role}{op.slice or ''}")
        outputs.append(("" if label == name else f"{label} ") + _local(program, output))
    work = ""
    if op.is_wait:  # for what the issue has told already
        outputs = []
    elif op.kind in OPS:
        flops = program.flops(op)
        work = quantity(flops, "FLOP") if OPS[op.kind].is_product else quantity(program.bytes_moved(op), "B")
    else:
        work = f"{quantity(program.payload_bytes(op), 'B')} > {quantity(program.wire_bytes(op), 'B')}"
        if op.kind in FUSED:
            work = f"{quantity(program.flops(op), 'FLOP')}\n{work}"
    return ("~" if op.clone else "") + name, op.kind, op.lane, work, "\n".join(outputs)


def _neighbour(distance: int) -> str:
    return f"block {distance:+d} " if distance else ""


def _local(program: Program, name: str) -> str:
    """``[cp*tp:9216, 1, 6144] bf16 Partial{tp}``; axes of one rank are left out."""
    buffer = program.buffers[name]
    live = {axis for axis, size in program.sizes.items() if size > 1}
    dims: list[str] = []
    for size, axes in zip(program.local_shape(name), buffer.placement.dims, strict=True):
        split = "*".join(axis for axis in axes if axis in live)
        dims.append(f"{split}:{size}" if split else str(size))
    partial = sorted(buffer.placement.partial & live)
    dtype = DTYPES.get(buffer.dtype, buffer.dtype)
    return f"[{', '.join(dims)}] {dtype}" + (f" Partial{{{','.join(partial)}}}" if partial else "")


ListedRows = tuple[tuple[str, str, str, str, str], ...]


def listing(program: Program) -> Iterator[tuple[str, ListedRows]]:
    """(heading, rows) to print. A section like an earlier one is told in its heading and has the rows it adds."""
    first: dict[ListedRows, str] = {}  # where rows were printed in full
    pending: list[str] = []
    like = ""

    def told() -> Iterator[tuple[str, ListedRows]]:
        if pending:
            span = pending[0] if len(pending) == 1 else f"{pending[0]} .. {pending[-1]}"
            yield f"{span}: as {like}", ()
            pending.clear()

    for section in sections(program):
        rows = tuple(_row(program, op, section) for op in section.ops)
        if rows in first:
            if pending and like != first[rows]:
                yield from told()
            like = first[rows]
            pending.append(section.title)
            continue
        yield from told()
        near = [(len(set(rows) ^ set(other)), title, other) for other, title in first.items()]
        differences, title, other = min(near, default=(MOST_DIFFERENCES + 1, "", ()))
        if differences <= MOST_DIFFERENCES and section.place.block is not None and 2 * differences < len(rows):
            added = tuple(row for row in rows if row not in set(other))
            changed = {row[0] for row in added}
            missing = [row[0] for row in other if row not in set(rows) and row[0] not in changed]
            without = f" without {', '.join(missing)}" if missing else ""
            yield f"{section.title}: as {title}{without}" + (", but" if added else ""), added
        else:
            yield section.title, rows
        first[rows] = section.title
    yield from told()


def _print_sections(console: Console, program: Program) -> None:
    for heading, rows in listing(program):
        console.print(Text(f"\n{heading}", style="bold"))
        if not rows:
            continue
        table = plain_table("op", "kind", "lane", "work", "outputs", breaks=("outputs",), header=False)
        for row in rows:
            table.add_row(*row, style="dim" if row[1] == "wait" else "")
        console.print(table)
    console.print()


def _print_totals(console: Console, program: Program) -> None:
    found = totals(program)
    compute, lanes = found["compute"], found["collectives"]
    assert isinstance(compute, dict) and isinstance(lanes, dict)
    numbers = ("collectives", "payload", "wire, sent by one rank")
    table = plain_table("lane", *numbers, right=numbers)
    for lane, values in lanes.items():
        payload, wire = quantity(values["payload_bytes"], "B"), quantity(values["wire_bytes"], "B")
        table.add_row(lane, f"{values['collectives']:,}", payload, wire)
    if lanes:
        console.print(table)
        console.print()
    ran, model, again = (compute[name] for name in ("flops", "model_flops", "recompute_flops"))
    parts = [quantity(flops, "FLOP") for flops in (ran, model, again, ran - model - again)]
    console.print(
        f"compute: {compute['records']:,} records, {parts[0]} = model {parts[1]} + recompute {parts[2]} + {parts[3]} "
        "of scores that attention's backward makes again, element-wise work and what ranks do alike; "
        f"{quantity(compute['bytes'], 'B')} read and written"
    )
    peak, persistent, on_host = (found[f"{name}_bytes"] for name in ("peak", "persistent", "host"))
    assert isinstance(peak, int) and isinstance(persistent, int) and isinstance(on_host, int)
    console.print(
        f"memory:  peak {quantity(peak, 'B')} ({peak / 2**30:.2f} GiB) at {found['peak_at']}, "
        f"of it {quantity(persistent, 'B')} persistent"
        + (f"; {quantity(on_host, 'B')} in host memory" if on_host else "")
    )
