"""What is told to Salt can be written, whatever a name is."""

import pytest
from qubes_storage.telling import printable


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("caf\udce9", "caf\\xe9"),
        ("é\udcff\udcfe", "é\\xff\\xfe"),
        ("\ud800", "\\ud800"),
        ({"a\udcff": ["b\udcff", ("c\udcff", 1)]}, {"a\\xff": ["b\\xff", ["c\\xff", 1]]}),
        (None, None),
    ],
)
def test_what_cannot_be_written_is_escaped(value, told):
    assert printable(value) == told
