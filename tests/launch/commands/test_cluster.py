"""``cinemesh cluster`` prints every constant that prices use; ``--servers`` makes a cluster larger."""

import json

import pytest
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.perf_model.clusters.cluster import load, names


@pytest.mark.parametrize("name", names())
def test_every_constant_is_printed_with_its_origin(name: str) -> None:
    """As its file says it: a constant that is read and not shown would be a price that nobody can check."""
    cluster = load(name)
    values = json.loads(CliRunner().invoke(app, ["cluster", name, "--json"]).stdout)
    assert values["constants"].keys() == cluster.facts.keys() and len(cluster.facts) > 30
    text = CliRunner().invoke(app, ["cluster", name]).stdout
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for path, fact in cluster.facts.items():
        told = values["constants"][path]
        assert (told["unit"], told["origin"], told["source"]) == (fact.unit, fact.origin, fact.source)
        assert all(said in lines[path] for said in (fact.unit, fact.origin, fact.source, fact.date))


def test_servers_enlarge_a_cluster() -> None:
    """On GPUs beyond the file's, across one more pod; 6,144 of them cost what they cost."""
    runner = CliRunner()
    plan = ["explain", "tp=2,cp=4,dp_shard=96,dp_replicate=16,recompute=full", "--json"]
    refused = runner.invoke(app, plan)
    assert isinstance(refused.exception, CinemeshError) and "--servers" in str(refused.exception)
    done = runner.invoke(app, [*plan, "--servers", "1536"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["gpus"] == 12288
    assert load("grand-teton-h100", 1536).gpus == 12288 and load("grand-teton-h100").gpus == 6144
