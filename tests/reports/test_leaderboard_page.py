"""The leaderboard's page in a real browser: its numbers are computed in the page and are checked against Python's."""

import math
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fslora_hf.reports.entries import read_results
from fslora_hf.reports.leaderboard import rank
from fslora_hf.reports.leaderboard_page import to_html
from tests.support.browser import Browser, find_chromium
from tests.support.result_files import evaluation

# By task; the averages over both are 0.5, 0.625, 0.4375 and 0.25.
MARKS = {
    "middle": {"a": "11000000", "b": "11111100"},
    "Best <img src=x onerror=alert(1)>": {"a": "11110000", "b": "11111100"},
    "other & more": {"a": "11111100", "b": "10000000"},
    "worst": {"a": "10000000", "b": "11100000"},
}
BEST = "Best <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        pytest.skip("Expected a Chromium on the PATH, found none: install one, or name it in CHROME.")
    with Browser(program) as running:
        yield running


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for number, (name, marks) in enumerate(MARKS.items()):
        protocol = "generate" if name == "worst" else "loglikelihood"
        evaluation(folder, f"file{number}", marks, name=name, protocol=protocol)
    narrow = {"a": "1110"}
    evaluation(folder, "narrow", narrow, name="narrow", rows_hash="d" * 16, with_outcomes=False)
    return read_results([folder])


@pytest.fixture
def page(browser, board, tmp_path):
    """Of the four entries that have both tasks."""
    return show(browser, tmp_path, rank(board[:4], reference="middle"))


def show(browser, folder, leaderboard):
    path = folder / "leaderboard.html"
    path.write_text(to_html(leaderboard), encoding="utf-8")
    return browser.open(path.as_uri())


def rows(page):
    """The cells' visible texts, row by row, the bars' descriptions left out."""
    return page.evaluate(
        """[...document.querySelectorAll("tr.entry")].map((row) => [...row.cells].map((cell) => {
            const copy = cell.cloneNode(true);
            copy.querySelectorAll(".bar, button").forEach((part) => part.remove());
            return copy.textContent.trim();
        }))"""
    )


def names(page):
    return [row[1] for row in rows(page)]


def head(page, key):
    return f'th[data-key="{key}"] button'


def sort_marks(page):
    return page.evaluate(
        """Object.fromEntries([...document.querySelectorAll("th[aria-sort]")].map(
            (cell) => [cell.dataset.key, cell.getAttribute("aria-sort")]))"""
    )


def test_the_page_shows_the_ranking_and_asks_for_nothing(page):
    assert [row[:2] for row in rows(page)] == [["1", BEST], ["2", "middle"], ["3", "other & more"], ["4", "worst"]]
    best = rows(page)[0]
    # sqrt(0.25/8 + 0.1875/8) / 2; the difference is 1/4 on a (two of eight) and 0 on b, so 1/8.
    assert best[3] == f"62.5 ± {100 * math.sqrt(0.4375 / 8) / 2:.1f}"
    assert best[4] == f"+12.5 ± {100 * math.sqrt(12 / 64 / 7) / 2:.1f}"
    assert best[5:] == ["50.0 ± 17.7", "75.0 ± 15.3", "16"]
    assert rows(page)[1][4] == "reference"
    assert sort_marks(page) == {"rank": "ascending"}
    assert page.evaluate("document.querySelector('tfoot').innerText").split() == "majority rate 50.0 50.0 50.0".split()
    assert page.requests == [page.address]
    assert page.complaints == []


def test_a_click_sorts_and_another_one_turns_it_round(page):
    page.click(head(page, "task a"))
    assert names(page) == ["other & more", BEST, "middle", "worst"]
    assert sort_marks(page) == {"task a": "descending"}
    page.click(head(page, "task a"))
    assert names(page) == ["worst", "middle", BEST, "other & more"]
    assert sort_marks(page) == {"task a": "ascending"}
    page.click(head(page, "name"))
    assert names(page) == [BEST, "middle", "other & more", "worst"]
    page.click(head(page, "name"))
    assert names(page) == ["worst", "other & more", "middle", BEST]
    page.click(head(page, "difference"))
    assert names(page) == [BEST, "middle", "other & more", "worst"]
    page.click(head(page, "rank"))
    page.click(head(page, "rank"))
    assert [row[0] for row in rows(page)] == ["4", "3", "2", "1"]
    assert page.complaints == []


def test_keys_sort_choose_and_open(page):
    page.evaluate(f"document.querySelector({head(page, 'average')!r}).focus()")
    page.press("Enter")
    assert sort_marks(page) == {"average": "descending"}
    page.press("Space")
    assert sort_marks(page) == {"average": "ascending"}
    assert names(page) == ["worst", "other & more", "middle", BEST]
    page.press("Tab")  # the focus has stayed on the heading
    assert page.evaluate("document.activeElement.closest('th').dataset.key") == "difference"
    page.evaluate("document.querySelector('.chip input').focus()")
    page.press("Space")
    assert page.evaluate("document.querySelector('.chip input').checked") is False
    assert page.evaluate("document.querySelectorAll('thead th').length") == 7
    page.evaluate("document.querySelector('.open').focus()")
    page.press("Enter")
    assert page.evaluate("document.querySelector('tr.details').hidden") is False


def test_the_choice_of_tasks_recomputes_average_rank_and_difference(page, board):
    page.click("#tasks input[value=b]")
    shown = rows(page)
    only_a = [{**entry.scores, "accuracy": {"a": entry.scores["accuracy"]["a"]}} for entry in board[:4]]
    expected = rank(
        [type(entry)(**{**vars(entry), "scores": s}) for entry, s in zip(board[:4], only_a, strict=True)],
        reference="middle",
    )
    assert [row[1] for row in shown] == [row.name for row in expected.rows]
    assert [row[0] for row in shown] == [str(row.rank) for row in expected.rows] == ["1", "2", "3", "4"]
    assert shown[0][1] == "other & more"
    for cells, row in zip(shown, expected.rows, strict=True):
        assert cells[3] == cells[5] == f"{100 * row.average.value:.1f} ± {100 * row.average.standard_error:.1f}"
        assert cells[6] == "8"
        if row.difference:
            value, error = row.difference.value, row.difference.standard_error
            sign = "+" if value > 0 else "−"
            assert cells[4].removesuffix(" *") == f"{sign}{100 * abs(value):.1f} ± {100 * error:.1f}"
    assert "average over 1 of 2 tasks" in page.evaluate("document.querySelector('#status').textContent")
    page.click("#none")
    assert {row[3] for row in rows(page)} == {"–"} and {row[0] for row in rows(page)} == {"–"}
    page.click("#all")
    assert names(page)[0] == BEST
    assert page.complaints == []


def test_typing_filters_by_name_and_leaves_ranks_alone(page):
    page.click("#search")
    page.type("MORE")
    assert [row[:2] for row in rows(page)] == [["3", "other & more"]]
    assert page.evaluate("document.querySelector('#status').textContent").startswith("1 of 4 entries")
    page.type("x")
    assert rows(page) == []
    assert "No name contains “MOREx”." in page.evaluate("document.querySelector('tbody').textContent")
    for _ in range(4):
        page.press("Backspace")
    assert names(page) == [BEST, "middle", "other & more"]  # of what was typed an M is left
    assert page.requests == [page.address]


def test_names_are_text_everywhere(page):
    page.click(".open")
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.evaluate("document.querySelector('tr.entry b').textContent") == BEST
    details = page.evaluate("document.querySelector('tr.details').innerText")
    assert page.evaluate("document.querySelector('tr.details').hidden") is False
    for text in ("loglikelihood", "tiny, dtype float32", "a" * 16, "b" * 16, "torch 2.13", "file1.results.json"):
        assert text in details
    page.click(".open")
    assert page.evaluate("document.querySelector('tr.details').hidden") is True


def test_bars_lie_where_the_numbers_are(page):
    """The dot and ends of a column's bars are on one scale: a straight line through (value, pixel)."""
    page.click(head(page, "average"))
    spots = page.evaluate(
        """[...document.querySelectorAll("tr.entry")].map((row) => {
            const bar = row.cells[3].querySelector(".bar"), box = bar.getBoundingClientRect();
            const at = (name) => bar.querySelector(name).getBoundingClientRect();
            return [at(".dot").x + 4 - box.x, at(".range").left - box.x, at(".range").right - box.x,
                    at(".tick").x + 1 - box.x, box.width];
        })"""
    )
    values = [0.625, 0.5, 0.4375, 0.25]
    slope = (spots[0][0] - spots[3][0]) / (values[0] - values[3])
    assert slope > 0
    for value, (dot, low, high, _, width) in zip(values, spots, strict=True):
        assert dot == pytest.approx(spots[3][0] + slope * (value - 0.25), abs=1.5)
        assert 0 <= low < dot < high <= width
    assert (spots[1][2] - spots[1][1]) / slope == pytest.approx(2 * 1.96 * math.sqrt(0.375 / 8) / 2, abs=0.02)
    assert spots[0][3] == pytest.approx(spots[1][0], abs=1.5)  # majority rate and middle's average are both 0.5


def test_entries_without_a_chosen_task_have_no_rank_and_come_last(browser, board, tmp_path):
    page = show(browser, tmp_path, rank(board, reference="middle"))
    assert page.evaluate("[...document.querySelectorAll('.chip input:checked')].map((box) => box.value)") == ["a"]
    assert rows(page)[0][:2] == ["1", "narrow 1 2"]  # with the numbers of its notes
    page.click("#all")
    assert rows(page)[-1][0] == "–" and rows(page)[-1][3] == "–"
    for _ in range(2):
        page.click(head(page, "average"))
        assert rows(page)[-1][1].startswith("narrow")
    assert "No outcomes file beside the results" in page.evaluate("document.querySelector('#notes').innerText")
    page.click("sup a")
    assert page.evaluate("document.querySelector('li:target').textContent")
    assert page.complaints == []


def test_the_policy_stops_every_request(page):
    """Also what a script in the page would ask for."""
    stopped = page.evaluate(
        """new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            fetch("http://127.0.0.1:9/").catch(() => {});
        })"""
    )
    assert stopped == "connect-src"
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.hurt = 1\" id=bad>bad</p>')")
    page.click("#bad")
    assert page.evaluate("window.hurt") is None


def test_the_recorder_sees_requests(browser, tmp_path):
    """The control of the tests above: a page that loads something is caught at it."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/picture.png"
        path = tmp_path / "loads.html"
        path.write_text(f'<img src="{address}"><script>console.log("said")</script>')
        page = browser.open(path.as_uri())
        assert page.requests == [path.as_uri(), address]
        assert any("said" in text for text in page.complaints)
    finally:
        server.shutdown()
        server.server_close()


def test_the_source_names_no_address_and_data_cannot_end_its_element(board):
    text = to_html(rank(board[:4]), title="<i>T</i> & {{data}}")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|src=", text.replace("src=x onerror=alert(1)", ""))
    assert "<img" not in text
    assert "<h1>&lt;i&gt;T&lt;/i&gt; &amp; {{data}}</h1>" in text
    assert text.count("</script>") == 2


def test_one_entry_alone_has_no_differences(browser, board, tmp_path):
    page = show(browser, tmp_path, rank(board[:1], "format_validity"))
    assert len(rows(page)) == 1
    keys = page.evaluate("[...document.querySelectorAll('thead th')].map((cell) => cell.dataset.key)")
    assert keys == ["rank", "name", "protocol", "average", "task a", "task b", "questions"]
    assert page.evaluate("document.querySelector('tfoot').textContent") == ""
    assert page.complaints == []
