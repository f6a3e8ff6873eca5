"""What follows from the table of knobs: legality, other degrees, reading and writing, documentation.

.venv/bin/python tests/parallel/ir/test_knobs.py      writes the tables of docs/overlap.md anew
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemesh.errors import CinemeshError
from cinemesh.parallel.ir.fields import AXES, Degrees, Memory, Overlap, Streams
from cinemesh.parallel.ir.knobs import Activations, Kept, Knob, OneOf, Order, Size, SomeOf, Switch, Whole, knobs
from cinemesh.parallel.ir.plan import KNOBS, Plan

DOCS = Path(__file__).parents[3] / "docs" / "overlap.md"

# A field that is added here is one that no other field implies: what follows from others is a property of the plan.
FIELDS: dict[type, str] = {
    Degrees: "tp cp dp_shard dp_replicate micro_batches order",
    Memory: "dtype recompute recompute_last last_blocks offload",
    Overlap: "grad_units kv_slices kv_chunks kv_first tp_slices fused_tp defer_weight_gradients prefetch",
    Streams: "tp_ctas cp_ctas unit_ctas sm_margin normal_priority",
}


def test_the_fields_of_a_plan_are_these() -> None:
    assert {group: " ".join(knobs(group)) for group in FIELDS} == FIELDS
    assert list(KNOBS) == " ".join(FIELDS.values()).split()


# -- legal plans ------------------------------------------------------------------------------------------------------

DEGREE = st.sampled_from((1, 1, 2, 3, 8))
ON_EVERY_AXIS = Plan(tp=2, cp=2, dp_shard=2, dp_replicate=2)
ACTING = [name for name, knob in KNOBS.items() if knob.axes]


def values(knob: Knob) -> st.SearchStrategy[Any]:
    """What a knob may be."""
    match knob:
        case Whole(least=least, most=most):
            return st.integers(least, min(most, 9))
        case Switch():
            return st.booleans()
        case OneOf(words=words):
            return st.sampled_from(words)
        case Order(words=words):
            return st.permutations(words).map(tuple)
        case SomeOf(groups=groups):
            return st.lists(st.sampled_from(list(groups)), unique=True).map(tuple)
        case Kept(words=words):
            return st.sampled_from(words) | st.lists(st.sampled_from(["q", "kv_gathered", "o"]), unique=True).map(tuple)
        case Activations():
            return st.lists(st.sampled_from(["q", "kv", "o"]), unique=True).map(tuple)
    raise AssertionError(f"{knob.name}: a new kind of knob")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any legal plan: every knob at any value, but for what these degrees, or another knob, rule out."""
    degrees: dict[str, Any] = {axis: draw(DEGREE) for axis in AXES}
    given_: dict[str, Any] = {n: draw(values(knob)) for n, knob in KNOBS.items() if n not in degrees}
    for name, knob in KNOBS.items():
        given_ |= {rival: KNOBS[rival].off for rival in knob.rivals if given_[name] != knob.off}
    given_ |= {} if given_["last_blocks"] else {"recompute_last": None}
    size = Plan(**degrees).size
    return Plan(**degrees, **{name: KNOBS[name].left(value, size) for name, value in given_.items()})


@settings(deadline=None)
@given(plans())
def test_every_legal_plan_is_read_as_it_was_written(plan: Plan) -> None:
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.parse(plan.to_text()) == plan
    assert Plan.from_yaml("model: tiny\nplan:\n" + re.sub("^", "  ", plan.to_yaml(), flags=re.MULTILINE)) == plan


def test_a_file_written_before_there_were_groups_is_read() -> None:
    old = """tp: 4\ncp: 2\ndp_shard: 96\ndp_replicate: 1\nmicro_batches: 1\nrecompute: selective\ndtype: bf16
order:\n- tp\n- cp\n- dp_shard\n- dp_replicate\nprefetch: 1\ngrad_units: 2\nkv_slices: 3\nkv_chunks: 1\nkv_first: false
tp_slices: 1\nfused_tp: false\ndefer_weight_gradients: true\ntp_ctas: 0\ncp_ctas: 4\nunit_ctas: 0\nsm_margin: 0
normal_priority:\n- unit\nrecompute_last: null\nlast_blocks: 0\n"""
    others = "grad_units=2,kv_slices=3,defer_weight_gradients=true,cp_ctas=4,normal_priority=unit"
    assert Plan.from_yaml(old) == Plan.parse(f"tp=4,cp=2,dp_shard=96,{others}")
    assert Plan.from_yaml(old).to_text() == f"tp=4,cp=2,dp_shard=96,{others}"


# -- degrees ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans(), st.fixed_dictionaries(dict.fromkeys(AXES, DEGREE)))
def test_on_other_degrees_what_has_no_effect_is_off_and_the_rest_stays(plan: Plan, degrees: dict[str, int]) -> None:
    other = plan.with_degrees(**degrees)
    for name, knob in KNOBS.items():
        was, is_ = getattr(plan, name), getattr(other, name)
        if name in degrees:
            assert is_ == degrees[name]
        elif isinstance(knob, SomeOf):
            assert is_ == tuple(group for group in was if other.size(knob.groups[group]) > 1)
        else:
            assert is_ == (knob.off if knob.axes and other.size(knob.axes) == 1 else was)
    assert other.with_degrees(**degrees) == other == replace(other)


@settings(deadline=None)
@given(plans(), st.sampled_from([name for name in KNOBS if name not in AXES]))
def test_off_is_legal_everywhere(plan: Plan, name: str) -> None:
    together: dict[str, Any] = {"recompute_last": None, "last_blocks": 0}  # one says what the other is for
    off = together if name in together else {name: KNOBS[name].off}
    assert replace(plan, **off)


@settings(deadline=None)
@given(st.sampled_from(ACTING), st.data())
def test_what_has_nothing_to_act_on_is_refused(name: str, data: st.DataObject) -> None:
    knob = KNOBS[name]
    value = data.draw(values(knob).filter(lambda value: value != knob.off))
    asked: dict[str, Any] = {axis: data.draw(DEGREE) for axis in AXES if axis not in knob.axes} | {name: value}
    with pytest.raises(CinemeshError) as refused:
        Plan(**asked)
    error = refused.value
    assert (error.what, error.value, error.rule) == (name, value, f"{knob.rule}, so {knob.idle}") and knob.rule
    assert f"{name}({knob.write(value)}) with " in error.problem and error.rule in error.problem
    assert error.remedy.startswith(f"set {name} to {knob.write(knob.off)} or raise ")
    assert all(f"{axis}(1)" in error.problem and axis in error.remedy for axis in knob.axes if knob.axes != AXES)
    assert replace(ON_EVERY_AXIS, **{name: value})


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if knob.excludes])
def test_what_excludes_another_is_refused_beside_it(name: str) -> None:
    for other, why in KNOBS[name].excludes.items():
        assert name in KNOBS[other].rivals and other in KNOBS[name].rivals
        on = {each: True if isinstance(KNOBS[each], Switch) else 2 for each in (name, other)}
        with pytest.raises(CinemeshError, match=f"{name}.* with {other}.*: {why}; set {name} to ") as refused:
            replace(ON_EVERY_AXIS, **on)
        assert (refused.value.what, refused.value.rule) == (name, why)


# -- values -----------------------------------------------------------------------------------------------------------

WHOLE = {name: knob for name, knob in KNOBS.items() if isinstance(knob, Whole)}


@pytest.mark.parametrize("name", WHOLE)
def test_every_number_has_a_range(name: str) -> None:
    knob = WHOLE[name]
    value: Any
    for value in (knob.least - 1, True, 1.5, "2", None, (2,), 10**30, knob.most + 1):
        with pytest.raises(CinemeshError) as refused:
            Plan(**{name: value})
        error = refused.value
        assert error.what == name and error.value == value and error.rule and error.remedy
        assert (knob.why in error.problem) == (type(value) is int and value > knob.most)
    for value in (knob.least, knob.most):
        knob.check(value)


@pytest.mark.parametrize("name", [name for name in KNOBS if name not in WHOLE])
def test_everything_else_is_of_its_kind(name: str) -> None:
    """Only `recompute_last` may be nothing."""
    value: Any
    for value in (3, 1.5, ("a b",), (3,), ("tp", "tp"), {"tp": 2}, ["tp"], "no such word", b"none", None):
        if (isinstance(KNOBS[name], Kept) and value == ("tp", "tp")) or (name, value) == ("recompute_last", None):
            continue
        with pytest.raises(CinemeshError) as refused:
            Plan(**{name: value})
        assert refused.value.what == name and refused.value.remedy and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=٣", "plan: tp is '٣'; it must be a whole number of at least 1"),
        ("tp=--2", "plan: tp is '--2'; it must be a whole number"),
        ("tp=+2", "plan: tp is '+2'; it must be a whole number"),
        ("tp=1_000", "plan: tp is '1_000'; it must be a whole number"),
        ("tp=", "plan: tp is ''; it must be a whole number"),
        ("tp=" + "9" * 5000, "it must be a whole number"),
        ("prefetch=" + "1" + "0" * 30, f"plan: prefetch({10**30}) > 1024, more units than any model has"),
        ("tp=4096,cp=4096,dp_shard=2", "= 33554432 > 16777216, more ranks than any cluster has GPUs; lower a degree"),
        ("cp=2,kv_first=yes", "plan: kv_first is 'yes'; it must be true or false"),
        ("cp=2,kv_first=1", "plan: kv_first is 1; it must be true or false"),
        ("tp=2,tp=4", "plan: tp is given twice; leave one of them out"),
        ("tp=2,cp=2, tp =2", "plan: tp is given twice"),
        ("=4", "plan: unknown key ''; known: tp, cp, "),
        ("order=tp:cp", "plan: order is ['tp', 'cp']; it must name each of tp, cp, dp_shard, dp_replicate once"),
        ("recompute=a b:", "plan: recompute is ['a b']; choose one of none, selective, full, or list the activations"),
    ],
)
def test_a_text_that_is_no_plan_is_one_message(text: str, said: str) -> None:
    with pytest.raises(CinemeshError, match=re.escape(said)) as refused:
        Plan.parse(text)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp: 1:30", "tp is '1:30'"),
        ("tp: 1_000", "tp is '1_000'"),
        ("tp: 0x10", "tp is '0x10'"),
        ("tp: 4.0", "tp is 4.0"),
        ("tp: ٣", "tp is '٣'"),
        ("tp:", "tp is None"),
        ("tp: [2]", "tp is [2]"),
        ("tp: {a: 2}", "tp is {'a': 2}"),
        ("prefetch: off", "prefetch is 'off'"),
        ("prefetch: true", "prefetch is True"),
        ("kv_first: on", "kv_first is 'on'; it must be true or false"),
        ("tp: 010", "tp is '010'"),
        ("tp: 2\ntp: 4", "the text is not valid YAML: line 2: key 'tp' is given twice"),
        ("order: [[tp]]", "order is [['tp']]"),
        ("recompute: {q: kv}", "recompute is {'q': 'kv'}"),
        ("? [tp]\n: 2", "the text is not valid YAML: line 1: a key must be a plain word"),
    ],
)
def test_a_file_says_what_it_says(text: str, said: str) -> None:
    """YAML 1.1 makes 90 of 1:30, 1000 of 1_000, 16 of 0x10, False of off."""
    with pytest.raises(CinemeshError, match=re.escape(f"plan: {said}")) as refused:
        Plan.from_yaml(text)
    assert "\n" not in str(refused.value)


def test_a_number_is_read_as_it_looks() -> None:
    with pytest.raises(CinemeshError, match="tp is '010'"):
        Plan.parse("tp=010")
    assert Plan.from_yaml("kv_first: False\nrecompute_last: ~") == Plan()


# -- the model --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans())
def test_a_model_of_the_divisors_is_divided(plan: Plan) -> None:
    """And one of any smaller part is refused, with the size that does not divide."""
    sizes: dict[Size, int] = {size: math.prod(plan.divisors(size)) for size in get_args(Size)}
    check(plan, sizes)
    for size in sizes:
        if any(by > 1 for by in plan.divisors(size)):
            with pytest.raises(CinemeshError, match="it must be 0; choose ") as refused:
                check(plan, {**sizes, size: sizes[size] + 1})
            assert (refused.value.what, refused.value.value) == (size, sizes[size] + 1)


def check(plan: Plan, sizes: Mapping[Size, int]) -> None:
    text = {"ul2": sizes["text"]}
    plan.check_model(heads=sizes["heads"], ffn=sizes["ffn"], tokens=sizes["tokens"], text_widths=text, latent="1x1x1")


# -- what people read -------------------------------------------------------------------------------------------------


def test_what_the_tuner_tries_is_legal() -> None:
    for name, knob in KNOBS.items():
        assert all(replace(ON_EVERY_AXIS, **{name: value}) for value in knob.tries)
        assert all(other in KNOBS and KNOBS[other].tries for other in knob.tried_with)


def table(group: type) -> Iterator[str]:
    """The knobs of a group as Markdown."""
    yield "| field | may be | what it does | bounded by | acts over | tuner tries |"
    yield "|---|---|---|---|---|---|"
    for name, knob in knobs(group).items():
        off = "" if knob.off == knob.default else f", off {knob.write(knob.off)}"
        default = f"default {knob.write(knob.default) or 'none'}{off}"
        groups = [", ".join(knob.axes)] if knob.axes else []
        if isinstance(knob, SomeOf):
            groups = [f"{each}: {', '.join(axes)}" for each, axes in knob.groups.items()]
        bounds = [knob.bound] if knob.bound else []
        for demand in knob.divides:
            bounds.append(f"{' * '.join(demand.by)} divides {' / '.join((demand.size, *demand.after))}")
        bounds += [f"not with `{rival}`" for rival in knob.rivals]
        tries = ", ".join(knob.write(value) for value in knob.tries)
        cells = (f"`{name}`", f"{knob.values}; {default}", knob.does, "; ".join(bounds), "; ".join(groups), tries)
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def written(text: str) -> str:
    """The page with its tables as the knobs have them."""
    for group in FIELDS:
        start, end = f"<!-- {group.__name__}: written by test_knobs.py -->", f"<!-- end of {group.__name__} -->"
        assert text.count(start) == text.count(end) == 1, f"docs/overlap.md has one table of {group.__name__}"
        before, after = text.partition(start)[0], text.partition(end)[2]
        text = "\n".join((before + start, *table(group), end + after))
    return text


def test_the_page_has_the_tables_of_the_knobs() -> None:
    assert DOCS.read_text() == written(DOCS.read_text()), f"run {Path(__file__).relative_to(DOCS.parents[1])}"


if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text()))
