"""``curate``: a training set from raw videos and images, and the page that explains it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...data.curate.captions import too_long
from ...data.curate.engine import Engine
from ...data.curate.pipeline import CURATED, Curation
from ...data.curate.report import REPORT, CurationReport, write_report
from ...data.curate.settings import settings_of
from ...data.text import build_encoders
from ...documents import read_yaml
from ...files import check_output_folder
from ..progress import counted
from ..tables import new_console
from ..training.recipe import read_config
from ..training.sections import override
from ..written import wrote


def run(
    *,
    config: Path,
    out: Path,
    workers: int,
    engine: str,
    recipe: Path | None,
    overrides: Sequence[str],
    as_json: bool,
) -> None:
    """Curate into ``out`` and print the funnel. Raises CinemeshError."""
    values = read_yaml(config, "the curation", "a curation is a YAML file with sources and a preset")
    if isinstance(values, dict):
        override(values, overrides)
    settings = settings_of(values, str(config))
    encoders = [] if recipe is None else build_encoders(read_config(recipe).data.encoders)
    check_output_folder(out, "--out")
    with Engine(engine, workers) as engines, counted("curate", silent=as_json) as told:
        outcome = Curation(settings, out, engines, told).run()
    report = CurationReport(settings, outcome, too_long(outcome.kept, encoders))
    write_report(out / REPORT, report)
    if as_json:
        print(json.dumps(report.values(), indent=1))
        return
    console = new_console()
    for kind in report.kinds:
        console.print(report.text(kind))
    for name, told_of in report.cut_captions.items():
        console.print(f"{name}: {told_of['cut']} captions are longer than {told_of['tokens']} tokens")
    wrote(out / CURATED, f"open {out / REPORT}", f"{len(outcome.kept)} of {len(outcome.rows)} clips and files")
