"""The paper's Table 3 as it stands here, by the paper's own sums."""

from __future__ import annotations

import pytest

from cinemesh.perf_model.published.paper import STAGES

SEEN = (1.94e9, 173.6e6, 221.2e6, 30.1e6, 16.9e6, 12.2e6, 14.6e6)  # Table 3, samples seen by the end of each row


@pytest.mark.parametrize(("stage", "seen"), [*zip(STAGES, SEEN, strict=True)])
def test_steps_of_a_row_are_the_samples_that_it_has_seen(stage: object, seen: float) -> None:
    """A slip in GPUs, degrees, batch or steps changes one side alone: the paper counts samples in another column."""
    assert stage.steps * stage.global_batch == pytest.approx(seen, rel=0.02)  # type: ignore[attr-defined]
    data_ranks = stage.gpus / (stage.tp * stage.cp)  # type: ignore[attr-defined]
    assert stage.global_batch == stage.samples * data_ranks  # type: ignore[attr-defined]


def test_totals_are_the_paper_s() -> None:
    """The one number of the table that its own totals contradict would show here."""
    steps = {name: sum(s.steps for s in STAGES if s.name.startswith(name)) for name in ("256 px T2I/V", "768 px")}
    assert steps == {"256 px T2I/V": 185_000, "768 px": 74_500}
