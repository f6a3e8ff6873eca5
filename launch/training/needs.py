"""What a run needs of this machine, looked at before it begins: folders that it can write, memory that it will take."""

from __future__ import annotations

from pathlib import Path

from ...data.cache.storage import is_url
from ...files import check_output_file, check_output_folder
from ...kernels.selection import Software
from ...model.forward import build_velocity
from ...model.inputs import BatchShape
from ...model.step import build_step, unit_layout
from ...parallel.passes.pipeline import prepare
from ..cluster.environment import device_here, processes_here
from ..preflight import check_device_memory, check_host_memory
from ..storage.places import check_folder, check_holds
from .checkpoint.choosing import kept_in
from .checkpoint.copies import copy_bytes, memory_copy_bytes
from .measured_rows import ROWS_FILE
from .recipe import Config
from .setting import Setting


def check_outputs(config: Config) -> None:
    """Raise CinemeshError for a folder of the run that cannot be written."""
    run = config.logging.directory
    for folder in (run, *(run / name for name in ("tensorboard", "samples"))):
        check_output_folder(folder, "logging.directory")
    check_folder(kept_in(config), "logging.checkpoints" if config.logging.checkpoints else "logging.directory")
    check_output_file(run / ROWS_FILE, "logging.directory")
    if not is_url(config.data.cache) and not config.data.versions:
        check_output_folder(Path(config.data.cache), "data.cache")


def check_training_memory(setting: Setting) -> None:
    """Raise CinemeshError when this machine, or a GPU of it, has too little memory for the steps of a run.

    Or a file system in memory is too small for copies of the states.
    """
    config = setting.config
    local, steps = processes_here(config.plan.world_size), config.schedule.steps
    gpus = device_here(config.device, local) != "cpu"
    check_host_memory((), local, steps=steps)  # before anything is built
    units = unit_layout(setting.model, config.plan)
    copies = copy_bytes(units)
    if config.logging.memory_every:
        in_memory = memory_copy_bytes(units)
        check_holds(config.logging.memory_folder, "logging.memory_every", local * in_memory)
        copies += in_memory
    steps_of = (build_step(setting.model, config.plan, each, config.optimizer) for each in setting.shapes)
    programs = [prepare(step, backend="nccl" if gpus else "gloo") for step in steps_of]
    encoders = setting.encoder_bytes
    beside = copies + (0 if gpus else encoders)
    check_host_memory(programs, local, steps=steps, beside_bytes=beside, on_gpus=gpus)
    if gpus:
        check_device_memory(programs, Software.here(config.kernels, config.deterministic), encoders)


def check_sampling_memory(setting: Setting) -> None:
    """Raise CinemeshError when CPU processes will not find memory for a clip. On GPUs, the ranks find out."""
    plan, latent = setting.config.plan, setting.config.sampled.latent(setting.encoding.codec)
    if device_here(setting.config.device, local := processes_here(plan.world_size)) == "cpu":
        velocity = build_velocity(setting.model, plan, BatchShape(1, latent))
        check_host_memory([prepare(velocity, backend="gloo")], local)
