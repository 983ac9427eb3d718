"""Other libraries' errors in one sentence."""

import pytest

from gqaprune.common.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("out of memory\nand so on", "out of memory"),
        ("invalid for 'rope': \n    ValueError: no factor\nmore", "invalid for 'rope': ValueError: no factor"),
        ("ends here:", "ends here:"),
        ("  \n", "RuntimeError"),
    ],
)
def test_an_error_is_its_first_line_and_what_that_announces(text: str, line: str) -> None:
    assert first_line(RuntimeError(text)) == line
