"""Cluster files: every number has its origin, and what cannot be is refused with one message."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cinemesh.errors import CinemeshError
from cinemesh.kernels.rates import TABLES, dense_bf16_flops, rate
from cinemesh.parallel.ir.nccl_stack import NcclStack
from cinemesh.perf_model.clusters import cluster as module
from cinemesh.perf_model.clusters.cluster import Cluster, load, names
from cinemesh.perf_model.clusters.constants import INHERITED, ORIGINS
from cinemesh.perf_model.clusters.schema import Gloo, Measured, Nccl

SHIPPED = ("grand-teton-h100", "dgx-h100-ib400", "h100-hbm2e-500w", "dgx-a100-hdr200", "local-cpu")
BLACKWELL = ("dgx-b200-ib400", "gb200-nvl72-ib400")


def resolved(name: str) -> dict[str, Any]:
    """A shipped file with its bases merged in, to be changed and written as one file."""
    return module._read(module.FOLDER / f"{name}.yaml")


def written(tmp_path: Path, values: dict[str, Any]) -> str:
    path = tmp_path / "mine.yaml"
    for grid in module.FOLDER.glob("*.csv"):
        (tmp_path / grid.name).write_text(grid.read_text())
    path.write_text(json.dumps(values, default=str))  # JSON is YAML, and faster
    return str(path)


@pytest.mark.parametrize("name", names())
def test_every_number_says_where_it_comes_from(name: str) -> None:
    """Only here: a number that slipped in without unit, origin, source or date."""
    cluster = load(name)
    assert len(cluster.facts) >= 40
    for path, fact in cluster.facts.items():
        assert fact.origin in ORIGINS and fact.unit and len(fact.source) > 10, path
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", fact.date), path
    guessed = {path.split(".")[0] for path, fact in cluster.facts.items() if fact.origin == "placeholder"}
    if name == "local-cpu":
        assert "gpu" in guessed and "gloo" in guessed
    else:  # kernels that nobody has measured: ours, torch's with a bias, what sums in order cost; what of its memory a
        # server leaves to copies; how long a site's jobs pause, start and wait for repairs
        assert guessed - {"operations"} == {"attention", "host"}


def test_rates_stand_in_one_table() -> None:
    """The registry ranks kernels by the very numbers that the planner prices them by."""
    for name in ("grand-teton-h100", "dgx-a100-hdr200"):
        cluster = load(name)
        device, peak = cluster.gpu.device, cluster.gpu.peak_flops["bfloat16"]
        assert dense_bf16_flops(device) == peak
        for family, law in cluster.attention.items():
            known = rate(family, device)
            assert known.share(False) == pytest.approx(law.forward.speed["128"] / peak, rel=1e-12), family
            assert known.share(True) == pytest.approx(law.backward.speed["128"] / peak, rel=1e-12), family
            assert known.share(True, ordered=True) == pytest.approx(known.share(True) * law.ordered, rel=1e-12)


def test_shipped() -> None:
    assert set(SHIPPED) <= set(names())
    paper = load("grand-teton-h100")
    assert (paper.gpus, paper.gpus_per_server, paper.topology.servers) == (6144, 8, 768)
    assert paper.gpu.peak_flops["bfloat16"] == 989.4e12
    assert paper.topology.nic_bytes_per_s == 50e9 and paper.gpu.memory_bytes == 80 * 2**30
    assert load("h100-hbm2e-500w").gpu.memory_bytes_per_s == 2.4e12
    assert load("h100-hbm2e-500w").gpu.sms == paper.gpu.sms  # inherited, written once
    assert load("local-cpu").nccl is None and load("local-cpu").gloo is not None


@pytest.mark.parametrize("name", BLACKWELL)
def test_what_no_source_gives_of_a_chip_is_told_as_another_ones(name: str) -> None:
    """Only here: a rate of the H100 that would pass for one of the B200's, or a kernel that does not run on it."""
    cluster, hopper = load(name), load("dgx-h100-ib400")
    assert "fa3" not in cluster.attention and "flash1" not in cluster.attention and not cluster.matmul.grid
    assert cluster.gpu.device == "sm_100" and cluster.attention["fa4"].forward.speed["128"] == 1613e12
    assert cluster.nccl is not None and not cluster.nccl.correction
    for path in ("matmul.efficiency", "gpu.sustained", "stream.fraction", "overlap.compute_slowdown"):
        assert cluster.facts[path].value == hopper.facts[path].value and cluster.facts[path].origin == INHERITED
    own = ("gpu.peak_flops", "gpu.memory_bytes_per_s", "gpu.sms", "topology.nvlink_bytes_per_s")
    assert all(cluster.facts[path].origin == "datasheet" for path in own)
    assert not any(fact.origin == INHERITED for fact in hopper.facts.values())


def test_racks() -> None:
    rack = load("gb200-nvl72-ib400")
    assert (rack.gpus_per_server, rack.topology.domain_gpus, rack.gpus) == (4, 72, 9216)
    assert load("dgx-b200-ib400").topology.domain_gpus == 8


def test_a_file_may_inherit_and_take_out(tmp_path: Path) -> None:
    """The numbers of ``inherits`` stand below those of ``base``; null takes out what either gives, and no more."""
    (tmp_path / "mine.yaml").write_text(
        "inherits: dgx-h100-ib400\nattention: {fa3: null}\nnccl: {correction: null}\n"
        "sources: {me: {title: my own measurement, date: 2026-01-01}}\n"
        "stream: {fraction: {value: 0.9, unit: fraction, origin: measured, source: me}}\n"
    )
    mine, base = load(str(tmp_path / "mine.yaml")), load("dgx-h100-ib400")
    assert {path for path, fact in mine.facts.items() if fact.origin != INHERITED} == {"stream.fraction"}
    assert [*mine.attention] == [family for family in base.attention if family != "fa3"]
    assert mine.nccl is not None and mine.nccl.correction == "" and mine.nccl.pat_base_s == base.nccl.pat_base_s  # type: ignore[union-attr]
    (tmp_path / "mine.yaml").write_text("inherits: dgx-h100-ib400\nattention: {fa9: null}\n")
    with pytest.raises(CinemeshError, match=r"attention\.fa9 is missing"):
        load(str(tmp_path / "mine.yaml"))


def test_a_number_is_written_once() -> None:
    """A number that a file repeats from its base: two places to change."""
    for path in sorted(module.FOLDER.glob("*.yaml")):
        own = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        bases = own.pop("base", [])
        own.pop("inherits", None)
        below: dict[str, Any] = {}
        for base in bases:
            part = next(path for folder in (module.FOLDER, TABLES) if (path := folder / f"{base}.yaml").is_file())
            below = module._merge(below, module._read(part))
        for section, fields in own.items():
            if section in ("sources", "name", "about"):
                continue
            for field in (field for field in fields if fields[field] is not None):
                assert below.get(section, {}).get(field) != own[section][field], f"{path.name}: {section}.{field}"


WRONG = {
    "a GPU over gloo": (("gpu", "device"), "cpu", "gpu.device is 'cpu' beside nccl; gloo joins CPUs"),
    "no device": (("gpu", "device"), None, "gpu.device is missing; add device: a text"),
    "unknown device": (("gpu", "device"), "hopper", "device 'hopper' is unknown; write cpu, cuda or a capability"),
    "packages in a text": (("packages",), "fa3", "packages is 'fa3', no list"),
    "unknown package": (("packages",), ["fa33"], "package 'fa33' is none"),
    "a release as a number": (("stack",), {"nccl": 2.30, "driver": "12.8"}, "stack.nccl is 2.3; write a release as a"),
    "a stack without a driver": (("stack",), {"nccl": "2.30"}, "stack.driver is"),
    "a driver's own number": (("stack",), {"nccl": "2.30", "driver": "570"}, "stack.driver is '570'; write a release"),
    "more of a stack": (("stack",), {"nccl": "2.30", "driver": "12.8", "cudnn": "9.2"}, "stack.cudnn is unknown"),
    "a package that is a number": (("packages",), [3], "packages is 3; it must be a text"),
    "missing number": (("gpu", "sms"), None, "gpu.sms is missing"),
    "negative": (("topology", "nic_bytes_per_s", "value"), -400, "topology.nic_bytes_per_s is -400 Gb/s"),
    "zero": (("gpu", "memory_bytes_per_s", "value"), 0, "is 0 TB/s; a rate here lies from"),
    "latency of 5 seconds": (
        ("topology", "switch_latency_s"),
        {"value": 5, "unit": "s"},
        "is 5 s; a time here lies from",
    ),
    "start-up of an hour": (("nccl", "init_base_s", "value"), 3600, "init_base_s is 3600 s; a time here lies from"),
    "unit of something else": (("topology", "nic_bytes_per_s", "unit"), "GB", "has the unit 'GB'; a rate is given in"),
    "unknown unit": (("gpu", "power_w", "unit"), "kW", "has the unit 'kW'; a power is given in W"),
    "text": (("gpu", "sms", "value"), "many", "gpu.sms is 'many'; it must be a number of count"),
    "bare number": (("gpu", "sms"), 132, "gpu.sms is 132; write {value"),
    "not whole": (("gpu", "sms", "value"), 131.5, "gpu.sms is 131.5; it must be a whole number"),
    "not a number": (("gpu", "power_w", "value"), math.nan, "gpu.power_w is 'NaN'"),
    "true": (("gpu", "power_w", "value"), True, "gpu.power_w is True"),
    "fraction above 1": (("stream", "fraction", "value"), 1.2, "stream.fraction is 1.2 fraction"),
    "no origin": (("gpu", "sms", "origin"), "guess", "has the origin 'guess'; say one of datasheet"),
    "unknown source": (("gpu", "sms", "source"), "rumour", "has the source 'rumour'; add it under sources"),
    "unknown field": (("gpu", "smz"), {"value": 1}, "gpu.smz is unknown; did you mean 'sms'?"),
    "unknown section": (("gpus",), {}, "unknown key 'gpus'; did you mean 'gpu'?"),
    "missing section": (("topology",), None, "topology is missing"),
    "table of text": (("gpu", "peak_flops", "value", "bfloat16"), "fast", "peak_flops[bfloat16] is 'fast'"),
    "not a table": (("gpu", "peak_flops", "value"), 989, "it must be a table"),
    "no attention": (("attention",), None, "attention is missing"),
    "two libraries": (("gloo",), {}, "nccl, gloo has 2 of the two"),
    "no grid": (("matmul", "grid"), "nowhere.csv", "there is no grid"),
    "a grid elsewhere": (
        ("matmul", "grid"),
        "../h100_gemm.csv",
        "the table is '../h100_gemm.csv', and files are called",
    ),
}


@pytest.mark.parametrize(("path", "value", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(tmp_path: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    values = resolved("grand-teton-h100")
    owner = values
    for key in path[:-1]:
        owner = owner[key]
    known = owner.get(path[-1])
    if isinstance(value, dict) and isinstance(known, dict):
        value = {**known, **value}
    if value is None:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    with pytest.raises(CinemeshError) as error:
        cluster = load(written(tmp_path, values))
        cluster.grid(cluster.matmul.grid)
    assert message in str(error.value) and "; " in str(error.value)
    assert "\n" not in str(error.value)


def tables() -> Iterator[tuple[str, str, str, str]]:
    """(cluster, section, table, a name in it) of every table whose names the prices look up or read as sizes."""
    for cluster, kinds in (("grand-teton-h100", (Nccl,)), ("local-cpu", (Gloo, Measured))):
        values = resolved(cluster)
        for kind in kinds:
            section = kind.__name__.lower()
            for name, number in values.get(section, {}).items():
                if isinstance(number, dict) and isinstance(number["value"], dict):
                    yield from ((cluster, section, name, key) for key in number["value"])


@pytest.mark.parametrize(("cluster", "section", "table", "name"), list(tables()))
def test_a_table_without_a_name_that_is_looked_up_is_refused(
    tmp_path: Path, cluster: str, section: str, table: str, name: str
) -> None:
    """Else a price ends with a KeyError, in the one plan that needs it."""
    values = resolved(cluster)
    numbers = values[section][table]["value"]
    numbers["other"] = numbers.pop(name)
    with pytest.raises(CinemeshError, match=rf"{section}.*({name}|other)"):
        load(written(tmp_path, values))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grand-tetons-h100", "did you mean 'grand-teton-h100'?"),
        ("_h100", "is unknown"),
        ("no/such/file.yaml", "there is no file"),
    ],
)
def test_unknown_cluster(name: str, message: str) -> None:
    with pytest.raises(CinemeshError, match=re.escape(message)):
        load(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds no mapping"),
        ("a: [", "is not valid YAML"),
        ("name: a\nname: b", "key 'name' is given twice"),
        ("base: ../mine", "base is '../mine', and files are called after it"),
        ("base: nothing", "base 'nothing' is no file"),
        ("base: mine", "leads back to itself"),
    ],
)
def test_file_that_is_no_cluster(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(CinemeshError, match=message):
        load(str(path))


def test_own_file_over_a_shipped_one(tmp_path: Path) -> None:
    """A user's file of three lines: one number changed, everything else inherited."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: grand-teton-h100\nsources: {me: {title: our own cluster, date: 2026-01-01}}\n"
        "topology:\n  nic_bytes_per_s: {value: 800, unit: Gb/s, origin: datasheet, source: me}\n"
    )
    mine = load(str(path))
    assert mine.topology.nic_bytes_per_s == 1e11 and mine.facts["topology.nic_bytes_per_s"].source == "our own cluster"
    assert mine.gpu == load("grand-teton-h100").gpu


def test_a_file_tells_nccl_and_driver(tmp_path: Path) -> None:
    """What they take from a step is said as it is priced: none of the shipped ones says so."""
    old = load(written(tmp_path, resolved("grand-teton-h100") | {"stack": {"nccl": "2.28", "driver": "12.8"}}))
    assert old.stack == NcclStack((2, 28), (12, 8))
    assert old.order_told().endswith("where capture is required; priced side by side, launched by the host")
    assert old.capturing("required").order_told().endswith("priced one after another, captured")
    assert {load(name).order_told() for name in names()} == {""}
    with pytest.raises(CinemeshError, match="stack is beside gloo"):
        load(written(tmp_path, resolved("local-cpu") | {"stack": {"nccl": "2.28", "driver": "12.8"}}))


def test_with() -> None:
    cluster = load("grand-teton-h100")
    assert cluster.with_(nic_scale=2.0).topology.nic_bytes_per_s == 1e11
    more = cluster.with_(memory_bytes=96 * 2**30)
    assert more.memory.usable_bytes == pytest.approx(cluster.memory.usable_bytes * 1.2)
    faster = cluster.with_(nvlink_scale=2.0)
    assert faster.nccl is not None and faster.nccl.server_channel_bytes_per_s == 60e9
    assert cluster.with_(**{"attention.fa3.forward.rows": 64}).attention["fa3"].forward.rows == 64
    assert cluster.attention["fa3"].forward.rows == 192  # the original is untouched
    with pytest.raises(CinemeshError, match=r"nothing is named 'gpu\.cores'"):
        cluster.with_(**{"gpu.cores": 1})


def test_spread_grows_with_ranks() -> None:
    spread = load("grand-teton-h100").spread
    factors = [spread.factor(n) for n in (1, 2, 8, 1024, 6144)]
    assert factors[0] == 1.0 and factors == sorted(factors) and factors[-1] < 1.1


def test_parts_are_no_clusters() -> None:
    assert not any(name.startswith("_") for name in names())
    assert isinstance(load(names()[0]), Cluster)
