"""What a row of published measurements may say: its parts, their keys, and the kind of each value (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from ...documents import mapping, quoted
from ...errors import CinemeshError
from ...ranges import Range, integers, reals

OWN_STEP = "own_step"  # of a run of this trainer: own_rows.py reads it
KINDS = ("training_step", "layer", "attention_layer", "memory", "oom_check", "microbench", OWN_STEP)
PARTS = ("source", "hardware", "model", "plan", "measured")


@dataclass(frozen=True)
class Kind:
    """What a value may be: any of these. Nothing (null) always is: it is not stated."""

    text: bool = False
    flag: bool = False
    texts: bool = False
    day: bool = False
    number: Range | None = None

    def wrong(self, value: object) -> str | None:
        """What a value must be instead, None where nothing is wrong."""
        allowed = {
            "a text": self.text and isinstance(value, str),
            "true or false": self.flag and isinstance(value, bool),
            "a list of texts": self.texts and isinstance(value, list) and all(isinstance(x, str) for x in value),
            "a day, as 2024-06-13": self.day and _is_day(value),
        }
        if value is None or any(allowed.values()) or (self.number and self.number.wrong(value) is None):
            return None
        if self.number and not isinstance(value, str | bool):
            return self.number.wrong(value)
        said = [word for word, of in zip(allowed, (self.text, self.flag, self.texts, self.day), strict=True) if of]
        return f"it must be {' or '.join([*said, *(['a number'] if self.number else [])])}"


def _is_day(value: object) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


COUNT = Kind(number=integers(1, 2**40, "it counts GPUs, layers or the like, and none has as many"))
MEASURED = Kind(number=reals(0, 1e12, "it is a time, a rate or a size", above=True))
TEXT, FLAG, TEXTS = Kind(text=True), Kind(flag=True), Kind(texts=True)
SAID = Kind(text=True, flag=True)

KEYS: dict[str, dict[str, Kind]] = {
    "source": {
        **dict.fromkeys(("title", "url", "table", "repo", "path", "commit", "software"), TEXT),
        "date": Kind(day=True),
    },
    "hardware": {
        **dict.fromkeys(("gpu", "intra", "inter", "hbm"), TEXT),
        **dict.fromkeys(("gpus", "gpus_per_node", "power_limit_w"), COUNT),
    },
    "model": {
        **dict.fromkeys(("name", "activation", "latent_grid"), TEXT),
        **dict.fromkeys(("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "seq"), COUNT),
        **dict.fromkeys(("context_tokens", "n_params_reported"), COUNT),
        **dict.fromkeys(("ffn_gated", "causal", "tied_embeddings", "learned_positions", "dropout"), FLAG),
        "cross_attention": SAID,
    },
    "plan": {
        **dict.fromkeys(("tp", "cp", "pp", "dp", "vpp", "mbs", "gbs", "grad_accum", "replicas"), COUNT),
        **dict.fromkeys(("dtype", "framework", "recompute", "cp_method", "fsdp_mesh", "tp_mode", "overlap"), TEXT),
        **dict.fromkeys(("sp", "cpu_offload", "reshard_after_forward", "lora"), FLAG),
        **dict.fromkeys(("async_tp", "compile", "fp8", "optimizer", "attention"), SAID),
        "fsdp": Kind(text=True, flag=True, number=COUNT.number),
    },
    "measured": {
        **dict.fromkeys(("iter_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "peak_mem_gib"), MEASURED),
        **dict.fromkeys(("tflops_per_gpu", "mfu_pct", "hfu_pct", "pct_of_peak"), MEASURED),
        **dict.fromkeys(("fwd_ms", "bwd_ms", "fwd_bwd_ms", "fwd_iter_per_s", "fwd_bwd_iter_per_s"), MEASURED),
        **dict.fromkeys(("layer_fwd_ms", "layer_bwd_ms", "layer_fwd_bwd_ms"), MEASURED),
        **dict.fromkeys(("fwd_tflops_per_gpu", "bwd_tflops_per_gpu", "params_and_optimizer_gib"), MEASURED),
        **dict.fromkeys(("activations_no_recompute_no_sp_gib", "activations_selective_sp_gib"), MEASURED),
        "oom": FLAG,
    },
}
TABLE = "act_pct_of_tp_baseline"  # measured: activations by what saves them, % of those of tp alone
SAVERS: dict[str, Kind] = dict.fromkeys(("sp", "selective", "sp_and_selective", "full_recompute"), MEASURED)
KEYS_OF_ALL = {"id": TEXT, "kind": TEXT, "trust": TEXT, "assumed": TEXTS, "flops_convention": TEXT, "notes": TEXT}


def check_row(where: str, row: Any) -> dict[str, Any]:
    """A row with its parts, those that say nothing empty. Raises CinemeshError; ``where`` names the row."""
    if isinstance(row, dict) and row.get("kind", OWN_STEP) not in KINDS:
        raise CinemeshError(f"{where}: kind is {quoted(row['kind'])}", remedy=f"choose one of {', '.join(KINDS)}")
    if isinstance(row, dict) and row.get("kind") == OWN_STEP:
        return row
    row = mapping(row, where, (*KEYS_OF_ALL, *PARTS), required=("id", "kind"))
    for key, kind in KEYS_OF_ALL.items():
        _check(f"{where}: {key}", kind, row.get(key))
    if row["kind"] == "microbench":
        return row
    lacking = [part for part in PARTS if part not in row]
    if lacking:
        raise CinemeshError(f"{where} has no {', '.join(lacking)}", remedy="add it, each a mapping")
    parts = {part: row[part] or {} for part in PARTS}
    for part, said in parts.items():
        keys = KEYS[part] | ({TABLE: Kind()} if part == "measured" else {})
        _check_keys(f"{where}: {part}", said, keys)
    measured = {key: value for key, value in parts["measured"].items() if value is not None}
    if TABLE in measured:
        _check_keys(f"{where}: measured.{TABLE}", measured[TABLE], SAVERS)
    return row | parts | {"measured": measured}


def _check_keys(where: str, said: Any, kinds: Mapping[str, Kind]) -> None:
    for key, value in mapping(said, where, kinds).items():
        if key != TABLE:
            _check(f"{where}.{key}", kinds[key], value)


def _check(where: str, kind: Kind, value: object) -> None:
    if must := kind.wrong(value):
        raise CinemeshError(f"{where} is {quoted(value)}", remedy=must)
