"""How often the interval of a net win rate covers the truth, and how long 1,000 pairs take to score.

    python tests/benchmarks/judged_coverage.py [--runs 10000] [--out FILE]

Each run draws prompts anew from a population whose raters are known (tests/judged.py), with a side bias of 0.1, and
asks ``net_win`` for its interval; the truth is the expected majority of raters without bias, over the whole population.
A stratified bench has as many prompts of each of 15 strata, which raters see differently, and its truth is the mean of
theirs: an interval that took the strata for chance would cover more.
Exit code 1 where an interval covers it in less or more than 95 +- 1.5 % of the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from judged import honest_net_win, key_of, preferences, vote

from cinemesh.evaluation.net_win import LEVEL, RESAMPLES, net_win, net_wins
from cinemesh.evaluation.score import score_votes
from cinemesh.evaluation.votes import Answer, Vote

PROMPTS = (50, 381, 1003)  # a small bench, and the paper's two
MEANS = (0.65, 0.5)  # of the preferences for the first system: a better one, and one against itself
EVEN = 0.5
STRATA = tuple(np.linspace(0.25, 0.85, 15))  # means of the preferences in five concepts at three levels of motion
FEWER = 0.2  # of the runs, for a system against itself, where all but the truth is as above, and for strata
RATERS, BIAS = 3, 0.1
ALLOWED = 0.015  # of the coverage, above and below
POPULATION = 4_000_000  # prompts from which the truth is computed: its own error is below 0.0003


def coverage(prompts: int, mean: float, runs: int) -> dict[str, float]:
    random = np.random.Generator(np.random.Philox(key=prompts))
    truth = float(honest_net_win(preferences(mean, POPULATION, random), RATERS).mean()) if mean != EVEN else 0.0
    found = [
        net_win(*vote(preferences(mean, prompts, random), BIAS, RATERS, random), seed=run) for run in range(runs)
    ]  # fmt: skip
    values = np.array([net.value for net in found])
    below, above = (
        sum(truth < net.low for net in found if net.low is not None),
        sum(truth > net.high for net in found if net.high is not None),
    )
    return {
        "prompts": prompts,
        "truth": round(truth, 4),
        "runs": runs,
        "covered": round(1 - (below + above) / runs, 4),
        "below": below,
        "above": above,
        "value_less_truth": round(float(values.mean()) - truth, 5),
        "its_std": round(float(values.std()) / math.sqrt(runs), 5),
        "side_bias": round(float(np.mean([net.side_bias for net in found if net.side_bias is not None])), 4),
        "as_voted_less_truth": round(
            float(np.mean([(net.wins - net.losses) / net.prompts for net in found])) - truth, 5
        ),
    }


def stratified(prompts: int, runs: int) -> dict[str, float]:
    """Of benches with 15 strata, as ``coverage`` of those without; ``plain``: of intervals that know of no strata."""
    random = np.random.Generator(np.random.Philox(key=prompts))
    each = [len(part) for part in np.array_split(np.arange(prompts), len(STRATA))]
    truths = [honest_net_win(preferences(mean, POPULATION // 15, random), RATERS).mean() for mean in STRATA]
    truth = float(np.dot(truths, each) / prompts)
    strata = [stratum for stratum, count in enumerate(each) for _ in range(count)]
    covered = plain = 0
    for run in range(runs):
        of = np.concatenate([preferences(mean, n, random) for mean, n in zip(STRATA, each, strict=True)])
        votes, left = vote(of, BIAS, RATERS, random)
        net, _ = net_wins(votes, left, strata, {}, seed=run)
        other = net_win(votes, left, seed=run)
        assert net.low is not None and net.high is not None and other.low is not None and other.high is not None
        covered += net.low <= truth <= net.high
        plain += other.low <= truth <= other.high
    return {
        "prompts": prompts,
        "strata": len(STRATA),
        "truth": round(truth, 4),
        "runs": runs,
        "covered": round(covered / runs, 4),
        "covered_without_strata": round(plain / runs, 4),
    }


def scoring_s() -> float:
    """CPU seconds for 1,000 pairs of 15 strata, three votes each on every axis of a video."""
    key = key_of(1000, checks=False)
    for i, (name, pair) in enumerate(key.pairs.items()):
        key.pairs[name] = replace(pair, concept=f"concept {i % 5}", motion=f"motion {i // 5 % 3}")
    random = np.random.Generator(np.random.Philox(key=1))
    answers = random.choice([*Answer], (len(key.axes), len(key.pairs), RATERS))
    votes = [
        Vote(pair, f"rater {r}", axis.name, Answer(answers[a, p, r]))
        for a, axis in enumerate(key.axes)
        for p, pair in enumerate(key.pairs)
        for r in range(RATERS)
    ]
    begin = time.process_time()
    score_votes(votes, key)
    return time.process_time() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for prompts in PROMPTS:
        for mean in MEANS:
            rows.append(coverage(prompts, mean, asked.runs if mean != EVEN else round(FEWER * asked.runs)))
            print(rows[-1], flush=True)
    for prompts in PROMPTS:
        rows.append(stratified(prompts, round(FEWER * asked.runs)))
        print(rows[-1], flush=True)
    seconds = sorted(scoring_s() for _ in range(5))[2]
    print(f"1,000 pairs scored in {seconds:.2f} CPU seconds")
    if asked.out:
        result = {
            "date": str(date.today()),
            "machine": "2-core x86-64, no GPU",
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "raters": RATERS,
            "side_bias": BIAS,
            "resamples": RESAMPLES,
            "rows": rows,
            "scoring_1000_pairs_of_7_axes_cpu_s": round(seconds, 2),
        }
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(abs(row["covered"] - LEVEL) > ALLOWED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
