"""Initial weights: the rule of every part, the seed, chunks of a long parameter, and which weights decay.

Parity starts both sides from the same function, so only this sees that function go wrong.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cinemesh.kernels.philox import Purpose
from cinemesh.kernels.philox import normals as normals_of_blocks
from cinemesh.model import flow, weights
from cinemesh.model.config import PRESETS, Encoder, LatentCondition, ModelConfig, parameters, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import Values, collect, fill_shard, full, initial_values, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.units import Parameter, lay_out

# No two sizes alike, so that a fan-in taken from another dim shows.
LAYERS, WIDTH, FFN, PATCH, UL2, BYT5 = 3, 96, 224, 4 * 4, 40, 136
CONFIG = ModelConfig(
    "sizes",
    LAYERS,
    WIDTH,
    6,
    FFN,
    (Encoder("ul2", UL2, 3), Encoder("byt5", BYT5, 2)),
    channels=4,
    position_lengths=(6, 7, 8),
    latent_conditions=(LatentCondition("low", 3),),
)
BRANCH = 2 * LAYERS  # every block adds two branches of its own to the residual stream, self-attention and FFN

# Name -> standard deviation, or "zeros" or "ones". Products keep the variance of their input (1 / fan-in); what adds to
# the residual stream is smaller by sqrt(2 L), as in GPT-2; gates, tables and the head start at zero, so that every
# block is the identity and the first velocity zero (DiT's adaLN-Zero); position tables N(0, 0.02**2), as in ViT.
RULES: Mapping[str, float | str] = {
    r"patchify\.weight": PATCH**-0.5,
    r"patchify\.low": "zeros",
    r"time\.first": 256**-0.5,
    r"time\.second": WIDTH**-0.5,
    r"final\.(weight|table)": "zeros",
    r"final\.norm": "ones",
    r"position\.[thw]": 0.02,
    r"text\.\w+\.gain": "ones",
    r"text\.\w+\.bias": "zeros",
    r"text\.ul2\.weight": UL2**-0.5,
    r"text\.byt5\.weight": BYT5**-0.5,
    r"adaln\.weight": "zeros",
    r"blocks\.\d\.norm[12]": "ones",
    r"blocks\.\d\.table": "zeros",
    r"blocks\.\d\.(cross\.)?(q|kv)": WIDTH**-0.5,
    r"blocks\.\d\.(cross\.)?o": (WIDTH * BRANCH) ** -0.5,
    r"blocks\.\d\.(gate|up)": WIDTH**-0.5,
    r"blocks\.\d\.down": (FFN * BRANCH) ** -0.5,
}
DECAYED = (  # matrices that multiply; no table, gain or bias
    r"patchify\.\w+|time\.(first|second)|final\.weight|adaln\.weight|text\.\w+\.weight"
    r"|blocks\.\d+\.(cross\.)?(q|kv|o)|blocks\.\d+\.(gate|up|down)"
)


def rule(name: str) -> float | str:
    (found,) = [how for pattern, how in RULES.items() if re.fullmatch(pattern, name)]
    return found


@lru_cache(maxsize=2)
def drawn(seed: int) -> dict[str, Tensor]:
    return full(parameters(CONFIG), initial_values(seed), torch.float64)


def normals(seed: int) -> Tensor:
    """All drawn values in units of what their rule says, in the order of the table."""
    rules = {name: rule(name) for name in drawn(seed)}
    return torch.cat([drawn(seed)[name].flatten() / std for name, std in rules.items() if not isinstance(std, str)])


@pytest.mark.parametrize("name", [row.name for row in parameters(CONFIG)])
def test_every_parameter_starts_by_its_rule(name: str) -> None:
    """Mean and standard deviation within five of their own: sigma / sqrt(n), and sigma / sqrt(2 n)."""
    value, want = drawn(0)[name], rule(name)
    if isinstance(want, str):
        assert torch.equal(value, torch.full_like(value, float(want == "ones")))
        return
    n = value.numel()
    assert abs(value.mean().item()) < 5 * want / math.sqrt(n)
    assert value.std().item() == pytest.approx(want, rel=5 / math.sqrt(2 * n))


def test_all_of_them_together_are_normal_and_no_two_alike() -> None:
    """Kolmogorov and Smirnov's distance to N(0, 1): 1.95 / sqrt(n) is passed once in a thousand; uniform is 0.06 away.

    A name that reaches no counter gives equal values to equal shapes; a place that does not, equal neighbours.
    """
    z = normals(0).sort().values
    n = len(z)
    below = torch.special.ndtr(z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - below).abs().max(), (below - steps[:-1]).abs().max())
    assert n > 400_000 and distance < 1.95 / math.sqrt(n)
    assert (z[1:] == z[:-1]).sum() < 0.001 * n


def test_the_seed_decides() -> None:
    """Same seed, same bits; of two seeds every value is another, and they do not correlate (1 / sqrt(n))."""
    a, b = normals(0), normals(1)
    full_again = full(parameters(CONFIG), initial_values(0), torch.float64)
    assert all(torch.equal(full_again[name], value) for name, value in drawn(0).items())
    assert (a == b).sum() == 0
    assert abs((a * b).mean()) < 5 / math.sqrt(len(a))
    high = full(parameters(CONFIG)[:1], initial_values(1 << 32), torch.float64)  # a seed has 64 bits
    assert not torch.equal(high["patchify.weight"], drawn(0)["patchify.weight"])


# -- a parameter that is longer than a chunk --------------------------------------------------------------------------


def philox_normal(seed: int, purpose: int, sample: int, elements: int) -> NDArray[np.float64]:
    """Philox 4x32-10 (Salmon et al., SC'11) and Box-Muller on all elements at once, in numpy."""
    block = np.arange(-(-elements // 4), dtype=np.uint64)
    word = np.uint64(0xFFFFFFFF)
    c = [block & word, np.full_like(block, sample), np.zeros_like(block), np.full_like(block, purpose)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), p1 & word,
             (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), p0 & word]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    u = [(x.astype(np.float64) + 0.5) / 2.0**32 for x in c]
    pairs: list[NDArray[np.float64]] = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        size = np.sqrt(-2 * np.log(radius))
        pairs += [size * np.cos(2 * np.pi * angle), size * np.sin(2 * np.pi * angle)]
    return np.stack(pairs, 1).reshape(-1)[:elements]


LONG = Parameter("long", (1000, 408), 1, "unit", "normal", 0.5, True, "part")  # 408,000 elements: four chunks
SEED = (3 << 32) + 5


@lru_cache(maxsize=1)
def single_draw() -> Tensor:
    return torch.from_numpy(0.5 * philox_normal(SEED, 4, zlib.crc32(b"long"), LONG.elements)).view(LONG.shape)


def written_whole() -> Tensor:
    return full((LONG,), initial_values(SEED), torch.float64)["long"]


def written_in_shards(tp: int, dp_shard: int, device: str = "cpu") -> Callable[[], Tensor]:
    """Every rank's flat shard, put together again. Chunks start anew in each."""

    def write() -> Tensor:
        units = lay_out({"unit": [LONG]}, Plan(tp=tp, dp_shard=dp_shard, dtype="float64"))
        shards: list[tuple[dict[str, int], Tensor]] = []
        for rank in range(tp * dp_shard):
            at = {"tp": rank % tp, "cp": 0, "dp_shard": rank // tp, "dp_replicate": 0}
            flat = torch.full((1, units.flat_elements), torch.nan, dtype=torch.float64, device=device)
            fill_shard(flat, units, at, initial_values(SEED))
            shards.append((at, flat.cpu()))
        return collect(shards, units)["long"]

    return write


def drawn_as_noise() -> Tensor:
    """As validation, the sampler and the showcase draw theirs."""
    number = torch.tensor([zlib.crc32(b"long")])
    return 0.5 * flow.draw_noise(SEED, torch.tensor(0), number, torch.tensor([0]), LONG.shape, Purpose.INIT)[0]


WRITTEN = {
    "whole": written_whole,
    "as noise": drawn_as_noise,
    "one rank": written_in_shards(1, 1),
    "tp=2": written_in_shards(2, 1),
    "tp=2,dp_shard=3": written_in_shards(2, 3),
    "tp=8": written_in_shards(8, 1),  # rows of 51: a counter's four elements lie on two ranks
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_a_long_parameter_written_in_chunks_is_a_single_draw(write: Callable[[], Tensor]) -> None:
    """All 441 normal parameters of the 30B are longer than a chunk; those of the tests' models are not.

    Libraries differ by a rounding of log, sin and cos: 1e-14 at most, of values below 5.
    """
    assert LONG.elements > 3 * weights._CHUNK["cpu"]
    torch.testing.assert_close(write(), single_draw(), rtol=0, atol=1e-13)


def chunk_over_the_first(flat: Tensor, parameter: Parameter, values: Values) -> None:
    """The fault that only long parameters have."""
    chunk = weights._CHUNK["cpu"]
    for start in range(0, parameter.elements, chunk):
        stop = min(start + chunk, parameter.elements)
        flat[: stop - start] = values(parameter, torch.arange(start // 4, stop // 4)).flatten()


def test_a_chunk_over_the_first_is_found() -> None:
    flat = torch.zeros(LONG.elements, dtype=torch.float64)
    chunk_over_the_first(flat, LONG, initial_values(SEED))
    assert (flat.view(LONG.shape) - single_draw()).abs().max() > 1


# -- where they are drawn ---------------------------------------------------------------------------------------------


class OnlyOn(TorchDispatchMode):
    """Refuses a tensor that is made elsewhere."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, Tensor) or leaf.device.type == self.device, f"{func} on {leaf.device}"
        return result


def elsewhere(parameter: Parameter, block: Tensor) -> Tensor:
    """The fault: drawn on the host, then copied."""
    return initial_values(SEED)(parameter, torch.zeros(block.shape, dtype=torch.int64)).to(block.device)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_values_are_drawn_on_the_device_that_holds_them(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has no values: 3 million elements a second of a host's thread are 1,600 s for the 5B's."""
    monkeypatch.setitem(weights._CHUNK, "meta", 1 << 17)
    rows = [LONG, *(replace(LONG, name=init, init=init, tp_dim=None) for init in ("zeros", "ones"))]
    units = lay_out({"unit": [row for row in rows if row.tp_dim is not None], "replicated": [*rows[1:]]}, Plan(tp=tp))
    at: dict[str, int] = dict.fromkeys(("tp", "cp", "dp_shard", "dp_replicate"), 0)
    flat = torch.empty(1, units.flat_elements, device="meta")
    for values in (initial_values(SEED), probe_values(SEED)):
        with OnlyOn("meta"):
            fill_shard(flat, units, at, values)
    with OnlyOn("meta"), pytest.raises(AssertionError, match="on cpu"):
        fill_shard(flat, units, at, elsewhere)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws_to_the_rounding_of_log_and_cos() -> None:
    """[Note: rounding]: float64 within 7 * 2**-52; float32 the same but for one in 2**25, then its neighbour."""
    block = torch.arange(1 << 20)
    zero = torch.tensor(0)
    here = normals_of_blocks(SEED, Purpose.INIT, zero, zero, block)
    there = normals_of_blocks(SEED, Purpose.INIT, zero.cuda(), zero.cuda(), block.cuda()).cpu()
    assert ((here - there).abs() <= 7 * 2.0**-52 * here.abs()).all()
    a, b = here.float(), there.float()
    assert (a != b).sum() <= 4 and (torch.nextafter(a, b) == b).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("tp", "dp_shard"), [(2, 3), (8, 1)])
def test_a_gpu_draws_the_same_under_every_plan_in_bounded_memory(tp: int, dp_shard: int) -> None:
    """Bit by bit, as on a CPU; and some 50 MB of temporaries, whatever the parameter."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = written_in_shards(1, 1, "cuda")()
    peak = torch.cuda.max_memory_allocated() - before - 8 * LONG.elements
    assert torch.equal(written_in_shards(tp, dp_shard, "cuda")(), whole)
    assert peak < 100 * weights._CHUNK["cuda"]
    torch.testing.assert_close(whole, single_draw(), rtol=0, atol=1e-13)


# -- the table at full size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_decayed_weights_by_name(name: str) -> None:
    rows = parameters(replace(preset(name), latent_conditions=(LatentCondition("low", 3),)))
    for row in rows:
        assert row.decay == bool(re.fullmatch(DECAYED, row.name)), row.name


def test_the_30b_model_starts_as_wide_as_its_rule() -> None:
    """The one place where L = 48, D = 6144 and F = 16384 meet the rule."""
    by_name = {row.name: row for row in parameters(preset("movie-gen-30b"))}
    stds = {"blocks.0.q": 0.012757759, "blocks.47.cross.kv": 0.012757759, "blocks.7.o": 0.0013020833}
    stds |= {"blocks.7.cross.o": 0.0013020833, "blocks.7.gate": 0.012757759, "blocks.7.down": 0.00079735979}
    stds |= {"text.ul2.weight": 1 / 64, "time.first": 1 / 16, "patchify.weight": 1 / 8, "position.t": 0.02}
    for name, std in stds.items():
        assert by_name[name].init == "normal" and by_name[name].std == pytest.approx(std, rel=1e-6), name
    assert sum(row.init == "normal" for row in by_name.values()) == 441
    assert min(row.elements for row in by_name.values() if row.init == "normal") > weights._CHUNK["cpu"]


def test_a_run_starts_with_the_ema_at_the_weights_and_all_else_at_zero() -> None:
    runner = StepRunner(preset("tiny"), Plan(dtype="float32"), BatchShape(1, (3, 4, 12)), Optimizer(), None)
    for name in ("master", "exp_avg", "exp_avg_sq", "ema"):
        runner.buffers[name].fill_(torch.nan)
    runner.buffers["counters"].fill_(9)
    runner.initialise(initial_values(4))
    want = full(parameters(preset("tiny")), initial_values(4), torch.float32)
    for state in ("master", "ema"):
        got = collect([(runner.coordinates, runner.buffers[state])], runner.units)
        assert all(torch.equal(got[name], value) for name, value in want.items()), state
    for state in ("exp_avg", "exp_avg_sq", "counters"):
        assert not runner.buffers[state].any(), state
