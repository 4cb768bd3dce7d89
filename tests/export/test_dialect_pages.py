"""The pages of the dialects are what the schemas say."""

import pytest

from lightning_linger.export.linger import OLDER_SCHEMAS, SCHEMAS
from tests.export import dialect_pages


@pytest.mark.parametrize("name", dialect_pages.PAGES)
def test_the_page_is_current(name):
    assert (dialect_pages.DOCS / name).read_text() == dialect_pages.PAGES[name]()


def test_every_attribute_has_a_meaning_and_every_meaning_an_attribute():
    names = {n for schema in (*SCHEMAS, *OLDER_SCHEMAS) for n in schema.attributes}
    known = {name for name in names if not name.startswith(("scale_x_", "x_"))}
    assert known | {"scale_x_i", "x_i_bits", "x_bits"} == set(dialect_pages.MEANINGS)
