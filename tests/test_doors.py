"""What is wrong is answered by one message and exit code 2: 700 inputs, thousands in ``tests/benchmarks``."""

import sys
import warnings
from pathlib import Path

import pytest
from doors import DOORS, GOOD, knock, knock_often

CASES = {
    "dry run": 15,
    "machine": 15,
    "job": 30,
    "judged systems": 15,
}  # a door, of those that take longest; of the others:
USUAL_CASES = 46
SEED = 7


@pytest.mark.parametrize("name", DOORS)
def test_a_door_answers_what_is_wrong_with_one_message(name: str, tmp_path: Path) -> None:
    """No traceback, no other exit code, no file left, whatever is put in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, wrong = knock_often(name, CASES.get(name, USUAL_CASES), SEED, tmp_path)
    assert wrong == []


@pytest.mark.parametrize("name", DOORS)
def test_a_door_opens_for_what_is_right(name: str, tmp_path: Path) -> None:
    """A door that refuses everything would pass every other test."""
    assert knock(name, GOOD[name], tmp_path, code=0) == (0, None)


def test_a_traceback_a_second_message_and_a_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def door(given: str, folder: Path) -> int:
        if given == "raise":
            raise KeyError(given)
        if given == "leave":
            (folder / "half").write_text("x")
        print("error: a\n" * (2 if given == "twice" else 1), file=sys.stderr)
        return 3 if given == "code" else 2

    monkeypatch.setitem(DOORS, "planted", (DOORS["recipe"][0], door))
    told = {given: knock("planted", given, tmp_path)[1] or "" for given in ("raise", "twice", "code", "leave")}
    assert "KeyError" in told["raise"] and "2 messages" in told["twice"]
    assert "exit code 3" in told["code"] and "it left {'half'}" in told["leave"]
