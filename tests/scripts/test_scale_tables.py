"""The tables of docs/scale.md are what the plan counts."""

from scripts.scale_tables import PAGE, with_tables


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run python scripts/scale_tables.py"
