"""What the benchmark against peers writes: its section of the page, and the picture."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.peers.page import HEADING, SILENT, Results, Setting, picture, put, section

SETTING = Setting("project falcon", 23, 11, 5, {"words": r"^(\w+\s?)+$"}, 15.0)


def results() -> Results:
    """newel, and a peer that falls behind in everything."""
    found = Results()
    found.about = {"newel": ("this tree", "a rule"), "Peer": ("1.0", "a|b")}
    found.disguises = {"newel": {"leet": True, "rot13": True}, "Peer, plain": {"leet": False, "rot13": True}}
    found.honest = {"newel": [], "Peer, plain": ["dots"]}
    found.places = {"newel": {"tool result": True}}
    found.leaks = {"newel, refuse": {"whole": (0, "")}, "Peer": {"whole": (7, "ends with TypeError")}}
    found.typos = {"newel": [("key", "error")], "Peer": [("key", SILENT), ("name", "error")]}
    found.frozen = {"newel": {"words": "refused at load"}, "Peer": {"words": None}}
    found.costs = {"newel": {"200 characters": (4e-4, 1.0)}, "Peer": {"200 characters": (5e-6, 0.0125)}}
    return found


@pytest.mark.parametrize(
    "row",
    [
        "| **caught** | **2 of 2** | **1 of 2** |",
        "| honest texts stopped | 0 of 23 | 1 of 23 |",
        "Honest texts that are stopped: Peer, plain: dots.",
        "| Peer | 7 | ends with TypeError |",
        "| Peer | 1 of 2 | key |",
        "| newel | refused at load |",
        "| Peer | over 15 s |",
        "| Peer | 5.0 us (0.01) |",
        r"| Peer | 1.0 | a\|b |",
        "Peer read one string",
    ],
)
def test_the_section_says_what_was_found(row: str) -> None:
    assert row in section(results(), SETTING, "x.svg")


def test_a_system_that_fails_leaves_no_row_but_the_reason() -> None:
    found = results()
    found.drop("Peer", "its process ended")
    text = section(found, SETTING, "x.svg")
    assert "| Peer | - | its process ended |" in text
    assert text.count("Peer") == 1


def test_only_the_section_of_the_page_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n## B\n\nb\n\n## C\n\nc\n")
    put(f"{HEADING}\n\nfirst\n", page)
    assert page.read_text() == f"# A\n\n## B\n\nb\n\n## C\n\nc\n\n{HEADING}\n\nfirst\n"
    page.write_text(page.read_text() + "\n## D\n\nd\n")
    put(f"{HEADING}\n\n### second\n", page)
    assert page.read_text() == f"# A\n\n## B\n\nb\n\n## C\n\nc\n\n{HEADING}\n\n### second\n\n## D\n\nd\n"


def test_the_picture_is_an_svg_that_says_in_words_what_it_shows() -> None:
    root = ElementTree.fromstring(picture(results(), SETTING))
    words = "".join(root.itertext())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for said in (
        "Disguises caught: newel 2 of 2, Peer 1 of 2.",
        "Event loop blocked: newel refused at load, Peer over",
    ):
        assert said in words
