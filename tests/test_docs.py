"""The site of all pages: whole, with links that lead somewhere, and nothing from other hosts."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest

from rsllm import docs
from rsllm.cli import EXAMPLES, main
from rsllm.settings import all_settings


class Links(HTMLParser):
    """What a page links to or loads, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append((tag, value))
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("docs") / "site"
    assert main(["docs", "--out", str(out)]) == 0
    return out


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html")}
    assert len(pages) > 50
    for page, found in pages.items():
        for tag, link in found.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                assert tag == "a", f"{page} loads {link}"
                continue
            # Only the page of a missing page has links from the root, as it may stand anywhere.
            start = site if address.path.startswith("/") else page.parent
            path = unquote(address.path)
            target = (start / path.lstrip("/")).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page} links to {link}"
            anchor = unquote(address.fragment)
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{page} links to {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


def test_every_setting_verb_and_public_name_has_its_place(site: Path) -> None:
    settings = (site / "settings.html").read_text()
    assert [s.path for s in all_settings() if f"<code>{s.path}</code>" not in settings] == []
    commands = Links(site / "commands.html").anchors
    assert {f"rsllm-{verb}" for verb in EXAMPLES} | {"rsllm-runs-gc"} <= commands
    python = Links(site / "python.html").anchors
    assert {"rsllm.load", "rsllm.recommend.ranker.Ranker.recommend", "rsllm.Pipeline"} <= python


def test_it_is_served_on_this_machine_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer_once(server: ThreadingHTTPServer) -> None:
        address = f"http://127.0.0.1:{server.server_port}/"
        with ThreadPoolExecutor() as pool:
            page = pool.submit(lambda: urlopen(address).read())
            server.handle_request()
            assert page.result() == b"all pages"
        assert address in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(docs, "build", lambda out: (out / "index.html").write_text("all pages"))
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", answer_once)
    assert main(["docs"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("part", ["mkdocs.commands.build", "material"])
def test_without_the_extra_one_line_says_how_it_is_installed(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, part, None)
    assert main(["docs"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"rsllm: error: .+ missing; pip install --editable '.+\[docs\]'\n", error)


def test_what_else_can_be_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("dear to me")
    for out in (tmp_path, tmp_path / "mine"):
        assert main(["docs", "--out", str(out)]) == 2
        assert capsys.readouterr().err.endswith(f"{out} is no empty folder; name a new one\n")
    monkeypatch.setattr(docs, "CONFIG", tmp_path / "mkdocs.yml")
    assert main(["docs"]) == 2
    assert capsys.readouterr().err.endswith("in a clone of rsllm; say `rsllm docs` in one\n")


def test_a_wrong_link_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("[there](nowhere.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: mine\ndocs_dir: pages\n")
    monkeypatch.setattr(docs, "CONFIG", tmp_path / "mkdocs.yml")
    assert main(["docs", "--out", str(tmp_path / "site")]) == 1
    error = capsys.readouterr().err
    assert "'nowhere.md'" in error
    assert "rsllm: error: the pages cannot be made: " in error
