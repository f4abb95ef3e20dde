"""The one writer of tables, letter by letter."""

from fslora_hf.reports.tables import as_csv, as_markdown, as_text

LINES = [["", "name", "share"], ["10", "a", "0.5"], ["2", "longer", "12.25"]]


def test_text_stands_below_one_another():
    assert as_text(LINES, left=(1,)) == ["    name    share", "10  a         0.5", " 2  longer  12.25"]
    assert as_text(iter(LINES)) == ["      name  share", "10       a    0.5", " 2  longer  12.25"]


def test_markdown_says_which_side_a_column_is_shown_from():
    table = "|  | name | share |\n| :-- | --: | --: |\n| 10 | a | 0.5 |\n| 2 | longer | 12.25 |"
    assert as_markdown(iter(LINES)) == table
    assert as_markdown(LINES, left=(1, 2)).splitlines()[1] == "| --: | :-- | :-- |"


def test_padded_markdown_can_be_read_as_text():
    assert as_markdown(LINES, padded=True).splitlines() == [
        "|    | name   | share |",
        "| -- | -----: | ----: |",
        "| 10 | a      | 0.5   |",
        "| 2  | longer | 12.25 |",
    ]


def test_csv_holds_no_formula():
    lines = [["name", "share"], ["=1+1", -0.25], ["a, b", None], ["@x", True], ["-", "\tz"]]
    assert as_csv(lines) == "name,share\n'=1+1,-0.25\n\"a, b\",\n'@x,True\n'-,'\tz"
