"""Options that several commands share (torch-free)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from ..parallel.ir.fields import MOST_RANKS, NO_CLUSTER, Degrees, Memory, Overlap, Streams
from ..parallel.ir.knobs import knobs
from ..ranges import BATCH_RANGE, PROCESSES_RANGE, Range, integers, reals

GPUS_RANGE = integers(1, MOST_RANKS, NO_CLUSTER, "GPUs")
SERVERS_RANGE = integers(1, MOST_RANKS, NO_CLUSTER, "servers")
HEADROOM_RANGE = reals(0.0, 1000.0, "no GPU has more memory", "GB")
SHOWN_RANGE = integers(1, 10_000, "no search ranks more", "plans")
TRIED_RANGE = integers(1, 1000, "each is a step of a model on CPU processes", "steps")
SECONDS_RANGE = reals(1.0, 1e6, "no GPU is tuned for longer", "s")
HEAD_DIM_RANGE = integers(8, 256, "no attention kernel takes more", "channels of a head")
SPARES_RANGE = integers(0, MOST_RANKS, NO_CLUSTER, "nodes")
PRICE_RANGE = reals(0.0, 1e6, "no GPU costs more", "a GPU hour")
TEXT_RANGE = integers(1, 2**20, "no prompts are longer", "tokens")
FILE_RANGE = reals(0.001, 1e6, "no file system takes larger ones", "GB")


def bounds(allowed: Range) -> dict[str, Any]:
    """Of an option's number, as typer takes them."""
    return {"min": allowed.least, "max": allowed.most}


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML recipe, for example configs/quickstart.yaml.")]
PLAN_HELP = (
    "Fields of the plan, for example tp=2,cp=2,dp_shard=2; one left out keeps its default, a degree 1. "
    + " ".join(f"{group.__name__}: {', '.join(knobs(group))}." for group in (Degrees, Memory, Overlap, Streams))
    + " Or a YAML file that holds a plan, as plan --out writes it."
)
TRIED = ", ".join(  # what plan --tune tries, from the plan's own table: "prefetch 2"
    f"{name} {' '.join(knob.write(value) for value in knob.tries)}"
    for name, knob in (knobs(Overlap) | knobs(Streams)).items()
    if knob.tries
)
PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help=PLAN_HELP)]
PlanText = Annotated[str, typer.Option("--plan", metavar="PLAN", help=PLAN_HELP)]
RecipePlan = Annotated[
    str | None,
    typer.Option(
        "--plan", metavar="PLAN", help="In place of the recipe's: a file that plan --out wrote, fields, auto."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one value of the recipe, for example --set optimizer.lr=1e-3; may be repeated.",
    ),
]
LocalProcesses = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        **bounds(PROCESSES_RANGE),
        help="Start this many processes on this machine. Leave it out under torchrun.",
    ),
]
Device = Literal["auto", "cpu", "cuda"]
DEVICE_HELP = "cpu, cuda (a GPU for each process), or auto: cuda where a process sees a GPU, else cpu, and it says so."
OnDevice = Annotated[Device, typer.Option("--device", help=DEVICE_HELP)]
RecipeDevice = Annotated[Device | None, typer.Option("--device", help=f"{DEVICE_HELP} Default: the recipe's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# What a plan is predicted on.
MODEL_HELP = "A preset, for example movie-gen-30b, or a .yaml file of a model's fields (docs/cost_model.md)."
ModelName = Annotated[str, typer.Option("--model", metavar="MODEL", help=MODEL_HELP)]
DEFAULT_MODEL, DEFAULT_CLUSTER, DEFAULT_DTYPE = "movie-gen-30b", "grand-teton-h100", "bf16"
AskedModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help=f"{MODEL_HELP} Default: the recipe's, else {DEFAULT_MODEL}."),
]
AskedCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="CLUSTER",
        help=f"By name, or a file that ends in .yaml. Default: the recipe's, else {DEFAULT_CLUSTER}.",
    ),
]
Servers = Annotated[
    int | None,
    typer.Option(
        "--servers", **bounds(SERVERS_RANGE), help="Servers of the cluster, in place of as many as its file says."
    ),
]
Packages = Annotated[
    str | None,
    typer.Option(
        "--packages",
        metavar="NAMES",
        help="Installed beside torch and Triton, for the kernels that they bring: fa3, or fa2,fa4,... Default: none, "
        "with a recipe as a run of it would have.",
    ),
]
Headroom = Annotated[
    float,
    typer.Option(
        "--headroom",
        metavar="GB",
        **bounds(HEADROOM_RANGE),
        help="Of a GPU's memory, left free. None by default: buffers are exact, and what else takes memory is counted.",
    ),
]
Latents = Annotated[
    list[str] | None,
    typer.Option(
        "--latent",
        metavar="TxHxW[:SHARE]",
        help="Sample shape, and its share of the steps; may be repeated. Default: the recipe's, else the usual one.",
    ),
]
LatentOption = Annotated[
    str | None,
    typer.Option(
        "--latent",
        metavar="TxHxW",
        help="Sample shape: latent frames, height, width. Default: a recipe's largest, else the model's usual one.",
    ),
]
GlobalBatch = Annotated[
    int | None,
    typer.Option(
        "--global-batch", **bounds(BATCH_RANGE), help="Samples of a step. Default: the recipe's, else left to the plan."
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        **bounds(BATCH_RANGE),
        help="Samples of one data rank, where no global batch is given. Default: plan searches, others take 1.",
    ),
]
Encoders = Annotated[
    bool,
    typer.Option("--encoders", help="Text encoders run in the loop: the recipe's, if it says so, or the paper's."),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="CONFIG", help="YAML recipe, for what is left out: model, latent, batch, cluster, packages."
    ),
]


@dataclass(frozen=True, kw_only=True)
class On:
    """What plans are predicted on. None: left out."""

    model: AskedModel = None
    cluster: AskedCluster = None
    servers: Servers = None
    packages: Packages = None
    headroom: Headroom = 0.0
    global_batch: GlobalBatch = None
    samples: SamplesOption = None
    encoders: Encoders = False


@dataclass(frozen=True, kw_only=True)
class Asked(On):
    """What given plans are predicted on, one sample shape."""

    latent: LatentOption = None
    recipe: RecipeOption = None

    @property
    def latents(self) -> list[str]:
        return [] if self.latent is None else [self.latent]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a run is put on nodes. None: left out."""

    per_node: Annotated[
        int | None,
        typer.Option(
            "--per-node",
            **bounds(PROCESSES_RANGE),
            help="Ranks of a node. Default: GPUs of a server of the recipe's cluster; local: half of all.",
        ),
    ] = None
    interface: Annotated[
        str | None,
        typer.Option("--interface", metavar="NAME", help="Network that joins the hosts, for example eth0."),
    ] = None
    spares: Annotated[
        int | None,
        typer.Option(
            "--spares", **bounds(SPARES_RANGE), help="slurm: nodes that wait for another to fail. Default: none."
        ),
    ] = None
    time: Annotated[
        str | None, typer.Option("--time", metavar="D-HH:MM:SS", help="slurm: time limit. Default: 24 hours.")
    ] = None
    partition: Annotated[str | None, typer.Option("--partition", help="slurm: where it queues.")] = None
    account: Annotated[str | None, typer.Option("--account", help="slurm: who pays.")] = None
    container: Annotated[
        str | None, typer.Option("--container", metavar="IMAGE", help="slurm: run in it, by pyxis.")
    ] = None
    image: Annotated[str | None, typer.Option("--image", help="kubernetes: a container image with cinemesh.")] = None
    kind: Annotated[
        Literal["TrainJob", "JobSet"] | None,
        typer.Option("--kind", help="kubernetes: of Kubeflow Trainer v2, the default, or of JobSet alone."),
    ] = None
    claim: Annotated[
        str | None, typer.Option("--claim", metavar="NAME", help="kubernetes: volume claim to run in, shared.")
    ] = None
    mount: Annotated[
        str | None, typer.Option("--mount", metavar="DIR", help="kubernetes: where it is mounted: /workspace.")
    ] = None
    rdma: Annotated[
        str | None, typer.Option("--rdma", metavar="NAME", help="kubernetes: resource of a fast NIC: rdma/ib.")
    ] = None
    topology: Annotated[
        str | None,
        typer.Option("--topology", metavar="LABEL", help="kubernetes: of nodes that stand close together: their zone."),
    ] = None


def taking(record: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of which one argument is such a record: in its place stands an option for each of the fields."""

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        name = next(name for name, kind in get_type_hints(command).items() if kind is record)
        hints = get_type_hints(record, include_extras=True)

        def called(**given: Any) -> None:
            options = {f.name: given.pop(f.name) for f in fields(record)}
            command(**given, **{name: record(**options)})

        taken: list[inspect.Parameter] = []
        for said in inspect.signature(command).parameters.values():
            if said.name == name:
                taken += (inspect.Parameter(f.name, said.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
                          for f in fields(record))  # fmt: skip
            else:
                taken.append(said.replace(kind=said.KEYWORD_ONLY))
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]  # typer reads it
        called.__annotations__ = {said.name: said.annotation for said in taken}
        return called

    return with_options
