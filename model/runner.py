"""One rank of a training step: program, executor and tensors, from a model, a plan and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import CinemeshError
from ..kernels.ops import MOST_IDS
from ..kernels.reference import Kernel
from ..parallel.ir.fields import AXES
from ..parallel.ir.layout import BATCH, Axes, Placement
from ..parallel.ir.marks import MARK_SLOT
from ..parallel.ir.nccl_stack import Capture
from ..parallel.ir.plan import Plan
from ..parallel.ir.program import Program
from ..parallel.ir.records import Space
from ..parallel.ir.units import nested_index
from ..parallel.layers.sharded import FROZEN_STATE
from ..parallel.passes.arena import Arena
from ..parallel.passes.device_memory import bytes_beside
from ..parallel.runtime.comm import Communicator, first_of, nccl_stack
from ..parallel.runtime.executor import Executor
from ..parallel.runtime.frozen import Frozen
from ..parallel.runtime.graph import Graph, GraphPool, refuse
from ..parallel.runtime.mesh import Mesh, backend_of, coordinates
from ..parallel.runtime.watchdog import Heartbeat, vote
from .blueprint import Blueprint
from .config import CAPTION_DROPOUT, ModelConfig, latent_text
from .inputs import IDS, LATENTS, PLACES, BatchShape, InputSpec
from .step import Optimizer, unit_layout
from .weights import Values, fill_shard

Batch = Mapping[str, Tensor]  # the samples of a micro-batch, by the name of the input
NOT_BATCH = tuple(axis for axis in AXES if axis not in BATCH)


class StepRunner:
    """Holds the flat states of this rank and runs steps on them.

    ``mesh`` is None on one process. ``program`` may be given (tests alter one after it was built). ``beside`` is a
    runner of the same model and plan on other shapes: states, arena and graph pool are its own.
    """

    def __init__(  # noqa: PLR0913  a step is five things; the rest are choices and doors with defaults
        self,
        config: ModelConfig,
        plan: Plan,
        batch: BatchShape,
        optimizer: Optimizer,
        mesh: Mesh | None,
        *,
        seed: int = 0,
        caption_dropout: float = CAPTION_DROPOUT,
        device: str = "cpu",
        program: Program | None = None,
        kernels: dict[str, Kernel] | None = None,
        comm: Communicator | None = None,
        beside: StepRunner | None = None,
        slot: Tensor | None = None,
        placement: Mapping[Space, Arena] | None = None,
    ) -> None:
        """``slot``: one number in host memory, pinned for a GPU, into which the step writes how far it is.

        ``placement``: where the temporaries of ``program`` lie, if that is known.
        Raises CinemeshError when a CUDA device has too little memory for the step.
        """
        self.config, self.plan, self.batch, self.mesh = config, plan, batch, mesh
        self.units = unit_layout(config, plan)
        if program is None:
            facts = (optimizer, seed, caption_dropout, backend_of(device), slot is not None)
            step = Blueprint(config, plan, batch, *facts).build()
            program, placement = step.program, step.arenas
        self.program = program
        self.coordinates = mesh.coordinates if mesh else coordinates(plan, 0)
        if beside is not None:
            comm = beside.comm
        self.comm = comm or (Communicator(mesh) if mesh else None)
        self.graphs = 1 if beside is None else beside.graphs + 1  # captured steps to come, with those beside
        shared = {} if beside is None else shared_storages(program, beside)
        if slot is not None:
            shared[MARK_SLOT] = slot
        arenas = (None, None) if beside is None else (beside.executor.arena, beside.executor.host.arena)
        to_come = bytes_beside(plan, 0, graphs=self.graphs)  # its context is there
        where = (self.coordinates, self.comm, device)
        self.executor = Executor(program, *where, kernels, shared, *arenas, to_come, placement)
        self.buffers = named_buffers(self.executor)
        self.replay: Frozen | Graph | None = None
        self.pool: GraphPool | None = None if beside is None else beside.pool
        self._heartbeat: Heartbeat | None = None
        self._replays = 0

    def initialise(self, values: Values, *, frozen: bool = True) -> None:
        """Master weights by name, and ``frozen`` ones; EMA equal to the master ones, moments and counters zero."""
        fill_shard(self.buffers["master"], self.units, self.coordinates, values)
        if self.units.frozen and frozen:
            fill_shard(self.buffers[FROZEN_STATE], self.units.of_frozen, self.coordinates, values)
        self.buffers["ema"].copy_(self.buffers["master"])
        for name in ("exp_avg", "exp_avg_sq", "counters"):
            self.buffers[name].zero_()

    def load(self, micro_batch: int, batch: Batch) -> None:
        """This data rank's samples, by the names of ``Program.inputs``; not yet split over tp."""
        latent = tuple(batch[LATENTS].shape[2:])
        if latent != self.batch.latent:
            raise CinemeshError(
                f"a batch of latents {latent_text(latent)} for a step that was built for "
                f"{latent_text(self.batch.latent)}",
                remedy="name its shape among the buckets when the run starts",
            )
        wanted = [given.name for given in self.program.inputs if given.micro_batch == micro_batch]
        if missing := [name for name in wanted if name not in batch]:
            raise CinemeshError(
                f"a batch without {', '.join(missing)}: model {self.config.name} takes {', '.join(wanted)}",
                remedy="give it data that hold them, or train a model without them",
            )
        size = self.samples
        if PLACES in wanted and not 0 <= batch[PLACES].min() <= batch[PLACES].max() < size:
            raise CinemeshError(
                f"places {batch[PLACES].tolist()} in a step's global batch of {size} samples",
                remedy="a place is a sample's index there, over all micro-batches and data ranks",
            )
        if IDS in wanted and not 0 <= batch[IDS].min() <= batch[IDS].max() < MOST_IDS:
            raise CinemeshError(
                f"sample ids {batch[IDS].tolist()}, and one is a word of 32 bits of the counter that its draws have",
                remedy=f"number samples from 0 to {MOST_IDS - 1}",
            )
        load_inputs(self.executor, batch, micro_batch)

    def step(self, lr: float, watch: Callable[[int], None] | None = None, *, replays: bool = True) -> None:
        """One optimizer update on what was loaded. Read ``loss`` and ``gradient_norm`` afterwards.

        Replays when something was captured and ``replays``. ``watch`` is called after every record, which a graph does
        not tell.
        """
        self.buffers["lr"].fill_(lr)
        if replays and isinstance(self.replay, Graph):
            self.replay.run()
            self._expect_end()
        else:
            (self.replay if isinstance(self.replay, Frozen) else self.executor).run(watch)

    @property
    def loss(self) -> Tensor:
        """Of the whole global batch, on every rank; a device scalar, a copy: the next step overwrites its own."""
        return self.buffers["loss"].clone()

    @property
    def gradient_norm(self) -> Tensor:
        """Before clipping, on every rank; a device scalar, a copy."""
        return self.buffers["gradient_norm"].clone()

    # -- replay -------------------------------------------------------------------------------------------------

    def capture(self, mode: Capture = "auto") -> str | None:
        """From now on steps replay: frozen calls on a CPU, a CUDA Graph on a GPU. Collective; weights do not change.

        All ranks replay or none does: the answer is why none does (the first rank's reason, with the op), else None.
        ``auto`` does not where NCCL would run captured collectives one after another, and others side by side.
        Raises CinemeshError for that reason when ``mode`` is ``required``.
        """
        if mode == "off":
            return None
        if self.executor.device != "cpu":
            self.pool = self.pool or GraphPool(self.executor.device)
            if self.mesh is not None and self.close not in self.mesh.before_close:
                self.mesh.before_close.append(self.close)
        with self._changing_nothing():
            made, failure = captured(self.executor, self.pool, self.mesh, mode)
        if failure is None:
            self.replay = made
        return failure

    @contextmanager
    def _changing_nothing(self) -> Iterator[None]:
        """Steps inside are skipped updates, on every rank: their samples are NaN. The step counter is put back."""
        counters = self.buffers["counters"].clone()
        for given in self.program.inputs:
            if given.name == LATENTS:
                self.executor.buffers[given.buffer].fill_(torch.nan)
        try:
            yield
        finally:
            self.buffers["counters"].copy_(counters)

    def _expect_end(self) -> None:
        self._heartbeat = self._heartbeat or Heartbeat(device=self.executor.device)
        end = torch.cuda.Event()
        end.record()
        self._replays += 1
        self._heartbeat.expect(self._replays, end.query)

    def close(self) -> None:
        """Give back what was captured; the mesh calls it before its process groups end."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
        if self.pool is not None:
            self.pool.close()
        self.replay = None

    @property
    def samples(self) -> int:
        """Of a step, on all ranks and in all micro-batches."""
        return self.batch.samples * self.plan.data_ranks * self.plan.micro_batches

    @property
    def steps_done(self) -> int:
        return int(self.buffers["counters"][0])

    @property
    def updates_done(self) -> int:
        """Steps less those whose update was skipped."""
        return int(self.buffers["counters"][1])


def captured(
    executor: Executor, pool: GraphPool | None, mesh: Mesh | None, mode: Capture
) -> tuple[Frozen | Graph | None, str | None]:
    """What replays a program, a CUDA Graph of ``pool`` or without one frozen calls; or why nothing does. Collective.

    The answers are as of :meth:`StepRunner.capture`, whose error this raises.
    """
    if pool is None:
        made = Frozen(executor)
        made.record()
        failure = made.hazards[0] if made.hazards else None
    else:
        made, failure = capture_graph(executor, pool, mesh, mode)
    failure = vote(failure, mesh)
    if failure is not None and mode == "required":
        raise refuse(failure)
    return made, failure


def capture_graph(
    executor: Executor, pool: GraphPool, mesh: Mesh | None, mode: Capture
) -> tuple[Graph | None, str | None]:
    """As ``GraphPool.capture``, after steps that warm up; or why NCCL would lose by it."""
    if mesh is not None:  # one rank's driver decides for all
        here = nccl_stack()
        if lost := first_of(None if here.captures(mode) else here.serial(captured=True)):
            return None, lost
    pool.warm_up(executor)
    return pool.capture(executor)


def step_buffers(program: Program) -> dict[str, str]:
    """What a step has whatever its shape, by the names that are used outside: states, and the learning rate."""
    return program.states | {given.name: given.buffer for given in program.inputs if given.micro_batch is None}


def named_buffers(executor: Executor) -> dict[str, Tensor]:
    """The tensors of :func:`step_buffers`."""
    return {name: executor.buffers[buffer] for name, buffer in step_buffers(executor.program).items()}


def shared_storages(program: Program, other: StepRunner) -> dict[str, Tensor]:
    """Those of another runner of the same model and plan, as the storages of ``program``."""
    return {buffer: other.buffers[name] for name, buffer in step_buffers(program).items()}


def load_inputs(executor: Executor, batch: Batch, micro_batch: int | None = None) -> None:
    """Fill the inputs of a micro-batch that ``batch`` has, each with this rank's part of its data rank's samples."""
    program = executor.program
    for given in program.inputs:
        if given.micro_batch == micro_batch and given.name in batch:
            placement, position = program.buffers[given.buffer].placement, executor.coordinates
            executor.load(given.buffer, _part(batch[given.name], placement, program.plan, position, NOT_BATCH))


def data_share(batch: Batch, inputs: Iterable[InputSpec], plan: Plan, position: dict[str, int]) -> Batch:
    """A data rank's samples of a global micro-batch."""
    return {
        given.name: _part(batch[given.name], given.placement, plan, position, BATCH)
        for given in inputs
        if given.name in batch
    }


def _part(value: Tensor, placement: Placement, plan: Plan, position: dict[str, int], over: Axes) -> Tensor:
    """A rank's part of ``value`` along the axes ``over``."""
    for dim, axes in enumerate(placement.dims):
        split = tuple(axis for axis in axes if axis in over)
        value = value.chunk(plan.size(split), dim)[nested_index(plan, split, position)] if split else value
    return value
