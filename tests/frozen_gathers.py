"""What a turn of frozen layers beside a program must run: told from their sizes, to be held against a ledger."""

from cinemesh.parallel.ir.communicators import communicator_name
from cinemesh.parallel.ir.frozen_layers import GATHERS, FrozenLayers, sharing_ranks
from cinemesh.parallel.ir.layout import FSDP
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import lane_name
from cinemesh.parallel.runtime.ledger import Entry


def expected_gathers(layers: FrozenLayers, plan: Plan) -> list[Entry]:
    """Of one turn, between two steps; nothing where one rank holds all."""
    ranks, queue = sharing_ranks(plan), communicator_name(FSDP, GATHERS)
    sizes = [layers.gathered_bytes(unit, ranks) for unit in range(len(layers.units))]
    return [Entry(GATHERS, lane_name(FSDP), queue, size) for size in sizes] if ranks > 1 else []
