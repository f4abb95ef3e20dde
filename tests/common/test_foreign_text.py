"""Text that comes from others: one line, printable, short, and cheap however long it is."""

import time

import pytest

from fslora_hf.common.foreign_text import LONGEST, foreign_names, foreign_text, foreign_value

FORGED = (
    "fine\nWARNING Node 1 was turned away\r\x1b[2K\x1b[31mred\x1b[0m\x1b]0;title\x07\u2028line\u2029\u202eturned\x00"
)


@pytest.mark.parametrize("tell", [foreign_text, foreign_value, lambda text: foreign_names([text, text])])
def test_is_one_printable_line(tell):
    told = tell(FORGED)
    assert told.isprintable()
    assert len(told.splitlines()) == 1
    assert told.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("as it was written: é, 漢字, 🙂", "as it was written: é, 漢字, 🙂"),
        ("\x1b[1;31mred\x1b[0m and\n\n  plain ", "red and plain"),
        ("a\u202eb\u200bc\ud800d", "a b c d"),
        ("x" * LONGEST, "x" * LONGEST),
        ("x" * (LONGEST + 1), "x" * (LONGEST - 1) + "…"),
        ("\n" * 10**6 + "late", "…"),
        (ValueError("an\nerror"), "an error"),
        ({"a": 1}, "{'a': 1}"),
        (None, "None"),
    ],
)  # fmt: skip
def test_tells_what_can_be_told(text, told):
    assert foreign_text(text) == told


@pytest.mark.parametrize("text", ["\x1b[" * 5 * 10**7, "a b" * 3 * 10**7, {str(n): n for n in range(10**6)}], ids=len)
def test_a_huge_text_costs_nothing(text):
    started = time.process_time()
    assert len(foreign_text(text)) <= LONGEST
    assert len(foreign_value(text)) <= LONGEST
    assert time.process_time() - started < 2


def test_of_many_names_a_few_are_told():
    assert foreign_names({str(number) for number in range(9)}, most=2) == "0, 1 and 7 more"
    assert foreign_names(["b", "a"]) == "b, a"
    assert len(foreign_names({f"{n}" * 1000 for n in range(10**4)})) < 400
