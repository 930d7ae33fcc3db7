"""The report where it is read: no errors, no requests, plots that are there, at any width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from chromium import Browser
from test_report import HOSTILE, STUDIES, full_study

from rsllm.report.page import write_report

MADE_UP = ("full", "hostile", "empty")
LOUD = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
CUT = """[...document.querySelectorAll("svg text")].filter(text => {
    const [own, all] = [text, text.closest("svg")].map(e => e.getBoundingClientRect());
    return own.left < all.left - 1 || own.right > all.right + 1 || own.top < all.top - 1;
}).map(text => text.textContent)"""
PLACES = "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().toJSON())"
WIDTH = "[document.documentElement, document.body].map(e => e.scrollWidth)"
CONTRAST = """(() => {
  const shade = text => {
    const part = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
    const [r, g, b] = part.map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!colour.endsWith(", 0)") && !colour.includes("/")) return colour;
    }
  };
  return [...document.querySelectorAll("h1, h2, p, td, th, dt, dd, a, .tag, li b, svg text")]
    .map(e => [e, getComputedStyle(e)[e.closest("svg") ? "fill" : "color"]])
    .map(([e, ink]) => [shade(ink), shade(behind(e)), e.outerHTML.slice(0, 80)])
    .map(([a, b, e]) => [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e])
    .sort((a, b) => a[0] - b[0])[0];
})()"""
BACKGROUND, LIGHT = "getComputedStyle(document.body).backgroundColor", "rgb(246, 246, 243)"


def made_up(name: str) -> dict[str, Any]:
    results = full_study()
    if name == "hostile":
        long = HOSTILE + "x" * 300
        results |= dict.fromkeys(("title", "question", "backbone"), long) | {"notes": [long]}
        results["methods"][0]["name"] = results["pairs"][0]["claim"] = long
        for entry in results["trials"]:
            entry["parameters"] = {long: long, "alpha": entry["parameters"]["alpha"]}
    if name == "empty":
        results |= {part: [] for part in ("trials", "methods", "pairs", "confirm")}
        results |= {"recommender": {}, "fusion": {"weight": 0, "curve": []}}
        results["search"]["best"] = None
    return results


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of every committed study, however old, and of made-up ones."""
    folder = tmp_path_factory.mktemp("reports")
    found = {name: json.loads(path.read_text()) for name, path in STUDIES.items()}
    for name, results in (found | {name: made_up(name) for name in MADE_UP}).items():
        (folder / name).mkdir(parents=True)
        write_report(folder / name, results)
    return {name: folder / name / "report.html" for name in (*STUDIES, *MADE_UP)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium.PATH is None:
        pytest.skip("there is no Chromium; on Debian: apt install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", [*STUDIES, *MADE_UP])
def test_page(name: str, width: int, scheme: str, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages[name], width, scheme)
    assert [event for event in browser.events if event["method"] in LOUD] == []
    requests = [e for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [e["params"]["request"]["url"] for e in requests] == [pages[name].as_uri()]
    assert max(browser.run(WIDTH)) <= width
    places = browser.run(PLACES)
    assert (len(places) == 0) if name == "empty" else (len(places) >= 2)
    assert all(box["width"] > 150 and box["height"] > 150 for box in places)
    assert browser.run(CUT) == []
    ratio, element = browser.run(CONTRAST)
    assert ratio >= 4.5, element
    assert browser.run(BACKGROUND) == {"light": LIGHT, "dark": "rgb(16, 19, 23)"}[scheme]


def test_paper_is_light_and_shows_everything(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], 1280, "dark")
    browser.ask("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.run(BACKGROUND) == LIGHT
    clipped = (
        "[...document.querySelectorAll('.scroll')].filter(e => e.clientHeight < e.scrollHeight)"
    )
    assert browser.run(f"{clipped}.length") == 0
    shown = (
        "[...document.querySelectorAll('details table')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(browser.run(shown)) > 10
    browser.ask("Emulation.setEmulatedMedia", media="", features=[])
