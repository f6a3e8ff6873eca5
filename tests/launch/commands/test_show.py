"""Tables of parameters and records: nothing left out, nothing cut, and sums that another way of counting gives."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch import tables
from cinemesh.launch.commands import show
from cinemesh.model.config import parameters, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.flops import model_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.report.explain import sample_flops

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, **changed: object) -> str:
    given = {"model": "tiny-video", "plan": "tp=2,cp=2,dp_shard=2", "latent": "2x16x16", "text_tokens": 48, "batch": 1}
    show.program_listing(**{**given, "as_json": False, **changed})  # pyright: ignore[reportArgumentType]
    return capsys.readouterr().out


def program_of(plan: str) -> Program:
    return prepare(build_step(preset("tiny-video"), Plan.parse(plan), BatchShape(1, (2, 16, 16))), backend="nccl")


def test_model_table_adds_up(capsys: Capture) -> None:
    """The paper's 30B, counted by hand: 48 blocks of 8 D^2 + 3 D F, the shared adaLN and the small parts."""
    show.model_table("movie-gen-30b", as_json=True)
    found = json.loads(capsys.readouterr().out)
    d, f = 6144, 16384
    sharded = 48 * (8 * d * d + 3 * d * f) + 6 * d * d + (4096 + 1280 + 1472) * d
    assert found["totals"]["tp_sharded"] == sharded
    assert found["totals"]["parameters"] == 29_303_494_656
    assert found["totals"]["parameters"] == sharded + found["totals"]["tp_replicated"]
    names = [name for part in found["parts"] for name in part["parameters"]]
    assert sorted(names) == sorted(row.name for row in parameters(preset("movie-gen-30b")))
    assert sum(part["elements"] for part in found["parts"]) == found["totals"]["parameters"]


def test_model_table_reads_well(capsys: Capture) -> None:
    show.model_table("movie-gen-30b", as_json=False)
    shown = capsys.readouterr().out
    assert "…" not in shown
    (ffn,) = [line for line in shown.splitlines() if line.startswith("FFN ")]
    assert ffn.split()[1:5] == ["sharded", "14,495,514,624", "49.47", "%"] and "blocks.*.gate [6144, 16384]" in ffn
    assert shown.count("blocks.*.norm1") == 1 and "29,303,494,656" in shown


@pytest.mark.parametrize("plan", ["tp=2,cp=2,dp_shard=2", "micro_batches=2,recompute=full", "dp_shard=4,prefetch=0"])
def test_sections_hold_every_record_in_order(plan: str) -> None:
    program = program_of(plan)
    found = show.sections(program)
    assert [op for section in found for op in section.ops] == program.ops
    titles = [section.title for section in found]
    assert len(titles) == len(set(titles)), "a section is told in two pieces"
    assert titles[-1] == "optimizer"


def test_repeated_blocks_are_told_once(capsys: Capture) -> None:
    lines = call(capsys, latent="2x16x16").splitlines()
    assert "mb0/blocks.1.forward .. mb0/blocks.2.forward: as mb0/blocks.0.forward" in lines
    assert "mb0/blocks.1.backward: as mb0/blocks.2.backward" in lines
    assert sum(line.startswith("q ") for line in lines) == 1
    assert sum(line.startswith("~h1_gathered ") and "all_gather" in line for line in lines) == 1
    assert any(line.startswith("~block -1 weights/flat") for line in lines), "the prefetch in backward"


def test_a_block_that_differs_is_told() -> None:
    """Else a pass that treats one block otherwise would hide behind "as blocks.0"."""
    program = program_of("tp=2,cp=2,dp_shard=2")
    op = next(op for op in program.ops if op.name == "mb0/blocks.1.forward/h2")
    program.buffers[op.outputs[0]] = replace(program.buffers[op.outputs[0]], dtype="float32")
    told = {heading: rows for heading, rows in show.listing(program) if "blocks.1.forward" in heading}
    assert list(told) == ["mb0/blocks.1.forward: as mb0/blocks.0.forward, but"]
    ((name, kind, _, _, outputs),) = told["mb0/blocks.1.forward: as mb0/blocks.0.forward, but"]
    assert (name, kind) == ("h2", "modulate_norm") and " fp32" in outputs.split("\n")[0]


@pytest.mark.parametrize("count", [4, 5])
def test_one_that_differs_in_more_than_four_records_is_shown_whole(count: int) -> None:
    """Each that is another counts twice: it is not there, and the other one is."""
    program = program_of("tp=2,cp=2,dp_shard=2")
    for name in ("q", "o", "cross_kv", "cross_q", "cross_o")[:count]:
        (op,) = [op for op in program.ops if op.name == f"mb0/blocks.1.forward/{name}"]
        program.buffers[op.outputs[0]] = replace(program.buffers[op.outputs[0]], dtype="float64")
    ((heading, rows),) = [told for told in show.listing(program) if told[0].startswith("mb0/blocks.1.forward")]
    assert heading == "mb0/blocks.1.forward" + (": as mb0/blocks.0.forward, but" if count == 4 else "")
    assert len(rows) == 4 if count == 4 else len(rows) > 20


def test_a_record_that_a_block_lacks_is_named() -> None:
    program = program_of("tp=2,cp=2,dp_shard=2")
    lost = next(op for op in program.ops if op.name == "mb0/blocks.1.forward/h2")
    program = program.with_ops([op for op in program.ops if op is not lost])
    ((heading, rows),) = [told for told in show.listing(program) if told[0].startswith("mb0/blocks.1.forward")]
    assert (heading, rows) == ("mb0/blocks.1.forward: as mb0/blocks.0.forward without h2", ())


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "movie-gen-30b", "plan": "tp=4,cp=2,dp_shard=768", "latent": "32x96x96", "text_tokens": 868},
        {"plan": "micro_batches=2,recompute=full,tp=2,dp_replicate=2"},
    ],
)
def test_a_listing_is_not_cut(capsys: Capture, changed: dict[str, object]) -> None:
    """Every column of every line: none ends in an ellipsis."""
    shown = call(capsys, **changed)
    assert "…" not in shown
    told = "".join(shown.split())
    json_of = json.loads(call(capsys, **changed, as_json=True))
    kinds = {record["kind"] for record in json_of["records"]}
    assert all(kind in told for kind in kinds)
    assert json_of["totals"]["peak_at"] in told
    assert len(shown.splitlines()) < 450  # of thousands of records


def test_json_has_every_record_and_its_totals(capsys: Capture) -> None:
    """Sums over records, and the wire bytes of blocks by the design's closed forms for forward."""
    found = json.loads(call(capsys, as_json=True, plan="tp=2,cp=2,dp_shard=2"))
    records, totals = found["records"], found["totals"]
    program = program_of("tp=2,cp=2,dp_shard=2")
    assert [record["name"] for record in records] == [op.name for op in program.ops]
    compute = totals["compute"]
    flops = sum(record.get("flops", 0) for record in records)
    assert compute["flops"] == flops > compute["model_flops"] + compute["recompute_flops"]
    assert compute["model_flops"] == model_flops(program) / 8
    assert compute["recompute_flops"] == sum(record.get("flops", 0) for record in records if record["recomputed"]) > 0
    wire = {lane: values["wire_bytes"] for lane, values in totals["collectives"].items()}
    assert sum(wire.values()) == pytest.approx(sum(record.get("wire_bytes", 0) for record in records))

    c, tokens, item, tp, cp = preset("tiny-video"), 128, 2, 2, 2
    place = {"phase": "forward", "micro_batch": 0, "block": 1}
    forward = [record for record in records if record["place"] == place and not record["recomputed"]]
    by_lane = {lane: sum(r.get("wire_bytes", 0) for r in forward if r["lane"] == lane) for lane in ("tp", "cp")}
    assert by_lane["tp"] == 6 * tokens / cp * c.width * item * (tp - 1) / tp
    assert by_lane["cp"] == 2 * tokens * c.width / tp * item * (cp - 1) / cp
    assert totals["peak_at"] in {record["name"] for record in records}
    assert totals["peak_bytes"] > totals["persistent_bytes"] > 0


def test_the_model_flops_are_those_of_mfu(capsys: Capture) -> None:
    """30.7 PFLOP a sample over the eight ranks that share it, whatever is run again or by several ranks."""
    asked = {"model": "movie-gen-30b", "latent": "32x96x96", "text_tokens": 868}
    shown = call(capsys, **asked, plan="tp=2,cp=4,recompute=full")
    share = sample_flops(preset("movie-gen-30b"), (32, 96, 96)) / 8
    assert share == pytest.approx(30.7e15 / 8, rel=0.005)
    assert f"= model {show.quantity(share, 'FLOP')} + recompute" in " ".join(shown.split())
    found = json.loads(call(capsys, **asked, plan="tp=2,cp=4", as_json=True))
    assert found["totals"]["compute"]["model_flops"] == share


def test_local_shapes_name_the_axes_that_split_them(capsys: Capture) -> None:
    """128 tokens over cp(2) and tp(2); an axis of one rank is not named."""
    shown = call(capsys)
    assert "[cp*tp:32, dp_shard:1, 192] bf16" in shown
    assert "[cp:64, dp_shard:1, 192] bf16 Partial{tp}" in shown
    assert "dp_replicate*dp_shard:" not in shown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latent": "32x96"}, "'32x96' is not TxHxW"),
        ({"latent": "0x16x16"}, r"T\(0\)"),
        ({"model": "movie-gen-31b"}, "did you mean 'movie-gen-30b'"),
        ({"plan": "tp=5"}, r"heads\(6\) % tp\(5\) = 1"),
    ],
)
def test_mistakes_are_told(capsys: Capture, changed: dict[str, object], message: str) -> None:
    with pytest.raises(CinemeshError, match=message):
        call(capsys, **changed)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (12_345, "12.3 kB"), (4.25e15, "4.25 PB")]
)
def test_quantities(value: float, shown: str) -> None:
    assert tables.quantity(value, "B") == shown


def test_listing_needs_no_torch() -> None:
    """The house test loads the module; only a run sees an import inside a function."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from cinemesh.launch.commands import show\n"
        "show.model_table('tiny', False)\n"
        "show.program_listing(model='tiny', plan='tp=2', latent='3x4x12', text_tokens=7, batch=1, as_json=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory:  peak" in done.stdout
