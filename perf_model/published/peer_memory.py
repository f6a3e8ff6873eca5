"""Peak memory of a peer's step: states, gathered units, kept activations, loss (torch-free).

Kept activations follow Korthikanti et al. 2022, section 4.1, tensor by tensor: what each record leaves for backward,
and whether tp splits it. Fragmentation and the context count only where a run meets the device (out of memory).
"""

from __future__ import annotations

from ..clusters.cluster import Cluster
from .peers import FLOAT, HALF, Run

# Bytes a parameter on a rank, (of its share of the states, whole): fp32 master, two moments and gradient are sharded;
# zero1 keeps weights and gradients whole in half precision; ddp keeps fp16 weights and fp32 gradient, master, moments.
STATES = {"fsdp": (16, 0), "grad_op": (16, 0), "zero1": (12, 4), "ddp": (0, 18)}
GATHERED_UNITS = 3  # in use, prefetched, and the buffer that a gather is copied out of
UNIT_GRADIENT = HALF + FLOAT  # of the unit in backward, and its copy to be reduced
# Bytes an element of the logits at the peak: half precision, fp32, log-softmax, its gradient; fused: logits and
# gradient; in place: fp32 logits become the probabilities and their gradient; put together: the parts beside the whole
LOGITS = {
    "fused": 2 * HALF,
    "in place": HALF + 2 * FLOAT,
    "unfused": HALF + 3 * FLOAT,
    "vocabulary parallel": HALF + 4 * FLOAT,
    "put together": 2 * HALF + 3 * FLOAT,
}
FRAGMENTED = 1.10  # what an allocator without expandable segments reserves, over what is in use


def kept(run: Run) -> dict[str, float]:
    """Bytes that each record of one block leaves for backward when nothing runs again, of one rank."""
    m, stack = run.model, run.stack
    t, tp = run.tokens, run.tp
    gathered = t if stack.keeps_gathered or not run.sp else t / tp
    local = t / tp if run.sp else t  # sequence parallel: token-local tensors are split
    heads = m.heads * m.head_dim
    unfused = stack.attention == "unfused"
    scores = (5 if m.dropout else 2) * m.heads * m.seq if unfused else FLOAT * m.heads
    silu = HALF * m.ffn if m.gated and "activation" not in stack.fused else 0
    mask = m.width if m.dropout else 0
    return {
        "input": HALF * m.width * local,
        "norm1": HALF * m.width * gathered,
        "q": HALF * heads * t / tp,
        "k": HALF * m.kv_heads * m.head_dim * t / tp,
        "v": HALF * m.kv_heads * m.head_dim * t / tp,
        "core": scores * t / tp,
        "o": HALF * heads * t / tp,
        "residual1": (HALF * m.width + mask) * local,
        "norm2": HALF * m.width * gathered,
        "ffn_in": HALF * m.ffn * t / tp,
        "up": HALF * m.ffn * t / tp if m.gated else 0.0,
        "activation": (HALF * m.ffn + silu) * t / tp,
        "residual2": mask * local,
    }


def block_bytes(run: Run) -> float:
    """What one block keeps, after what runs again is left out."""
    tensors, names = kept(run), run.recomputed
    whole = sum(tensors.values())
    if not names:
        return whole
    if "ffn_in" in names and "q" in names:  # full
        few = tensors["input"]
    elif names == {"core"}:
        few = whole - tensors["core"]
    elif "ffn_in" in names:  # the projections stay
        few = tensors["input"] + tensors["q"] + tensors["k"] + tensors["v"]
    else:  # selective op: products 1, 3, 5, 7 and attention
        few = sum(tensors[name] for name in ("input", "q", "v", "core", "o", "ffn_in"))
        few += HALF * run.model.width * run.tokens / run.tp
    return run.recomputed_share * few + (1.0 - run.recomputed_share) * whole


def activation_bytes(run: Run) -> float:
    """Of all blocks, at the end of forward."""
    return run.model.layers * block_bytes(run)


def state_bytes(run: Run) -> float:
    """Weights, gradients, master weights and moments."""
    m = run.model
    split, whole = STATES[run.stack.shard]
    parameters = (m.layers * m.block_parameters + m.end_parameters) / run.tp
    return parameters * (split / run.shard + whole)


def transient_bytes(run: Run) -> float:
    """Gathered units and a unit's gradient; logits; the block that runs again."""
    m, stack = run.model, run.stack
    size = 0.0
    if stack.shard in ("fsdp", "grad_op"):
        block, end = m.block_parameters / run.tp, m.end_parameters / run.tp
        units = m.layers if stack.shard == "grad_op" else GATHERED_UNITS
        size += HALF * (units * block + end) + UNIT_GRADIENT * block
    whole = stack.whole_vocab and run.tp > 1
    logits = LOGITS[_loss_form(run)] * run.tokens * m.vocab / (1 if whole else run.tp)
    again = sum(kept(run).values()) - block_bytes(run) if run.recomputed else 0.0
    gathered = 2 * HALF * run.tokens * m.width if run.sp else 0.0  # the head's input and its gradient
    return size + max(logits + gathered, again)


def _loss_form(run: Run) -> str:
    if "loss" in run.stack.fused:
        return "fused"
    if "loss_in_place" in run.stack.fused:
        return "in place"
    if run.tp == 1:
        return "unfused"
    return "put together" if run.stack.whole_vocab else "vocabulary parallel"


def peak_bytes(run: Run) -> float:
    """What the allocator holds at the peak."""
    return state_bytes(run) + activation_bytes(run) + transient_bytes(run)


def fits(run: Run, cluster: Cluster) -> bool:
    """Whether the step fits beside the context and the communicators' buffers."""
    memory = cluster.memory
    groups = sum(1 for size in (run.tp, run.cp, run.shard, run.replicas) if size > 1)
    return (
        FRAGMENTED * peak_bytes(run) + memory.context_bytes + groups * memory.communicator_bytes <= memory.usable_bytes
    )
