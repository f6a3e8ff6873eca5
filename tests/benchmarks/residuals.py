"""How wrong the prices are on published steps, by every way that a plan is predicted in: what error bars are made of.

    python tests/benchmarks/residuals.py

Writes ``perf_model/published/residuals.csv``. Half an hour: the constants are fitted once for every source left out.
Every row of trust A is predicted with its source left out of the fit; the same by the default stack, as if nothing
were known of its software but its day; and by the default stack with the parts of a peak and the small constants of the
other chip (H100 for A100 and the reverse), without and with its attention, scaled by the two peaks, as a file that
inherits has them. Rows of trust B are predicted by the default stack.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

from cinemesh.files import atomic_file
from cinemesh.perf_model.calibration import fit
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.clusters.schema import AttentionFamily, PassConstants
from cinemesh.perf_model.published import validate
from cinemesh.perf_model.published.evidence import RESIDUALS, VALIDATED, Residual, Way, chip_of
from cinemesh.perf_model.published.rows import TRUSTED, RowCase, Unpredictable, case_of, read

A100, H100 = "dgx-a100-hdr200", "dgx-h100-ib400"


def cases(trust: tuple[str, ...] = TRUSTED) -> Iterator[RowCase]:
    """Steps and layers of trust A, or another."""
    for row in read(validate.ROWS):
        if row["kind"] in ("training_step", "layer") and (row.get("trust") or "") in trust:
            try:
                yield case_of(row)
            except Unpredictable:
                continue


def inheriting(cluster: Cluster, other: Cluster, way: Way) -> Cluster:
    """A chip with its own peaks, SMs, memory and links, and all else of the other chip, or all but attention."""
    ratio = cluster.gpu.peak_flops["bfloat16"] / other.gpu.peak_flops["bfloat16"]

    def scaled(law: PassConstants) -> PassConstants:
        return replace(law, speed={dim: speed * ratio for dim, speed in law.speed.items()})

    def whole(part: dict[str, float]) -> dict[str, float]:
        return {dtype: part.get(dtype, part["bfloat16"]) for dtype in cluster.gpu.peak_flops}

    return replace(
        cluster,
        gpu=replace(cluster.gpu, sustained=whole({**other.gpu.sustained})),
        matmul=replace(other.matmul, grid="", efficiency=whole({**other.matmul.efficiency})),
        stream=other.stream,
        launch=other.launch,
        overlap=other.overlap,
        spread=other.spread,
        attention=cluster.attention
        if way is Way.OTHER_CHIP
        else {
            name: AttentionFamily(forward=scaled(family.forward), backward=scaled(family.backward))
            for name, family in other.attention.items()
        },
    )


def by_other_chip(found: list[RowCase]) -> Iterator[Residual]:
    """Rows of the two chips, each by the other's numbers."""
    others = {A100: load(H100), H100: load(A100)}
    for case in found:
        chip = chip_of(case.cluster)
        if chip in others:
            plain = case_of(case.row, described=False)
            for way in (Way.OTHER_CHIP, Way.OTHER_KERNEL):
                moved = replace(plain, cluster=inheriting(case.cluster, others[chip], way))
                yield residual(case, way, validate.timed(moved, validate.Predictor().seconds(moved)).error)


def with_a_gap() -> Iterator[Residual]:
    """Rows that leave one thing out, which no fit has seen."""
    for case in cases(("B",)):
        plain = case_of(case.row, described=False)
        yield residual(case, Way.GAP, validate.timed(plain, validate.Predictor().seconds(plain)).error)


def residual(case: RowCase, way: Way, error: float) -> Residual:
    chip = chip_of(case.cluster)
    assert chip is not None, f"{case.id}: none of {VALIDATED}"
    return Residual(case.id, case.source, chip, case.run.stack.attention, way, error)


def left_out(found: list[RowCase]) -> Iterator[Residual]:
    """With each source left out of the fit; minutes."""
    by_id = {case.id: case for case in found}
    for made in fit.refit(found, lambda what: print(what, file=sys.stderr, flush=True)):
        for way, predictions in ((Way.HELD_OUT, made.held_out), (Way.UNDESCRIBED, made.undescribed)):
            yield from (residual(by_id[p.id], way, p.error) for p in predictions)


def write(rows: list[Residual]) -> None:
    text = io.StringIO()
    text.write(
        f"# Predicted over measured, less one, of published steps: tests/benchmarks/residuals.py, {date.today()}.\n"
    )
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("id", "source", "chip", "family", "way", "error"))
    out.writerows((r.id, r.source, r.chip, r.family, r.way.value, f"{r.error:.4f}") for r in rows)
    with atomic_file(RESIDUALS) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    published = list(cases())
    write([*left_out(published), *with_a_gap(), *by_other_chip(published)])
