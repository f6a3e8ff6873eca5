"""docs/recipe.md says of every key what its field says."""

from pathlib import Path

from cinemesh.launch.training.recipe_page import page

COMMITTED = Path(__file__).parents[3] / "docs" / "recipe.md"


def test_the_page_is_what_the_fields_say() -> None:
    """A key that is added, renamed or bounded anew and not told: ``python -m cinemesh.launch.training.recipe_page``."""
    assert COMMITTED.read_text(encoding="utf-8") == page()


def test_the_page_tells_every_key_with_its_range_and_reason() -> None:
    """Of a number, of a choice, of a knob, of a key that is required, of one in a list."""
    lines = COMMITTED.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| `") for line in lines) > 70
    for said in (
        "| `steps` | of the run | required | 1 to 10,000,000 steps | a run draws the buckets of all",
        "| `decay` | of the learning rate after the warm-up; plateau: cut whenever the validation loss stands still | "
        "`cosine` | `cosine`, `constant`, `plateau` |",
        "| `prefetch` | a unit is gathered while",
        "| `tokens` | embeddings of every caption; a longer one is cut | `64` | 1 to 4,096 tokens |",
        "| `betas` | decay of the first and the second moment | `[0.9, 0.95]` | 2 of any number, 0 to 0.99999994 |",
    ):
        assert any(line.startswith(said) for line in lines), said
