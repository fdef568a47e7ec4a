"""Text of anybody's makes nothing of a terminal."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.printable import is_utf8, printable

any_text = st.text(alphabet=st.characters(exclude_categories=()))  # with lone surrogates


@given(text=any_text)
@settings(deadline=None)
def test_all_of_it_can_be_printed(text: str) -> None:
    assert printable(text).isprintable()
    printable(text).encode("utf-8")


@given(text=any_text.filter(str.isprintable))
@settings(deadline=None)
def test_what_can_be_printed_stays(text: str) -> None:
    assert printable(text) == text


@given(text=any_text)
@settings(deadline=None)
def test_utf_8_holds_what_it_is_said_to(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        assert not is_utf8(text)
    else:
        assert is_utf8(text)


def test_the_rest_is_shown_as_escapes() -> None:
    assert printable("a\x1b[2J\n\u202e\ud800é") == r"a\x1b[2J\n\u202e\ud800é"
