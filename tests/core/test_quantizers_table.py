"""The page of quantizers says what the registries hold."""

from tests.core.quantizers_table import MARK, PAGE, TABLES, page


def test_the_page_is_current() -> None:
    text = PAGE.read_text()
    assert {found[1] for found in MARK.findall(text)} == set(TABLES)
    assert page(text) == text, "run `python -m tests.core.quantizers_table`"
