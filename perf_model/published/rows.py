"""Rows of published measurements: read, decided whether they can be predicted, turned into runs (torch-free).

The form is that of ``published/rows.yaml``: a list of items with ``id``, ``kind``, ``source``, ``hardware``, ``model``,
``plan`` and ``measured``. What the software of a source did comes from ``stacks.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...documents import quoted, read_yaml
from ...errors import CinemeshError
from ..acceptance import rows_of
from ..clusters.cluster import Cluster, load
from .peers import Model, Run, Stack
from .row_schema import check_row
from .stacks import chips, stack_of

FOLDER = Path(__file__).parent
TIMED = ("training_step", "layer", "attention_layer")
TRUSTED = ("A", "")  # rows that say all that a prediction needs, or that do not say how much they say

BLOCK = ("norm1", "q", "rope", "core", "out", "residual1", "norm2", "ffn_in", "activation", "ffn_out", "residual2")
# torchtitan's selective op: products 2, 4, 6 of the seven (k, out, up) and everything that is no product or attention
SELECTIVE_OP = ("norm1", "kv", "rope", "out", "residual1", "norm2", "up", "activation")
# MaxText's save_qkv_proj keeps the projections after the rotation
SAVE_QKV = ("norm1", "core", "out", "residual1", "norm2", "ffn_in", "activation")


class Unpredictable(Exception):
    """A row that cannot be predicted; the message says why."""


@dataclass(frozen=True)
class RowCase:
    """A row ready to be predicted. ``measured``: seconds of a step, of a layer or of the attention core, or None."""

    id: str
    kind: str
    source: str
    trust: str
    run: Run
    cluster: Cluster
    gpus: int
    measured: float | None
    row: dict[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of an acceptance run's ``.json``.

    Raises CinemeshError for a file that holds none, or a row without the parts every row has.
    """
    if path.suffix == ".json":
        rows = rows_of(path)
    else:
        rows = read_yaml(path, "the rows file", "give a YAML file with a list of rows")
    if not isinstance(rows, list) or not rows:
        raise CinemeshError(
            f"the rows file {path} holds {quoted(rows)}, no list of rows",
            remedy="write one '- id: ...' item a measurement",
        )
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        name = row.get("id") if isinstance(row, dict) else None
        where = f"the rows file {path}: row {name if isinstance(name, str) else number}"
        checked = check_row(where, row)
        if not name or name in found:
            raise CinemeshError(f"{where}: its id is {quoted(name)}", remedy="give every row an id of its own")
        found[name] = checked
    return [*found.values()]


# -- hardware ---------------------------------------------------------------------------------------------------------


def cluster_of(row: dict[str, Any]) -> Cluster:
    hardware = row["hardware"]
    gpu = str(hardware.get("gpu"))
    for entry in chips():
        if entry["gpu"] in gpu:
            changes = tuple(entry.get("with", {}).items())
            return _cluster(entry["cluster"], changes, hardware.get("gpus_per_node") or 8, *network_of(hardware))
    raise Unpredictable(f"there is no cluster file for {gpu}")


@lru_cache(maxsize=64)
def _cluster(name: str, changes: tuple[tuple[str, float], ...], gpus: int, nics: int, gigabits: float) -> Cluster:
    cluster = load(name).with_(**dict(changes), **{"topology.gpus_per_server": gpus})
    if nics:
        cluster = cluster.with_(**{"topology.nics_per_server": nics, "topology.nic_bytes_per_s": gigabits * 0.125e9})
    return cluster


_GIGABIT = r"(\d+(?:\.\d+)?)\s*([GT])b?(?:it)?/?s?"


def network_of(hardware: dict[str, Any]) -> tuple[int, float]:
    """(NICs a server, Gb/s of each) as the row's ``inter`` says; (0, 0) where it does not."""
    text, gpus = str(hardware.get("inter")), int(hardware.get("gpus_per_node") or 8)
    many = re.search(r"(\d+)\s*x\s*" + _GIGABIT, text)
    if many:
        return int(many[1]), float(many[2]) * (1000 if many[3] == "T" else 1)
    one = re.search(_GIGABIT, text)
    if one is None:
        return 0, 0.0
    rate = float(one[1]) * (1000 if one[2] == "T" else 1)
    if "per node" in text and "count per node" not in text:
        nic = 200.0 if "A100" in str(hardware.get("gpu")) else 400.0
        return max(1, round(rate / nic)), nic
    return gpus, rate


# -- model and plan ---------------------------------------------------------------------------------------------------


def _model(row: dict[str, Any]) -> Model:
    m = row["model"]
    if m.get("cross_attention"):
        raise Unpredictable("blocks with cross-attention are not among the peers' blocks")
    attention_only = row["kind"] == "attention_layer"
    if any(m.get(key) is None for key in ("layers", "heads", "seq")) or (not attention_only and not m.get("hidden")):
        raise Unpredictable("the model's dimensions are not stated")
    hidden = m.get("hidden") or m["heads"] * (m.get("head_dim") or 0)
    if hidden < m["heads"]:
        raise Unpredictable("the width of a head is not stated")
    if not attention_only and m.get("ffn") is None:
        raise Unpredictable("the model's FFN width is not stated")
    return Model(
        layers=m["layers"],
        width=hidden,
        ffn=m.get("ffn") or hidden,
        gated=bool(m.get("ffn_gated")),
        heads=m["heads"],
        kv_heads=m.get("kv_heads") or m["heads"],
        head_dim=m.get("head_dim") or hidden // m["heads"],
        vocab=m.get("vocab") or 0,
        seq=m["seq"],
        causal=bool(m.get("causal", True)),
        tied=bool(m.get("tied_embeddings")),
        dropout=bool(m.get("dropout")),
    )


def _recompute(text: Any, stack: Stack, layers: int) -> tuple[frozenset[str], float]:
    """Records that run again, and in which share of the blocks."""
    if text is None or "see measured" in str(text):
        raise Unpredictable("what is recomputed is not stated")
    text = str(text).lower()
    full = frozenset(BLOCK) - ({"ffn_out", "residual2"} if stack.early_stop else set())
    some = re.search(r"(\d+) of (\d+) layers", text)
    if some:
        return full, int(some[1]) / int(some[2])
    if text.startswith("none"):
        return frozenset(), 0.0
    if text.startswith("full"):
        return full, 1.0
    if "attention core" in text:
        return frozenset({"core"}), 1.0
    if "save_qkv_proj" in text:
        return frozenset(SAVE_QKV), 1.0
    if "selective op" in text:
        return frozenset(SELECTIVE_OP), 1.0
    if "every 2nd" in text:
        return full, 0.5
    raise Unpredictable(f"recompute {text!r} is not known")


def _cp_method(row: dict[str, Any]) -> Any:
    plan = row["plan"]
    text = str(plan.get("cp_method") or "").lower()
    if plan.get("cp", 1) == 1:
        return "none"
    if "ulysses x ring" in text or "ring x ulysses" in text:
        raise Unpredictable("two-dimensional context parallelism is not among the peers' schedules")
    if "all-to-all" in text or "ulysses" in text:
        return "all_to_all"
    if "gather" in text:
        return "gather"
    if text == "ring_p2p":
        return "contiguous_ring"
    if "ring" in text:
        return "ring"
    raise Unpredictable("how context parallelism exchanges keys and values is not stated")


def _tp_overlap(plan: dict[str, Any]) -> str:
    value = plan.get("async_tp")
    if value is True or "userbuffers" in str(value):
        return "pipelined"
    return "none" if value is False and "titan" in str(plan.get("framework")) else ""


def run_of(row: dict[str, Any], *, described: bool = True) -> Run:
    """The run that a row describes. ``Unpredictable`` with the reason where it says too little.

    ``described``: its software is that of its source, as far as that is known, and not the default of its day.
    """
    plan, kind = row["plan"], row["kind"]
    if plan.get("pp", 1) not in (1, None):
        raise Unpredictable("pipeline parallelism is not among the peers' schedules")
    if plan.get("lora"):
        raise Unpredictable("LoRA skips the weight gradients")
    model, stack = _model(row), stack_of(row, lambda: cluster_of(row).gpu.device, described=described)
    tp, cp = plan.get("tp") or 1, plan.get("cp") or 1
    gpus = row["hardware"].get("gpus")
    if gpus is None:
        raise Unpredictable("the number of GPUs is not stated")
    if model.heads % tp or model.ffn % tp or model.seq % cp:
        raise Unpredictable(f"tp {tp} and cp {cp} do not divide heads, FFN width or sequence")
    if gpus % (tp * cp):
        raise Unpredictable(f"tp {tp} x cp {cp} does not divide {gpus} GPUs")
    data = gpus // (tp * cp)
    samples = plan.get("mbs") or (1 if kind == "attention_layer" else 0)
    if not samples:
        raise Unpredictable("the micro-batch is not stated")
    if kind == "training_step":
        batch = plan.get("gbs") or samples * data * (plan.get("grad_accum") or 1)
        micro_batches = max(1, round(batch / (samples * data)))
    else:
        micro_batches, model = 1, replace(model, vocab=0 if kind in ("layer", "attention_layer") else model.vocab)
    if kind == "attention_layer":
        if "packings" in str(row.get("notes")):
            raise Unpredictable("the lengths of the packed documents are not stated")
        recomputed, share = frozenset[str](), 0.0
    else:
        recomputed, share = _recompute(plan.get("recompute"), stack, model.layers)
    if "kv" in recomputed and "qkv" in stack.fused:
        raise Unpredictable("selective op with a fused projection is not known")
    shard = data * cp
    fsdp = plan.get("fsdp")
    if isinstance(fsdp, int) and fsdp > 1:
        shard = min(fsdp, shard)
    elif isinstance(fsdp, str) and "HSDP" in fsdp:
        shard = min(row["hardware"].get("gpus_per_node") or 8, shard)
    fp8 = str(plan.get("fp8") or "")
    return Run(
        model=model,
        stack=stack,
        samples=samples,
        micro_batches=micro_batches,
        tp=tp,
        sp=bool(plan.get("sp")) and tp > 1,
        cp=cp,
        cp_method=_cp_method(row),
        shard=shard,
        replicas=data * cp // shard,
        recomputed=recomputed,
        recomputed_share=share,
        fp8="" if not fp8 else "row" if "rowwise" in fp8 else "tensor",
        fp8_gather="float8 all-gather" in fp8 or "all-gather in fp8" in fp8,
        tp_overlap=_tp_overlap(plan),
    )


def measured_s(row: dict[str, Any], run: Run) -> float:
    """Seconds that the row measured. ``Unpredictable`` where it gives only a rate in FLOP/s."""
    m = row["measured"]
    if row["kind"] != "training_step":
        stem = "layer_" if row["kind"] == "layer" else ""
        both, parts = m.get(f"{stem}fwd_bwd_ms"), [m.get(f"{stem}fwd_ms"), m.get(f"{stem}bwd_ms")]
        if both is None and None in parts:
            raise Unpredictable("it does not give the time of forward and backward")
        return (both if both is not None else sum(parts)) * 1e-3
    if "iter_time_s" in m:
        return m["iter_time_s"]
    gpus = row["hardware"]["gpus"]
    samples = run.samples * run.micro_batches * run.replicas * run.shard // run.cp
    if "tokens_per_s_per_gpu" in m:
        return samples * run.model.seq / (m["tokens_per_s_per_gpu"] * gpus)
    if "tflops_per_gpu" in m and "narayanan21_96BsLh2" in str(row.get("flops_convention")):
        # Narayanan et al. 2021, section 4.1: the FLOPs include the recomputed forward
        s, h, layers, vocab = run.model.seq, run.model.width, run.model.layers, run.model.vocab
        flops = 96 * samples * s * layers * h * h * (1 + s / (6 * h) + vocab / (16 * layers * h))
        return flops / (m["tflops_per_gpu"] * 1e12 * gpus)
    raise Unpredictable("it prints a rate in FLOP/s, whose count is not sure, and no time")


def case_of(row: dict[str, Any], *, described: bool = True) -> RowCase:
    """A row ready to be predicted. Arguments and ``Unpredictable`` as of ``run_of``."""
    run = run_of(row, described=described)
    cluster = cluster_of(row)
    measured = measured_s(row, run) if row["kind"] in TIMED else None
    title = str(row["source"].get("title"))
    return RowCase(
        row["id"], row["kind"], title, row.get("trust") or "", run, cluster, row["hardware"]["gpus"], measured, row
    )
