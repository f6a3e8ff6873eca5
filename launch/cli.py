"""The ``cinemesh`` command, put together from its doors, and what becomes of an error (torch-free).

Each command imports its work when it is called, so ``--help`` answers at once and planning commands
never load torch.
"""

import errno
import platform
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..documents import quoted
from ..errors import CinemeshError
from ..interrupt import interrupted_in_a_line
from .doors.codec import codec
from .doors.curate import curation
from .doors.data import data
from .doors.judge import judge
from .doors.machines import machines
from .doors.pick import pick
from .doors.plans import plans
from .doors.proofs import proofs
from .doors.rewrite import rewrite
from .doors.runs import runs
from .doors.tae import tae
from .doors.weights import weights
from .examples import PAPER
from .terminal import show_what_it_can

WrongUsage: Any = typer.BadParameter.__base__  # click's UsageError: typer brings its own click, or needs it
LONGEST = 1000  # letters of what is said of a wrong word
USER_ERROR = 2  # exit code of a mistake that the message says how to mend; also click's code for wrong usage

EXAMPLES = f"""\b
See what there is:      cinemesh list
                        cinemesh program --model movie-gen-30b --plan {PAPER}
Choose a plan:          cinemesh plan --gpus 6144 --explain
                        cinemesh compare {PAPER} tp=2,cp=4,dp_shard=768,recompute=o:lse
Prove a plan:           cinemesh verify --plan tp=2,cp=2,dp_shard=2
                        cinemesh lint --model movie-gen-30b --plan {PAPER}
See a step run:         cinemesh trace --plan tp=2 --out trace.json
Train on this machine:  cinemesh train configs/quickstart.yaml --nproc 2
Train in stages:        cinemesh stages configs/chain.yaml --nproc 2
Look at a machine:      cinemesh doctor
Train on a cluster:     cinemesh launch slurm CONFIG --out run.sbatch
Average models:         cinemesh average DIR DIR --out runs/mean
Make a training set:    cinemesh curate configs/curation/quickstart.yaml --out curated
Make a clip:            cinemesh sample configs/quickstart.yaml --prompt "a red car"
Make it larger:         cinemesh upsample runs/upsampler sample.mp4
Let people compare:     cinemesh judge make runs/new runs/old --out judged
Rewrite prompts:        cinemesh rewrite make configs/rewriting.yaml --prompt "a red car"

Every command has --help, with examples. Bytes are of one GPU, 1 GB is 1e9 of them; times are seconds.
Exit codes: 0 done; 1 a check did not hold; 2 wrong input, with a line that says how to mend it;
130 interrupted.
"""


class Commands(TyperGroup):
    """All of them. Words of thousands of letters are wrong input, whichever command they are given to."""

    def invoke(self, ctx: Any) -> Any:
        """Raises CinemeshError for a name that is too long for a file."""
        try:
            return super().invoke(ctx)
        except WrongUsage as error:  # it shows the word whole
            if len(error.message) > LONGEST:
                error.message = f"{error.message[:LONGEST]} ..."
            raise
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            name = str(error.filename)
            raise CinemeshError(
                f"{quoted(name)}: no file has a name of {len(name):,} characters", remedy="name one that is there"
            ) from None


app = typer.Typer(
    name="cinemesh",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is a bug: show it plainly
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for door in (
    runs,
    machines,
    weights,
    data,
    curation,
    pick,
    codec,
    tae,
    judge,
    rewrite,
    plans,
    proofs,
):  # as --help lists
    app.add_typer(door)


def say_version(asked: bool) -> None:
    """Print versions, and end; packages are asked for theirs and not loaded."""
    if not asked:
        return
    from ..kernels.packages import version_of

    print(f"cinemesh {version_of('cinemesh') or 'not installed'}, python {platform.python_version()}", end="")
    for package in ("torch", "triton"):
        if there := version_of(package):
            print(f", {package} {there}", end="")
    print()
    raise typer.Exit


@app.callback(epilog=EXAMPLES)
def cinemesh(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=say_version, help="Print versions: also of python, torch, triton."
        ),
    ] = False,
) -> None:
    """Train the Movie Gen Video transformer on many GPUs.

    A training step is one program, written by hand: these commands show it, prove it and run it.
    """


def main() -> None:
    """Run the command line; a ``CinemeshError`` becomes one line on stderr and exit code 2, a Ctrl-C one and 130."""
    show_what_it_can()
    with interrupted_in_a_line():
        try:
            app()
        except CinemeshError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
