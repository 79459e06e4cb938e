"""The page, by parsing it: what is in it, and that nothing gets out of its data or in from elsewhere."""

import base64
import hashlib
import json
import os
from html.parser import HTMLParser

import pytest

from nemo_jepo.tools.report.drawings import Drawing
from nemo_jepo.tools.report.page import differences, phase_seconds, render, write_page
from nemo_jepo.tools.report.runs import read_runs
from tests.support.report_folders import HOSTILE, SETTINGS, write_run


class Page(HTMLParser):
    """Every tag, the text of every script and style, the cells of every table row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.rows: list[list[str]] = []
        self._inside: str | None = None
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style", "title") else self._inside
        if self._inside == tag:
            self.raw.append((dict(attributes) | {"tag": tag}, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._inside = None if tag == self._inside else self._inside
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._inside:
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
        elif self._in_cell:
            self.rows[-1][-1] += data.strip()

    def texts(self, tag: str) -> list[str]:
        return [text for attributes, text in self.raw if attributes["tag"] == tag]


def page_of(*folders, drawings=()):
    return Page(render(read_runs(folders, 40), drawings))


def test_data_holds_what_the_runs_wrote(tmp_path):
    page = page_of(write_run(tmp_path / "mine"))
    (data,) = [json.loads(text) for attributes, text in page.raw if attributes.get("id") == "data"]
    (run,) = data["runs"]
    assert (run["name"], run["steps"]) == ("mine", [1, 2, 3])
    assert run["metrics"]["train_rollouts/bound"] == [-3.0, -2.0, -1.0]
    assert [len(step["samples"]) for step in run["rollouts"]] == [2, 2, 2, 1]
    assert run["rollouts"][0]["samples"][0]["tokens"][4] == "the final answer is"
    assert {"train_rollouts/bound", "val_rollouts/proxy_nll", "timers/step_time"} <= {
        c["metric"] for c in data["charts"]
    }


def test_the_policy_lets_in_this_pages_style_and_script_and_nothing_else(tmp_path):
    page = page_of(write_run(tmp_path / "mine"), drawings=[Drawing("a", "A", "b", 480, b"light", b"dark")])
    (policy,) = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = [text for a, text in page.raw if a["tag"] == "script" and a.get("type") != "application/json"]
    (style,) = page.texts("style")
    for kind, text in (("script-src", script), ("style-src", style)):
        assert rules[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert (rules["default-src"], rules["img-src"], rules["base-uri"]) == ("'none'", "data:", "'none'")
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        addresses = [attributes.get(name) for name in ("src", "srcset", "href") if name in attributes]
        assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "http" not in style and "url(" not in style and "innerHTML" not in script


def test_hostile_names_settings_and_rollouts_stay_text(tmp_path):
    names = "a<img src=x onerror=y>", 'b"><script>z'
    settings = SETTINGS | {"data": {"prompt_template": HOSTILE}}
    folders = [
        write_run(tmp_path / names[0], question=HOSTILE),
        write_run(tmp_path / names[1], settings=settings, question=HOSTILE),
    ]
    page = page_of(*folders)
    plain = page_of(*(write_run(tmp_path / name) for name in ("a", "b")))
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == [
        tag for tag, _ in plain.tags if tag == "script"
    ]
    assert [row[0] for row in page.rows[1:3]] == list(names)
    assert ["data.prompt_template", "(not set)", HOSTILE] in page.rows
    (data,) = [text for attributes, text in page.raw if attributes.get("id") == "data"]
    assert "<" not in data
    assert json.loads(data)["runs"][0]["rollouts"][0]["samples"][0]["prompt"] == HOSTILE


def test_only_settings_that_differ_are_listed(tmp_path):
    jepo = {"max_steps": 3}
    other = {"objective": {"name": "rloo"}, "trainer": {"jepo": jepo}, "kl": {"beta": None, "on": True, "at": 1}}
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=other)], 40)
    assert differences(runs) == [
        ("kl.at", ["(not set)", "1"]),  # which Python takes for true
        ("kl.beta", ["0.001", "null"]),
        ("kl.on", ["(not set)", "true"]),
        ("objective.name", ["jepo", "rloo"]),
    ]
    assert differences(runs[:1]) == []
    assert ["objective.name", "jepo", "rloo"] in Page(render(runs, [])).rows


def test_a_row_of_the_runs_shows_first_and_last_values(tmp_path):
    page = page_of(write_run(tmp_path / "mine", num_steps=4))
    head, row = page.rows[:2]
    shown = dict(zip(head, row, strict=True))
    assert (shown["run"], shown["objective"], shown["updates"]) == ("mine", "jepo", "4")
    assert shown["bound, nats"] == "\u22123\u21920" and shown["held-out accuracy"] == "0.2\u21920.4"
    assert shown["chain of thought, tokens"] == "\u2013"  # never logged


def test_phases_are_medians_and_the_rest_of_the_step(tmp_path):
    """Steps of 3, 4 and 5 seconds: sampling 1, update 1, 2 and 3, so 1 is left of each."""
    (run,) = read_runs([write_run(tmp_path / "mine")], 40)
    assert phase_seconds(run) == [0.0, 1.0, 0.0, 0.0, 2.0, 1.0]
    widths = [a["width"] for tag, a in page_of(tmp_path / "mine").tags if tag == "rect"]
    assert widths == ["0.000%", "25.000%", "0.000%", "0.000%", "50.000%", "25.000%"]


def test_figures_stand_in_the_page_for_light_and_dark(tmp_path):
    page = page_of(drawings=[Drawing("nll", "NLL <1>", "over 3 seeds", 480, b"light", b"dark")])
    (image,) = [a for tag, a in page.tags if tag == "img"]
    (source,) = [a for tag, a in page.tags if tag == "source"]
    assert base64.b64decode(image["src"].partition(",")[2]) == b"light"
    assert base64.b64decode(source["srcset"].partition(",")[2]) == b"dark"
    assert (image["alt"], image["width"], source["media"]) == ("NLL <1>", "480", "(prefers-color-scheme: dark)")


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "new" / "report.html"
    runs = read_runs([write_run(tmp_path / "mine")], 40)
    write_page(out, runs, [])
    before = out.read_text()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError))
        write_page(out, [], [])
    assert out.read_text() == before and before.rstrip().endswith("</html>")


def test_text_that_utf_8_cannot_hold_does_not_stop_a_page(tmp_path):
    lone = "\ud800"
    runs = [write_run(tmp_path / "a", question=lone), write_run(tmp_path / "b", settings={"data": {"name": lone}})]
    write_page(tmp_path / "report.html", read_runs(runs, 40), [])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ["data.name", "(not set)", "?"] in page.rows
