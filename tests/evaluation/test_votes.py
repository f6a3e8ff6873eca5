"""Prompts, keys and votes in files: what is read, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from judged import changed_key, key_of, votes_for, written

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.axes import Media, all_axes, axes_of
from cinemesh.evaluation.bench import BENCH, BenchPrompt, read_prompts
from cinemesh.evaluation.votes import KEY_FILE, Answer, Vote, read_key, read_votes

ROOT = Path(__file__).resolve().parents[2]


def refused(call: object, *args: object) -> str:
    with pytest.raises(CinemeshError) as wrong:
        call(*args)  # pyright: ignore[reportCallIssue]
    assert "\n" not in str(wrong.value) and wrong.value.remedy
    return str(wrong.value)


def test_the_bench_that_ships_has_five_concepts_at_three_levels_of_motion() -> None:
    prompts = read_prompts(BENCH)
    strata = {(prompt.concept, prompt.motion) for prompt in prompts}
    assert len({concept for concept, _ in strata}) == 5 and {motion for _, motion in strata} == {
        "low",
        "medium",
        "high",
    }
    assert len(strata) == 15 and len(prompts) == 30
    assert all(prompt.name.startswith(f"{prompt.concept}-{prompt.motion}-") for prompt in prompts)


def test_the_axes_are_the_papers() -> None:
    """Three raters, six for realness and aesthetics; reasons of alignment and of overall quality."""
    found = {axis.name: (axis.raters, [*axis.reasons]) for axis in axes_of(Media.VIDEO)}
    assert found == {
        "alignment": (3, ["subject", "motion"]),
        "overall": (3, ["consistency", "completeness", "naturalness"]),
        **{name: (3, []) for name in ("consistency", "completeness", "naturalness")},
        **{name: (6, []) for name in ("realness", "aesthetics")},
    }
    assert [axis.name for axis in axes_of(Media.IMAGE)] == ["faithfulness", "flaws"]
    assert [axis.name for axis in axes_of(Media.VIDEO, ["realness", "overall"])] == ["overall", "realness"]
    assert all(axis.question.endswith("?") and axis.guideline for axis in all_axes().values())
    assert "did you mean 'realness'" in refused(axes_of, Media.VIDEO, ["realnes"])
    assert "no axis of a pair of images" in refused(axes_of, Media.IMAGE, ["overall"])


def test_prompts_are_read_from_yaml_and_jsonl(tmp_path: Path) -> None:
    """The same from both; one without a name has its number, as the clips of the published bench are called."""
    (tmp_path / "a.yaml").write_text("- prompt: A dog.\n- {name: 7, prompt: A cat., motion: low}\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "A dog."}\n\n{"name": "7", "prompt": "A cat.", "motion": "low"}\n')
    for name in ("a.yaml", "a.jsonl"):
        assert read_prompts(tmp_path / name) == [BenchPrompt("0", "A dog."), BenchPrompt("7", "A cat.", motion="low")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- prompt: a\n- prompt: a\n", "prompts 1 and 2 of {} have the same prompt, 'a', and a prompt counts once"),
        ("- {name: x, prompt: a}\n- {name: x, prompt: b}\n", "prompts 1 and 2 of {} have the same name, 'x'"),
        ("- {prompt: a, motion: fast}\n", "prompt 1 of {}: motion is 'fast'; it is one of low, medium, high"),
        ("- {prompt: a, concpt: b}\n", "unknown key 'concpt'; did you mean 'concept'?"),
        ("- {name: ../x, prompt: b}\n", "name is '../x', and files are called after it"),
        ("- prompt: ''\n", "prompt is ''"),
        ("- prompt: [a]\n", "prompt is ['a']"),
        ("- a dog\n", "holds no mapping but 'a dog'"),
        ("[]\n", "{} holds no prompt"),
        ("prompt: a\n", "{} holds no list of prompts"),
    ],
)
def test_prompts_that_are_wrong_are_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(text)
    assert says.format(path) in refused(read_prompts, path)
    assert "ends in none of .yaml, .yml, .jsonl" in refused(read_prompts, tmp_path / "bench.csv")


def test_a_key_and_votes_come_back_as_they_were(tmp_path: Path) -> None:
    key = key_of()
    votes = votes_for(key, "new")
    path = written(tmp_path, key, votes)
    assert read_key(tmp_path / KEY_FILE) == key and read_votes(path, key) == votes


def test_the_last_vote_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    """A rater who went back, and a crash in the middle of writing."""
    key = key_of()
    first, changed = Vote("p0", "a", "overall", Answer.LEFT), Vote("p0", "a", "overall", Answer.TIE)
    path = written(tmp_path, key, [first, Vote("p0", "b", "overall", Answer.LEFT), changed])
    path.write_text(path.read_text() + '{"pair": "p1", "ra')
    found = read_votes(path, key)
    assert len(found) == 2 and found[0] == changed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pair": "p9"}, "'p9' is no pair of the key"),
        ({"axis": "beauty"}, "axis 'beauty' is not the key's"),
        ({"answer": "both"}, "answer is 'both'; known: left, tie, right"),
        ({"reason": "subject"}, "'subject' is no reason of overall; known: consistency, completeness, naturalness"),
        ({"rater": " "}, "rater is ' '"),
        ({"rater": 3}, "rater is 3"),
        ({"at": "x"}, "unknown key 'at'"),
    ],
)
def test_a_vote_that_is_none_is_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    key = key_of()
    path = written(tmp_path, key, [])
    path.write_text(json.dumps({"pair": "p0", "rater": "a", "axis": "overall", "answer": "left"} | changes) + "\n")
    assert f"line 1 of {path}: {says}" in refused(read_votes, path, key)


def test_a_key_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """A prompt twice for the same systems above all: it would count twice."""
    key = key_of()
    written(tmp_path, key, [])
    path = tmp_path / KEY_FILE
    pairs = json.loads(path.read_text())["pairs"]

    def says(**changes: object) -> str:
        key.write(path)
        return refused(read_key, changed_key(tmp_path, **changes))

    twice = says(pairs=[*pairs, pairs[0] | {"name": "x"}])
    assert "pairs p0 and x have the same prompt and systems" in twice and '"repeats": "p0"' in twice
    assert "two pairs are named 'p0'" in says(pairs=[*pairs, pairs[0]])
    assert "pair x repeats 'p1', no earlier pair" in says(pairs=[*pairs, pairs[0] | {"name": "x", "repeats": "p1"}])
    assert "is of 'old'" in says(systems={"new": 1})
    assert "new is the best of 0" in says(systems={"new": 0, "old": 1})
    assert "holds no pair of two systems" in says(pairs=[])
    assert "media is 'film'" in says(media="film")
    assert "holds no vote" in refused(read_votes, tmp_path / "votes.jsonl", key)


def test_evaluation_loads_without_torch() -> None:
    """Votes are scored where no torch is; numpy is all it needs besides what planning has."""
    files = [path for path in (ROOT / "evaluation").glob("*.py") if path.stem != "reconstruction"]  # compares pixels
    names = [f"cinemesh.evaluation.{path.stem}" for path in files]
    assert len(names) > 5
    refuse = "import sys; sys.modules['torch'] = sys.modules['triton'] = None; import importlib\n"
    code = refuse + f"for name in {sorted(names)!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
