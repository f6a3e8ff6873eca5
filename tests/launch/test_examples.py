"""Examples in help, README, pages and recipes are legal, fit the cluster that they name, and run.

Only this sees an example that a renamed option, a smaller cluster or a new rule has left behind.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cinemesh.data.curate.settings import settings_of
from cinemesh.documents import read_yaml
from cinemesh.launch.cli import app
from cinemesh.launch.commands.compile_check import sizes_of
from cinemesh.launch.examples import EXAMPLES
from cinemesh.launch.plans import plan_override, read_plan
from cinemesh.launch.proof.verify import MAX_PROCS, small_case
from cinemesh.launch.tae.loop import plan_of
from cinemesh.launch.tae.recipe import read_tae_recipe
from cinemesh.launch.training.chain import read_chain
from cinemesh.launch.training.recipe import read_config, read_recipe
from cinemesh.launch.training.sections import override
from cinemesh.launch.training.setting import Setting
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step, check
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.footprint import footprint

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name != "extend.md"),  # test_extend runs that one's
    *sorted(ROOT.glob("configs/*.yaml")),
]
LINE = re.compile(r"\s{2,}(?:\.venv/bin/)?(cinemesh [a-z].*?|torchrun .*?)(?:\s{2,}\S.*|\s+#.*)?$")  # indented: code
PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]{4,}\b")  # CONFIG, NAME: a form, no example

# Options that an example runs without, and where what they add is tested.
LEFT_OUT = {
    "--tune": "seconds a plan: tests/perf_model/search/test_tune.py",
    "--explain": "a search for each thing that may change: tests/launch/commands/test_explain.py",
    "--paper": "two searches a row: tests/launch/commands/test_paper.py",
    "--report": "a minute of drawing: tests/perf_model/report/test_report.py",
    "--fit": "minutes: tests/perf_model/calibration/test_fit.py",
}


def lines_of(text: str) -> list[str]:
    joined = re.sub(r" *\\\n *", " ", text)
    found = [match[1].strip() for line in joined.splitlines() if (match := LINE.search(line))]
    return [line for line in found if not PLACEHOLDER.search(line)]


def help_of(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], terminal_width=100)
    assert shown.exit_code == 0
    return shown.stdout


def commands() -> dict[str, Any]:
    """Every command by name, those of a group too: ``judge score``."""
    group: Any = typer.main.get_command(app)
    inner = {f"{name} {each}": command for name, own in group.commands.items() if hasattr(own, "commands")
             for each, command in own.commands.items()}  # fmt: skip
    return {name: command for name, command in group.commands.items() if not hasattr(command, "commands")} | inner


def name_of(words: list[str]) -> str:
    """The command that arguments of cinemesh begin with."""
    return " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]


def examples() -> list[str]:
    """Every example, each once."""
    texts = [help_of(), *(help_of(*name.split()) for name in commands()), *(page.read_text() for page in PAGES)]
    return list(dict.fromkeys(line for text in texts for line in lines_of(text)))


# -- what runs in the place of a command that takes long, or starts processes -----------------------------------------


def verified(given: dict[str, Any]) -> None:
    plan = read_plan(given["plan"], dtype=given["dtype"] or "float64")
    case = small_case(plan, given["model"], max_procs=given["max_procs"] or MAX_PROCS)
    prepare(build_step(case.config, case.plan, case.batch), backend="gloo")
    fits(given["model"], read_plan(given["plan"]))


def linted(given: dict[str, Any]) -> None:
    plan = read_plan(given["plan"])
    small_case(plan, given["model"], max_procs=plan.world_size)
    fits(given["model"], plan)


def traced(given: dict[str, Any]) -> None:
    plan = read_plan(given["plan"], dtype="float32")
    assert plan.world_size <= given["max_procs"] and load(given["cluster"]).gloo is not None
    check(preset(given["model"]), plan, BatchShape(1, USUAL_LATENTS[given["model"]]))


def trained(given: dict[str, Any]) -> None:
    asked = [*plan_override(given["plan"]), *(given["overrides"] or [])]
    if given["dry_run"]:
        read_recipe(given["config"], asked)
        return
    config = read_config(given["config"], asked)
    config.plan.check_world_size(given["nproc"] or 1)
    Setting.of(config).check_training()


def autoencoded(given: dict[str, Any]) -> None:
    plan_of(read_tae_recipe(given["config"], given["overrides"] or []), given["nproc"] or 1)


def chained(given: dict[str, Any]) -> None:
    links = read_chain(given["chain"])
    for link in links:
        config = link.config()
        config.plan.check_world_size(given["nproc"] or 1)
        Setting.of(config).check_training()
        if link.stage.prompt is not None:
            Setting.of(config).check_sampling()


def profiled(given: dict[str, Any]) -> None:
    trained(given | {"dry_run": False})
    assert given["cluster"] is None or load(given["cluster"])


def replayed(given: dict[str, Any]) -> None:
    Setting.of(read_config(given["config"])).check_training()


def sampled(given: dict[str, Any]) -> None:
    Setting.of(read_config(given["config"])).check_sampling()


def curation_read(given: dict[str, Any]) -> None:
    values = read_yaml(given["config"], "the curation", "")
    override(values, given["overrides"] or [])
    settings_of(values, str(given["config"]))
    assert given["recipe"] is None or read_config(given["recipe"])


def compiled(given: dict[str, Any]) -> None:
    model = given["model"]
    sizes_of(preset(model), read_plan(given["plan"] or ""), BatchShape(given["batch"], USUAL_LATENTS[model]))


def calibrated(given: dict[str, Any]) -> None:
    assert given["out"].suffix == ".yaml"
    assert given["base"] is None or (load(given["base"]).nccl is None) == (given["profile"] is not None)


IN_PLACE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "verify": (verified, "starts processes: the plan, the shrunk model and its program are checked as it does first"),
    "lint": (linted, "runs a step twice: the plan and the shrunk model are checked"),
    "trace": (traced, "starts processes: the plan and the prices are checked"),
    "profile": (profiled, "starts processes: everything that is checked before the first step"),
    "train": (trained, "minutes: everything that is checked before the first step"),
    "stages": (chained, "minutes: every recipe of the chain is read, and what a start looks at"),
    "sample": (sampled, "needs a trained model: recipe and sampled shape are checked"),
    "upsample": (lambda _: None, "needs a trained upsampler, tests/launch/commands/test_upsample.py: options are read"),
    "replay": (replayed, "needs a run: what is checked of its recipe"),
    "export": (lambda _: None, "needs a trained model, tests/launch/exchange: options are read"),
    "import": (lambda _: None, "needs an export, tests/launch/exchange: options are read"),
    "merge": (lambda _: None, "needs a trained LoRA, tests/launch/exchange: options are read"),
    "average": (lambda _: None, "needs trained models, tests/launch/commands/test_averaging.py: options are read"),
    "calibrate": (calibrated, "a minute, or a measured card: options are read"),
    "launch local": (lambda given: trained(given | {"dry_run": False, "nproc": 2}), "minutes, as train"),
    "curate": (curation_read, "decodes clips, tests/data/curate: the curation is read"),
    "data index": (lambda _: None, "needs tars, tests/launch/commands/test_data.py: options are read"),
    "data build": (lambda _: None, "decodes clips, tests/launch/commands/test_data.py: options are read"),
    "data show": (lambda _: None, "needs a cache, tests/launch/commands/test_data.py: options are read"),
    "data check": (lambda _: None, "needs a cache, tests/launch/commands/test_data.py: options are read"),
    "data withdraw": (lambda _: None, "needs a cache, tests/launch/commands/test_data.py: options are read"),
    "data seen": (lambda _: None, "needs a run, tests/launch/commands/test_data.py: options are read"),
    "codec eval": (lambda _: None, "decodes clips, tests/launch/commands/test_codec.py: options are read"),
    "tae train": (autoencoded, "minutes: everything that is checked before the first step"),
    "tae encode": (lambda _: None, "needs a trained autoencoder, tests/launch/tae: options are read"),
    "codec fit": (lambda _: None, "decodes clips, tests/launch/commands/test_codec.py: options are read"),
    "pick serve": (lambda _: None, "serves until it is stopped, tests/evaluation/test_picking.py: options are read"),
    "pick export": (lambda _: None, "needs picks, tests/evaluation/test_picking.py: options are read"),
    "rewrite make": (lambda _: None, "needs an endpoint, tests/launch/commands/test_rewrite.py: options are read"),
    "rewrite serve": (lambda _: None, "serves until it is stopped, tests/evaluation/rewriting: options are read"),
    "rewrite export": (lambda _: None, "needs verdicts, tests/launch/commands/test_rewrite.py: options are read"),
    "rewrite score": (lambda _: None, "needs an endpoint, tests/launch/commands/test_rewrite.py: options are read"),
    "judge make": (lambda _: None, "needs clips, tests/evaluation: options are read"),
    "judge serve": (lambda _: None, "serves until it is stopped, tests/evaluation: options are read"),
    "judge export": (lambda _: None, "needs pairs, tests/evaluation: options are read"),
    "judge import": (lambda _: None, "needs an export, tests/evaluation: options are read"),
    "judge score": (lambda _: None, "needs votes, tests/evaluation: options are read"),
    "plan --paper": (lambda _: None, "40 s: options are read"),
    "kernels --tune": (lambda _: None, "needs a GPU: options are read"),
    "kernels --compile": (compiled, "minutes: shapes of every kernel are made"),
}


def fits(model: str, plan: Plan, cluster: str = "grand-teton-h100", samples: int = 1) -> None:
    """That a step of the usual latent fits a GPU of the cluster."""
    if model.startswith("tiny"):
        return
    batch = BatchShape(samples, USUAL_LATENTS[model])
    needs = footprint(prepare(build_step(preset(model), plan, batch), backend="nccl"), load(cluster))
    assert needs.peak_bytes <= needs.limit_bytes, f"{needs.peak_bytes / 1e9:.1f} GB"


# -- tests ------------------------------------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """Arguments of cinemesh; torchrun's entry of training is ``train``. Without what takes long."""
    program, *words = shlex.split(line, comments=True)
    if program == "torchrun":
        assert words[0] == "--nproc-per-node" and words[2:4] == ["-m", "cinemesh.launch.train"], line
        return ["train", *words[4:], "--nproc", words[1]]
    kept: list[str] = []
    skip = False
    for word in words:
        alone = (word == "--paper" and "--gpus" not in words) or (word == "--tune" and words[0] == "kernels")
        if not skip and (word not in LEFT_OUT or alone):
            kept.append(word)
        skip = word == "--report"  # with its folder
    return kept


def ran(words: list[str]) -> None:
    """An example of a command that plans or shows, as JSON where it can; a plan that it names must fit."""
    parameters = commands()[name_of(words)].params
    as_json = any("--json" in parameter.opts for parameter in parameters) and "--json" not in words
    done = CliRunner().invoke(app, [*words, *(["--json"] if as_json else [])])
    assert done.exit_code == 0, f"{words}: {done.exception or done.output}"
    if words[0] in ("explain", "compare"):
        values = json.loads(done.stdout)
        assert all(plan["fits"] for plan in values.get("plans", [values])), words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where examples run: the recipes are there, and what an earlier example wrote."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_examples_are_legal_fit_and_run(folder: Path) -> None:
    found = examples()
    assert len(found) >= 40, "the pages were not read"
    asked = {tuple(words_of(line)) for line in found}
    for words in sorted(asked, key=lambda words: ("--out" not in words, words)):  # first what others read
        called = name_of([*words])
        command = commands()[called]
        apart = ("--compile", "--paper", "--tune", "local")
        name = next((f"{called} {option}" for option in apart if option in words), called)
        if name in IN_PLACE:
            with command.make_context(called, [*words[len(called.split()) :]]) as context:
                IN_PLACE[name][0](context.params)
        else:
            ran([*words])
            if words[0] in ("program", "kernels"):
                with command.make_context(words[0], [*words[1:]]) as context:
                    given = context.params
                if given["plan"]:
                    fits(given["model"], read_plan(given["plan"]), samples=given["batch"])


def test_an_example_that_does_not_fit_is_found() -> None:
    """The default of ``kernels`` was such a plan."""
    with pytest.raises(AssertionError, match=r"90\.1 GB"):
        linted({"plan": "tp=4,cp=2,dp_shard=768", "model": "movie-gen-30b"})


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_examples_and_exit_codes_in_its_help(name: str) -> None:
    shown = help_of(*name.split())
    own = (f"cinemesh {name} ", "torchrun --nproc-per-node ")
    assert [line for line in lines_of(shown) if f"{line} ".startswith(own)], shown
    assert "Exit codes: 0 " in shown
    assert all(f"    {line}\n" in shown for line in EXAMPLES[name]), "an example is folded"
