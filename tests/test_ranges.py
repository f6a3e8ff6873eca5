"""Every number that a person gives has a range: of recipes, plans, cluster files and options."""

import math
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from typer.models import OptionInfo

from cinemesh.errors import CinemeshError
from cinemesh.launch import cli
from cinemesh.launch.cli import app
from cinemesh.launch.training.recipe import Config, check_config
from cinemesh.parallel.ir.knobs import Whole
from cinemesh.parallel.ir.plan import KNOBS, Plan
from cinemesh.perf_model.clusters.cluster import FOLDER, load
from cinemesh.ranges import Range, check_ranges, integers, ranges_of, reals

NO_NUMBERS = (True, False, math.nan, math.inf, -math.inf, 10**40, -(10**40), "7", "off", ".nan", [], {}, "")
RECIPE: dict[str, Any] = {
    "model": {"preset": "tiny-video", "patch": [1, 2, 2], "position_lengths": [4, 16, 16]},
    "data": {"cache": "cache", "global_batch": 8, "buckets": [{"frames": 8}], "encoders": [{"name": "bytes"}]},
    "optimizer": {"lr": 2e-3, "betas": [0.9, 0.95]},
    "schedule": {"steps": 10},
    "logging": {"directory": "run"},
    "spikes": {"steps": 3},
    "sample": {"steps": 7},
}
Key = tuple[str | int, ...]


def numbers(kind: Any, at: Key = ()) -> Iterator[tuple[Key, Range]]:
    """The key path and range of every number below a type. Asserts that there is no number without one."""
    if is_dataclass(kind) and isinstance(kind, type):
        if kind is not Plan:
            hints = get_type_hints(kind, include_extras=True)
            for f in fields(kind):
                yield from numbers(hints[f.name], (*at, f.name))
        return
    inner = get_args(kind)
    if (own := next((part for part in inner if isinstance(part, Range)), None)) is not None:
        yield at, own
    elif get_origin(kind) is tuple:
        for index, part in enumerate(inner[:1] if inner[-1] is ... else inner):
            yield from numbers(part, (*at, index))
    else:
        assert kind not in (int, float), f"{at} has no range"
        for part in inner:
            if not isinstance(part, str):
                yield from numbers(part, at)


NUMBERS = dict(numbers(Config))


def with_value(key: Key, value: object) -> dict[str, Any]:
    changed = yaml.safe_load(yaml.safe_dump(RECIPE))
    if "lora" in key:
        changed["model"]["lora"] = {"rank": 4, "alpha": 8.0}
    if "low_resolution" in key:
        changed["data"]["low_resolution"] = {}
        del changed["sample"]  # an upsampler samples no captions
    owner = changed
    for part in key[:-1]:
        owner = owner[part]
    owner[key[-1]] = value
    return changed


def outside(allowed: Range) -> list[float]:
    step = 1 if allowed.whole else abs(allowed.least) / 1e3 or 1e-9
    return [allowed.least - step, allowed.most + max(1, allowed.most / 1e3)]


def test_the_walk_finds_the_numbers() -> None:
    """One that finds none would hold every rule."""
    told = {".".join(map(str, key)) for key in NUMBERS}
    assert {
        "seed",
        "optimizer.betas.1",
        "data.buckets.0.global_batch",
        "data.encoders.0.tokens",
        "model.patch.2",
    } <= told
    assert len(told) > 35


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: ".".join(map(str, key)))
def test_a_number_of_a_recipe_is_refused_out_of_its_range(key: Key) -> None:
    """Below, above, not whole, boolean, text, not finite, huge: one message with key, value and rule."""
    allowed = NUMBERS[key]
    assert allowed.why and allowed.wrong(allowed.most) is None
    assert (allowed.wrong(allowed.least) is None) is not allowed.above
    for value in (
        *NO_NUMBERS,
        *outside(allowed),
        *([allowed.least + 0.5, float(allowed.most)] if allowed.whole else []),
    ):
        with pytest.raises(CinemeshError) as refused:
            check_config(with_value(key, value), "test")
        text = str(refused.value)
        assert ".".join(map(str, key)) in text and "\n" not in text and len(text) < 400, text


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if isinstance(knob, Whole)])
def test_a_number_of_a_plan_is_refused_out_of_its_range(name: str) -> None:
    knob = KNOBS[name]
    assert isinstance(knob, Whole) and knob.why
    for value in (*NO_NUMBERS, knob.least - 1, knob.most + 1, knob.least + 0.5):
        with pytest.raises(CinemeshError) as refused:
            Plan.from_dict({"tp": 2, "cp": 2, "dp_shard": 2} | {name: value})
        assert name in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_number_of_a_cluster_file_is_refused_out_of_its_range(tmp_path: Path) -> None:
    """Every one of every section, those inherited from a base too."""
    told = load("grand-teton-h100").facts
    assert len(told) > 60
    for path in told:
        for value in (True, "7", ".nan", 10**40, -1):
            changed: Any = {"value": value}
            entry = {"unit": told[path].unit, "origin": "measured", "source": "x"}
            if isinstance(told[path].value, dict):
                changed = {"value": dict.fromkeys(told[path].value, value)}
            values: Any = changed | entry
            for part in reversed(path.split(".")):
                values = {part: values}
            head = {"base": "grand-teton-h100", "sources": {"x": {"title": "a", "date": "2026-11-29"}}}
            (tmp_path / "mine.yaml").write_text(yaml.safe_dump(head | values))
            (tmp_path / "grand-teton-h100.yaml").write_text((FOLDER / "grand-teton-h100.yaml").read_text())
            with pytest.raises(CinemeshError, match="cluster mine: ") as refused:
                load(str(tmp_path / "mine.yaml"))
            assert path in str(refused.value) and "\n" not in str(refused.value)


def options() -> Iterator[tuple[str, str, OptionInfo]]:
    """(command, ``--option``, what bounds it) of every one that takes a number."""
    doors = [own for group in app.registered_groups if (own := group.typer_instance)]
    groups = [("", app), *((f"{own.info.name} " if isinstance(own.info.name, str) else "", own) for own in doors)]
    for group, command in ((name, command) for name, owner in groups for command in owner.registered_commands):
        assert command.callback is not None
        for parameter, hint in get_type_hints(command.callback, include_extras=True).items():
            of, *said = get_args(hint) or (hint,)
            name = f"--{parameter.replace('_', '-')}"
            if name != "--guidance" and {int, float} & {of, *get_args(of)}:  # the recipe has guidance's range
                yield group + (command.name or command.callback.__name__), name, said[0]


OPTIONS = [*options()]
REALS = ("1e3", "1.5")  # no whole numbers


@pytest.mark.parametrize(("command", "name", "option"), OPTIONS, ids=lambda of: of if isinstance(of, str) else "")
def test_a_number_on_the_command_line_is_refused_out_of_its_range(
    command: str,
    name: str,
    option: OptionInfo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever option of whatever command takes one."""
    assert option.min is not None and option.max is not None and len(OPTIONS) >= 20
    real = isinstance(option.min, float)
    for text in (str(option.min - 1), str(option.max + 1), "nan", "true", "9" * 5000, "", *(() if real else REALS)):
        monkeypatch.setattr(sys, "argv", ["cinemesh", *command.split(), name, text])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert stop.value.code == 2 and shown.out == "" and name in shown.err, shown.err[:300]


def test_what_a_range_says() -> None:
    whole, share = integers(1, 64, "there are 64"), reals(0, 1, "a part", above=True)
    assert whole.wrong(65) == "it must be 1 to 64: there are 64" and whole.wrong(64) is None
    assert whole.wrong(2.0) == whole.wrong(True) == whole.wrong("2") == "it must be a whole number, 1 to 64"
    assert share.wrong(0) == "it must be above 0, to 1: a part" and share.wrong(1) is None
    assert share.wrong(math.nan) == "it must be a number, above 0, to 1"


def test_a_plain_dataclass_is_held_to_its_ranges() -> None:
    from cinemesh.data.buckets import Bucket

    assert set(ranges_of(Bucket)) == {"frames", "height", "width", "weight", "global_batch", "fps", "squeeze_from_s"}
    check_ranges(Bucket(1, 2, 3, 4.0), "")
    with pytest.raises(CinemeshError, match=r"data\.buckets: height is True; it must be a whole number"):
        Bucket(1, True, 3, 4.0)
