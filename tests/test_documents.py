"""The one reader of YAML and JSON: what looks like something else is refused or stays text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cinemesh import documents
from cinemesh.documents import mapping, parse_json, parse_yaml, read_json, read_yaml, write_yaml
from cinemesh.errors import CinemeshError

ROOT = Path(__file__).parent.parent


def read(text: str) -> Any:
    return parse_yaml(text, "the recipe x", "mend it")


@pytest.mark.parametrize(
    "word",
    [
        *("off", "on", "yes", "no", "Off", "ON", "Yes", "NO", "y", "n"),
        *("1:30", "010", "-012", "1_000", "0x10", "0b1", "0o7", "190:20:30", "1.5_0", "+.5.", "01.5"),
        *(".inf", "-.INF", ".nan", ".NaN", "1e999", "9" * 101, "٣", "2024-01-01", "<<", "="),
    ],
)
def test_what_yaml_1_1_would_guess_stays_text(word: str) -> None:
    """As a value, in a list, and as a key: ``off`` is the word off."""
    assert read(f"a: {word}") == {"a": word}
    assert read(f"[{word}]") == [word] and read(f"{word}: 1") == {word: 1}


def test_plain_values_are_what_they_look_like() -> None:
    told = read("{a: 1, b: -2, c: 2e-3, d: .5, e: 1., f: true, g: False, h: ~, i: null, j: , k: '1', l: \"on\", 7: +8}")
    assert told == {
        **{"a": 1, "b": -2, "c": 0.002, "d": 0.5, "e": 1.0, "f": True, "g": False, "h": None, "i": None, "j": None},
        **{"k": "1", "l": "on", "7": 8},
    }
    assert [type(told[key]) for key in "acf"] == [int, float, bool]
    assert read("") is None and read("# nothing") is None


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 10)}]\n" for below, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: {c: 1,\n  c: 2}", "line 3: key 'c' is given twice"),
        ("1: a\n'1': b", "line 2: key '1' is given twice"),
        ("a: !!int 3", "line 1: the tag 'tag:yaml.org,2002:int' is not read"),
        ("!!str a: 3", "line 1: a key must be a plain word"),
        ("? [a]\n: 3", "line 1: a key must be a plain word"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins"),
        ("a: &x [*x]", "line 1: nothing complete is named &x"),
        ("a: *x", "line 1: nothing complete is named &x"),
        ("[" * 99 + "]" * 99, "more than 64 mappings and lists in one another"),
        ("[" * 100_000, "nesting"),
        (BOMB, "line 7: more than 5,000,000 values, those of aliases counted each time"),
        ("a: [", "did not find expected node content"),
        ("a: \x00", "control characters are not allowed"),
        ("\udc80", "surrogates not allowed"),
    ],
)
def test_what_is_refused_says_where(text: str, problem: str) -> None:
    with pytest.raises(CinemeshError) as refused:
        read(text)
    assert str(refused.value).startswith("the recipe x is not valid YAML: ") and str(refused.value).endswith(
        "; mend it"
    )
    assert problem in str(refused.value) and "\n" not in str(refused.value)


def test_aliases_stand_for_what_they_name() -> None:
    assert read("a: &a {b: 1}\nc: [*a, *a]") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": {"b": 1, "b": 2}}', "key 'b' is given twice"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[" * 100_000, "recursion"),
        ("9" * 5000, "integer string conversion"),
        ('"\\ud800"', "surrogates not allowed"),
        ("{", "Expecting property name"),
    ],
)
def test_json_is_held_to_the_same(text: str, problem: str) -> None:
    with pytest.raises(CinemeshError) as refused:
        parse_json(text, "the card x", "mend it")
    assert problem in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("reader", [read_yaml, read_json])
def test_what_is_no_text_file_is_one_message(reader: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "bytes", tmp_path / "bytes" / "below", Path("a\0b")):
        with pytest.raises(CinemeshError, match=r"cannot read the recipe .*; mend it"):
            reader(path, "the recipe", "mend it")


def test_a_file_without_an_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 1000)
    with pytest.raises(CinemeshError, match="the recipe /dev/zero has more than 1,000 bytes"):
        read_yaml(Path("/dev/zero"), "the recipe", "mend it")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "a.yaml", "the recipe", "mend it") == {"a": 1}


def test_keys_of_a_mapping() -> None:
    assert mapping({"a": 1}, "x", ("a", "b"), required=("a",)) == {"a": 1}
    for value, message in (
        ([1], "x holds no mapping but [1]; give it alpha, beta"),
        ({"alpah": 1}, "x: unknown key 'alpah'; did you mean 'alpha'? Known: alpha, beta"),
        ({"alpha": 1}, "x has no beta; add it"),
    ):
        with pytest.raises(CinemeshError) as refused:
            mapping(value, "x", ("alpha", "beta"), required=("beta",))
        assert str(refused.value) == message


plain = st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")))
shapes = st.recursive(
    plain | texts | st.sampled_from(("off", "1e5", "1:30", "010", "~", "", "1.", ".5")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(shapes)
def test_what_is_written_is_read_back(values: Any) -> None:
    """Exactly, with every type; and a reader of YAML 1.1 sees the same texts."""

    def typed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: typed(inner) for key, inner in value.items()}
        return [typed(inner) for inner in value] if isinstance(value, list) else (type(value), value)

    text = write_yaml({"values": values, "again": values})
    assert typed(read(text)) == typed({"values": values, "again": values})
    if isinstance(values, str):
        assert yaml.safe_load(text)["values"] == values


def test_every_shipped_file_reads_as_pyyaml_reads_it() -> None:
    """But for dates, which are texts here, and keys, which always are: the rules cost no file of ours its meaning."""

    def as_here(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): as_here(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [as_here(inner) for inner in value]
        return value if isinstance(value, str | int | float | None) else value.isoformat()

    folders = ("configs", "kernels/tuning", "perf_model/clusters", "perf_model/published")
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.yaml"))]
    assert len(paths) > 12
    for path in paths:
        here = read_yaml(path, "the file", "mend it")
        assert here == as_here(yaml.load(path.read_text(), Loader=yaml.CSafeLoader)), path


def test_a_name_without_end_is_shown_in_part(tmp_path: Path) -> None:
    """The operating system's own message repeats the whole path."""
    with pytest.raises(CinemeshError, match="cannot read the recipe") as error:
        read_yaml(tmp_path / ("x" * 5000), "the recipe", "mend it")
    assert len(str(error.value)) < 500
