"""Findings of many ranks become one table: each fault once, with the nodes that have it."""

import io
import json

from rich.console import Console

from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING, Finding, is_blocked, locate, show, to_json

FINE = Finding(OK, "GPU", "8 x H100")
HOT = Finding(WARNING, "GPU", "70 GiB of GPU 3 are taken", "End what runs there")
DEAD = Finding(BLOCKER, "disk", "no room", "Make room")


def test_a_fault_of_some_nodes_names_them_and_a_fault_of_all_names_none():
    by_rank = [("a", [FINE, DEAD]), ("a", [FINE]), ("b", [FINE, HOT]), ("c", [FINE, HOT])]
    assert [(found.finding, found.nodes) for found in locate(by_rank)] == [
        (FINE, ()),
        (DEAD, ("a",)),
        (HOT, ("b", "c")),
    ]


def test_only_a_blocker_blocks():
    assert not is_blocked(locate([("a", [FINE, HOT])]))
    assert is_blocked(locate([("a", [FINE]), ("b", [DEAD])]))


def test_json_says_the_same():
    report = json.loads(to_json(locate([("a", [FINE]), ("b", [FINE, DEAD])])))
    assert report["blocked"] is True
    assert report["findings"][1] == {
        "level": "blocker",
        "subject": "disk",
        "text": "no room",
        "fix": "Make room",
        "nodes": ["b"],
    }


def test_the_table_shows_node_finding_and_what_to_do():
    text = io.StringIO()
    show(locate([("a", [FINE]), ("b", [FINE, DEAD])]), Console(file=text, width=100))
    (line,) = [line for line in text.getvalue().splitlines() if "no room" in line]
    assert line.split() == ["blocker", "disk", "b:", "no", "room"]
    assert "Make room." in text.getvalue() and text.getvalue().count("8 x H100") == 1
