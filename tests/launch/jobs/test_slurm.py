"""The script for sbatch, run by bash with Slurm's commands played: hosts, ranks, failures, signals, quoting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import recipe
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.jobs.job import make_job, placement
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import coordinates

pytestmark = pytest.mark.usefixtures("one_process")

# srun runs the words behind its options once a node of --nodelist, one after the other.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --nodelist=*) list=${1#--nodelist=};; esac
  shift
done
id=0
for node in ${list//,/ }; do
  SLURMD_NODENAME=$node SLURM_NODEID=$id "$@" || code=$?
  id=$((id + 1))
done
exit "${code:-0}"
"""
SINFO = "#!/bin/bash\nprintf '%s\\n' $UP\n"
SCONTROL = """#!/bin/bash
case $1 in
  show) printf '%s\\n' $ALLOCATED ;;
  --oneliner) echo "PreemptTime=None" ;;
  requeue) echo "requeued $2" >> "$SAID"; kill -KILL "$PPID" ;;
esac
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >> "$SAID"\ntouch "$SAID.stop"\n'
# In the place of python: the doctor fails on nodes named BAD; ranks say what they were given, and fail FAIL times.
PYTHON = """#!/bin/bash
if [[ $* == *" doctor "* ]]; then
  [[ " $BAD " != *" $SLURMD_NODENAME "* ]]
  exit
fi
printf '%s\\0' "$SLURMD_NODENAME" "$@" >> "$SAID.ranks"
if [[ -n $SIGNAL ]]; then
  kill -"$SIGNAL" "$BATCH"
  until [[ -e $SAID.stop ]]; do sleep 0.05; done
  exit 1
fi
times=$(cat "$SAID.fail" 2> /dev/null || echo 0)
echo $((times + 1)) > "$SAID.fail"
exit $((times < FAIL))
"""


class Played:
    """A Slurm of stubs in ``folder``, and the script of a recipe there."""

    def __init__(self, folder: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.folder = folder
        for tool, text in (("srun", SRUN), ("sinfo", SINFO), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            self._tool(folder / "bin" / tool, text)
        self._tool(folder / "python", PYTHON)
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        work = folder / "work"
        work.mkdir()
        monkeypatch.chdir(work)
        self.recipe = work / name
        self.recipe.write_text(yaml.safe_dump(values))

    def _tool(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def script(self, *options: str) -> str:
        done = CliRunner().invoke(app, ["launch", "slurm", str(self.recipe), *options])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    def run(self, text: str, allocated: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = self.folder / "run.sbatch"
        path.write_text(text.replace("sleep 600", "sleep 0").replace("stop() {", "export BATCH=$$\nstop() {", 1))
        said = {"SAID": str(self.folder / "said"), "ALLOCATED": allocated, "UP": allocated}
        said |= {"FAIL": "0", "BAD": "", "SIGNAL": ""}
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}
        env = os.environ | said | slurm | variables | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True, check=False, timeout=60)

    @property
    def ranks(self) -> list[list[str]]:
        """What every agent was started with, its node first."""
        words = (self.folder / "said.ranks").read_text().split("\0")[:-1]
        starts = [i for i, word in enumerate(words) if word == "-m" and words[i + 1] == "torch.distributed.run"]
        return [words[a - 1 : b - 1] for a, b in zip(starts, [*starts[1:], len(words) + 1], strict=True)]

    @property
    def said(self) -> str:
        path = self.folder / "said"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def played(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(tmp_path, recipe(clips, tmp_path, dp_shard=2), monkeypatch, "it's $(touch a) `touch b`; touch c.yaml")


TWO = ("--per-node", "1", "--spares", "1")


def test_nothing_of_a_recipe_reaches_a_shell(played: Played) -> None:
    """A quote, a substitution or an end of a command in a name, a folder or a --set would run."""
    odd = "logging.directory=$(touch d)';touch e;'`touch f`$HOME"
    text = played.script(*TWO, "--set", odd)
    done = played.run(text, "n1 n2 n3")
    assert done.returncode == 0, done.stderr
    here = played.folder / "work"
    assert [path.name for path in here.iterdir()] == [played.recipe.name]
    for node, given in zip(("n1", "n2"), played.ranks, strict=True):
        train = ["-m", "cinemesh.launch.train", str(played.recipe), "--plan", "dp_shard=2,dtype=float32,recompute=none"]
        assert given[0] == node and given[-len(train) - 2 :] == [*train, "--set", odd]


@pytest.mark.parametrize("option", ["--partition", "--account", "--time", "--interface"])
def test_what_a_directive_cannot_hold_is_refused(played: Played, option: str) -> None:
    """A directive is no shell: there a line end or a blank would be another option."""
    for bad in ("a b", "a\n#SBATCH --uid=0", "$(x)", "-x", ""):
        with pytest.raises(CinemeshError, match=option):
            played.script(*TWO, option, bad)
    with pytest.raises(CinemeshError, match="--set"):
        played.script(*TWO, "--set", "kernels.all=a\nb")


@pytest.mark.parametrize(
    ("bad", "up", "hosts"), [("", "n1 n2 n3", "n1 n2"), ("n1", "n1 n2 n3", "n2 n3"), ("", "n3 n1", "n1 n3")]
)
def test_ranks_lie_on_healthy_nodes_in_the_order_of_the_allocation(
    played: Played, bad: str, up: str, hosts: str
) -> None:
    """The printed map is what the agents are told: a spare takes the place of a node that is unfit or gone."""
    done = played.run(played.script(*TWO), "n1 n2 n3", BAD=bad, UP=up)
    assert done.returncode == 0, done.stderr
    first, second = hosts.split()
    for rank, host in enumerate((first, second)):
        assert f"node {rank}: {host}: ranks {rank} to {rank}\n" in done.stdout
    assert "dp_shard(2): ranks 1 apart, across nodes, one rank on each\n" in done.stdout
    for number, (given, host) in enumerate(zip(played.ranks, (first, second), strict=True)):
        wanted = {"--node-rank": str(number), "--master-addr": first, "--nnodes": "2", "--nproc-per-node": "1"}
        assert given[0] == host and {name: given[given.index(name) + 1] for name in wanted} == wanted
    ports = {given[given.index("--master-port") + 1] for given in played.ranks}
    assert len(ports) == 1


def test_ranks_that_fail_are_started_again_and_not_for_ever(played: Played) -> None:
    """Each attempt looks at the nodes anew and meets at another port: the old one may still be closing."""
    done = played.run(played.script(*TWO), "n1 n2 n3", FAIL="1")
    assert done.returncode == 0 and "attempt 1 of 3 ended with 1" in done.stderr, done.stderr
    assert len({given[given.index("--master-port") + 1] for given in played.ranks}) == 2
    (played.folder / "said.fail").unlink()
    done = played.run(played.script(*TWO), "n1 n2 n3", FAIL="99")
    assert done.returncode == 1 and "attempt 3 of 3" in done.stderr and played.said == ""


def test_too_few_nodes_queue_again_and_not_for_ever(played: Played) -> None:
    text = played.script(*TWO)
    played.run(text, "n1 n2 n3", BAD="n1 n2")
    assert played.said == "requeued 7\n"
    done = played.run(text, "n1 n2 n3", BAD="n1 n2", SLURM_RESTART_COUNT="10")
    assert done.returncode == 1 and played.said == "requeued 7\n" and not (played.folder / "said.ranks").exists()


@pytest.mark.parametrize(("signal", "again"), [("USR1", True), ("TERM", False)])
def test_near_its_time_limit_a_job_saves_and_queues_again(played: Played, signal: str, again: bool) -> None:
    """A TERM is Slurm's or a person's end of the job: it saves too, and nobody starts it again from here."""
    done = played.run(played.script("--per-node", "2"), "n1", SIGNAL=signal)
    assert played.said == "scancel --signal=TERM 7\n" + "requeued 7\n" * again, done.stderr
    assert len(played.ranks) == 1  # no second attempt


def test_a_count_that_is_not_the_plans_is_refused(played: Played) -> None:
    """Somebody edits the script: two nodes of two are not the plan's two ranks."""
    text = played.script(*TWO).replace("\nranks_of_a_node=1\n", "\nranks_of_a_node=2\n")
    done = played.run(text, "n1 n2 n3")
    assert done.returncode == 2 and "2 nodes of 2 ranks are not 2 ranks" in done.stderr
    with pytest.raises(CinemeshError, match=r"world size\(2\) % ranks of a node\(3\) = 2"):
        played.script("--per-node", "3")


def chain_of(played: Played, **changes: Any) -> None:
    """In the recipe's place: two runs, their average and a clip of it."""
    own = played.folder / "work" / "own.yaml"
    shutil.copy(played.recipe, own)
    stages: list[dict[str, Any]] = [
        {"name": "a"},
        {"name": "b", "after": "a", "set": {"seed": 5, **changes}},
        {"name": "mean", "average": ["a", "b"]},
        {"name": "clip", "after": "mean", "prompt": "It moves.", "set": {"sample.steps": 2}},
    ]
    played.recipe.write_text(yaml.safe_dump({"directory": "runs", "recipe": str(own), "stages": stages}))


def test_a_chain_is_an_array_of_its_stages(played: Played) -> None:
    """Each task does its stage and no other, on the ranks that it has; an average has one."""
    chain_of(played)
    text = played.script("--per-node", "1", "--set", "schedule.steps=3")
    assert "#SBATCH --array=0-3%1\n" in text and "#SBATCH --nodes=2\n" in text
    for task, (stage, ranks) in enumerate({"a": 2, "b": 2, "mean": 1, "clip": 2}.items()):
        done = played.run(text, "n1 n2", SLURM_ARRAY_TASK_ID=str(task))
        assert done.returncode == 0, done.stderr
        agents = played.ranks
        (played.folder / "said.ranks").unlink()
        assert len(agents) == ranks and f"{stage}: {ranks} ranks" in done.stdout
        wanted = ["stages", str(played.recipe), "--stage", stage, "--set", "schedule.steps=3"]
        assert all(given[-len(wanted) :] == wanted for given in agents)
    done = played.run(text, "n1 n2", SLURM_ARRAY_TASK_ID="4")
    assert done.returncode == 2 and "there is no stage 4" in done.stderr


def test_a_chain_that_no_array_holds_is_refused(played: Played) -> None:
    chain_of(played, **{"plan.dp_shard": 1})
    with pytest.raises(CinemeshError, match="b runs on 1 nodes and a on 2"):
        played.script("--per-node", "1")
    with pytest.raises(CinemeshError, match="--ranks 4"):
        played.script("--per-node", "1", "--ranks", "4")
    for target in ("local", "kubernetes"):
        with pytest.raises(CinemeshError, match="is a chain of stages"):
            CliRunner().invoke(
                app, ["launch", target, str(played.recipe)], standalone_mode=False, catch_exceptions=False
            )


@pytest.mark.parametrize("options", [TWO, ("--per-node", "2", "--container", "/images/it's.sqsh", "--partition", "a")])
def test_the_script_is_clean(played: Played, options: tuple[str, ...]) -> None:
    text = played.script(*options)
    path = played.folder / "run.sbatch"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if shutil.which("shellcheck") is not None:
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_the_script_asks_for_what_the_plan_needs() -> None:
    """One agent a node, all GPUs of it, and the warning before the limit; every variable has its reason above it."""
    config = Path(__file__).resolve().parents[3] / "configs" / "gpu-8.yaml"
    words = "--plan tp=4,cp=2,dp_shard=4,recompute=o:lse --spares 2"
    done = CliRunner().invoke(app, ["launch", "slurm", str(config), *words.split()])
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    asked = {line.split()[1] for line in lines if line.startswith("#SBATCH")}
    wanted = "--nodes=6 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --requeue --no-kill --signal=B:USR1@300"
    assert {*wanted.split()} <= asked
    assert "# gpu-8: 32 ranks, 8 on each of 4 nodes of dgx-h100-ib400" in lines
    assert "# tp(4): ranks 1 apart, inside a node" in lines and "# cp(2): ranks 4 apart, inside a node" in lines
    assert "# dp_shard(4): ranks 8 apart, across nodes, one rank on each" in lines
    exported = [i for i, line in enumerate(lines) if line.startswith("export ")]
    assert len(exported) == 8 and all(lines[i - 1].startswith("# ") for i in exported)


@pytest.mark.parametrize("order", ["tp,cp,dp_shard,dp_replicate", "dp_shard,tp,dp_replicate,cp"])
@pytest.mark.parametrize("per_node", [1, 2, 4, 8, 16])
def test_the_map_is_where_the_ranks_of_the_mesh_lie(order: str, per_node: int, tmp_path: Path) -> None:
    """By each rank's own coordinates: a wrong stride or the wrong end of the order would send tp across the network."""
    plan = Plan.from_dict({"tp": 2, "cp": 2, "dp_shard": 2, "dp_replicate": 2, "order": order.split(",")})
    job = make_job(tmp_path / "r.yaml", plan, [], cluster=None, per_node=per_node, on_gpus=True)
    told = {line.split("(")[0]: line for line in placement(job)}
    assert len(told) == 4
    for axis, line in told.items():
        rows: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for rank in range(16):
            at = coordinates(plan, rank)
            rows.setdefault(tuple((other, at[other]) for other in at if other != axis), []).append(rank)
        groups = [*rows.values()]
        apart = {b - a for a, b in groups}
        inside = {a // per_node == b // per_node for a, b in groups}
        assert len(inside) == 1 and apart == {int(line.split("ranks ")[1].split()[0])}
        assert ("inside a node" in line) == inside.pop(), line
