"""``rewrite make``, ``serve``, ``export``, ``score``: prompts in the words of training captions (torch-free)."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ...errors import CinemeshError
from ...files import check_output_folder
from ..progress import progress
from ..rewritten import read_rewriter, rewrite_all, write_prompts
from ..tables import new_console, plain_table
from ..written import command, wrote

SHOWN = 3  # problems below the table


def run_make(*, rewriter: Path, prompt: str | None, prompts: Path | None, out: Path | None) -> None:
    """Print one rewritten prompt, or write those of a file into a folder. Raises CinemeshError."""
    if (prompt is None) == (prompts is None):
        raise CinemeshError("rewrite make takes --prompt or --prompts", remedy="give one of them")
    if prompt is not None:
        if out is not None:
            raise CinemeshError("--out is for --prompts: one prompt is printed", remedy="leave it out")
        if not prompt.isprintable():
            raise CinemeshError(f"--prompt {prompt!r:.100} is no line of text", remedy="write it in UTF-8")
        print(rewrite_all(read_rewriter(rewriter), {"the prompt": prompt})["the prompt"].text)
        return
    if out is None:
        raise CinemeshError("--prompts makes several files", remedy="name a folder for them with --out")
    from ...evaluation.bench import read_prompts
    from ...evaluation.rewriting.review import PROMPTS_FILE, check_review, write_review

    assert prompts is not None
    asked, by = read_prompts(prompts), read_rewriter(rewriter)
    check_output_folder(out, "--out")
    check_review(out)
    found = rewrite_all(by, {each.name: each.prompt for each in asked})
    write_review(out, by, found)
    (out / PROMPTS_FILE).unlink(missing_ok=True)
    write_prompts(out / PROMPTS_FILE, found)
    wrote(out, command("rewrite", "serve", out), f"{PROMPTS_FILE} is for sample --prompts")


def run_serve(*, folder: Path, port: int) -> None:
    """Serve until Ctrl-C. Raises CinemeshError for a folder without rewrites, and where the port is taken."""
    from ...evaluation.rewriting.review_page import ReviewServer

    server = ReviewServer(folder, port)
    then = command("rewrite", "export", folder, out=f"{folder}-pairs")
    print(f"review at {server.address}, end with Ctrl-C; next: {then}", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def export_chats(*, folder: Path, out: Path, held_out: float, seed: int) -> None:
    """Write what passed as chats. Raises CinemeshError where too little did."""
    from ...evaluation.rewriting.review import export_pairs, passed_pairs, read_review, read_verdicts

    review = read_review(folder)
    verdicts = read_verdicts(folder, review)
    train, apart = export_pairs(out, passed_pairs(review, verdicts), review.guideline, held_out, seed)
    left = len(review.proposals) - train - apart
    about = f"{train} pairs to train on, {apart} held out, {left} rejected or without a verdict"
    wrote(out, "fine-tune a student as docs/prompts.md says", about)


def run_score(*, rewriter: Path, pairs: Path, as_json: bool) -> None:
    """Print how the rewriter does on the pairs. Raises CinemeshError."""
    from ...evaluation.rewriting.held_out import score_rewriter
    from ...evaluation.rewriting.review import read_pairs_of

    by = read_rewriter(rewriter)
    given = read_pairs_of(pairs, by.guideline)
    with progress("scoring", len(given)) as begin:
        found = score_rewriter(by, given, begin)
    if as_json:
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return
    console = new_console()
    table = plain_table("prompts", "schema", "passed", "facts kept", "words kept", "overlap", right=("prompts",))
    shares = (found.schema, found.passed, found.facts_kept, found.words_kept, found.overlap)
    table.add_row(str(found.prompts), *(f"{share:.0%}" for share in shares))
    console.print(table)
    console.print(
        "of first answers. Schema: the JSON object that was asked for. Passed: keeps every rule. Facts kept: every "
        "quoted text, number and name. Words kept: of the prompt. Overlap: F1 of words with what people let pass."
    )
    if found.broken:
        console.print("broken: " + ", ".join(f"{rule} {count}" for rule, count in sorted(found.broken.items())))
    for prompt, problem in [*found.problems.items()][:SHOWN]:
        console.print(f"{prompt!r:.60}: {problem}", markup=False)
