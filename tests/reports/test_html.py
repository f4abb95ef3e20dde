"""Pages filled from templates: values stay texts, and the policy is that of the page as it is."""

import json
import re

import jinja2
import pytest

from fslora_hf.comparison import page
from fslora_hf.reports import leaderboard_page
from fslora_hf.reports.html import fill_page, policy

NASTY = "</script><b>\"'& {{ data }} </title>"


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "page.html"
    text = '<meta content="{{ policy }}"><style>a{}</style><script>f()</script><p title="{{ text }}">{{ text }}</p>\n'
    path.write_text(text + '<script type="application/json">{{ data | tojson }}</script>\n')
    return path


def test_no_value_is_taken_for_html(template):
    filled = fill_page(template, text=NASTY, data={"b": [NASTY], "a": 0.5})
    assert filled.count("</script>") == 2 and "<b>" not in filled and "{{ data }}" in filled
    (held,) = re.findall(r'json">(.*)</script>\n$', filled)
    assert json.loads(held) == {"b": [NASTY], "a": 0.5} and list(json.loads(held)) == ["b", "a"]
    (title,) = re.findall('title="([^"]*)"', filled)
    assert "'" not in title and ">" not in title
    assert f'content="{policy(template.read_text())}"' in filled


def test_what_a_page_cannot_show_is_an_error(template):
    with pytest.raises(jinja2.UndefinedError):
        fill_page(template, data={})
    with pytest.raises(ValueError):
        fill_page(template, text="", data=float("nan"))


@pytest.mark.parametrize("path", [page.TEMPLATE, leaderboard_page.TEMPLATE], ids=lambda path: path.name)
def test_style_and_script_hold_no_values(path):
    """Their hashes in the policy are of the template's text: what was filled in would keep them from running."""
    parts = re.findall(r"<(style|script)>(.*?)</\1>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert parts and not any(mark in text for _, text in parts for mark in ("{{", "{%", "{#"))
