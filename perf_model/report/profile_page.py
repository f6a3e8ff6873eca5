"""The HTML page of a profile: one file, style and bars inside it, nothing fetched (torch-free)."""

from __future__ import annotations

from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from .explain import describe
from .page import page_templates
from .profiling import StepProfile


def render_profile(about: str, cluster: Cluster, plan: Plan, profile: StepProfile, ranks: int) -> str:
    """The page as text."""
    environment = page_templates()
    environment.filters["ms"] = lambda seconds: f"{1e3 * seconds:.3g}" if seconds < 1.0 else f"{1e3 * seconds:,.0f}"
    longest = max(max(row.ran_s, row.predicted_ran_s) for row in profile.rows)
    return environment.get_template("profile.html").render(
        about=about, cluster=cluster, plan=describe(plan), profile=profile, ranks=ranks, longest=longest
    )
