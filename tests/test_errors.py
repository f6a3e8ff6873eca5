"""An error's fields: what code acts on, and what survives the way from one process to another."""

from __future__ import annotations

import pickle

import pytest

from cinemesh.errors import CinemeshError, did_you_mean, in_a_line
from cinemesh.parallel.ir.plan import Plan


def test_the_message_is_problem_and_remedy() -> None:
    assert str(CinemeshError("tp is 0", remedy="raise it")) == "tp is 0; raise it"
    assert str(CinemeshError("tp is 0")) == "tp is 0"


def test_fields_survive_the_way_to_another_rank() -> None:
    error = CinemeshError("tp is 0", remedy="raise it", what="tp", value=0, rule="at least 1")
    sent = pickle.loads(pickle.dumps(error))
    assert isinstance(sent, CinemeshError) and vars(sent) == vars(error) and str(sent) == str(error)


def test_a_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(CinemeshError) as refused:
        Plan(tp=5).check_model(heads=48, ffn=10, tokens=40, text_widths={}, latent="1x1x1")
    assert (refused.value.what, refused.value.value) == ("heads", 48)
    assert refused.value.problem == refused.value.rule == "heads(48) % tp(5) = 3, it must be 0"
    assert refused.value.remedy == "choose a tp that divides the heads"


def test_what_a_library_says_fits_in_a_line() -> None:
    error = RuntimeError("CUDA error:   busy\n\n  Compile with\tdebugging\n")
    assert in_a_line(error) == "CUDA error: busy Compile with debugging"
    assert in_a_line(error, lines=1) == "CUDA error: busy"
    assert in_a_line(error, most=4) == "CUDA..."
    assert in_a_line(KeyError()) == "KeyError"


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known() -> None:
    assert did_you_mean("tpp", ("tp", "cp")) == "did you mean 'tp'? Known: tp, cp"
    assert did_you_mean(3, ("tp", "cp")) == "known: tp, cp"
