"""The rendered book in a real browser: no errors, nothing missing, search, launch buttons, a phone's width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
import yaml
from browser import PROGRAM, Page, browser, served

from dfkd_lib.locations import repository_root
from dfkd_lib.reproduction.site import _copy_source, _render, _render_single, toc_files

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed here")
ROOT = repository_root()
PAGES = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in toc_files(ROOT)] if ROOT else []
ADDRESS = "https://github.com/OWNER/NAME"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book as it is stored, built with the address of a repository."""
    assert ROOT
    folder = tmp_path_factory.mktemp("site")
    (folder / "root").mkdir()
    for name in ("book", "_static", "_toc.yml"):
        (folder / "root" / name).symlink_to(ROOT / name)
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["repository"] = {"url": ADDRESS, "branch": "main"}
    (folder / "root" / "_config.yml").write_text(yaml.safe_dump(config))
    source = _copy_source(folder / "root", folder / "source")
    return _render(source, folder, strict=False).parent


@pytest.fixture(scope="module")
def page(site: Path) -> Iterator[Page]:
    with served(site) as address, browser(address) as tab:
        yield tab


# Every address that a page leads to, and whether its pictures have a size.
LOOK = """(async () => {
  document.querySelectorAll("img").forEach(image => { image.loading = "eager"; });
  await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
  const own = address => address.startsWith(location.origin);
  return {
    links: [...document.links].map(link => link.href).filter(own),
    ids: [...document.querySelectorAll("[id]")].map(element => element.id),
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    undescribed: [...document.querySelectorAll("article img")]
      .filter(image => image.alt.length < 20 || image.alt.endsWith(".png")).map(image => image.src),
    width: document.documentElement.scrollWidth,
    text: document.querySelector("article").innerText.length,
    colab: [...document.links].map(link => link.href).filter(address => address.includes("colab.research")),
  };
})()"""


def test_every_page_is_whole(page: Page, site: Path) -> None:
    found = {}
    page.width(1280)
    for name in PAGES:
        page.open(name)
        found[name] = page.run(LOOK)
        assert page.problems == [], name
        assert found[name]["broken"] == found[name]["undescribed"] == [] and found[name]["text"] > 100, name
    for name, seen in found.items():
        for address in dict.fromkeys(seen["links"]):
            plain, part = urldefrag(urljoin(f"{page.site}/{name}", address))
            target = unquote(plain.removeprefix(f"{page.site}/").split("?")[0])
            assert (site / target).is_file(), f"{name} links to {target}"
            if part and target in found:
                assert unquote(part) in found[target]["ids"], f"{name} links to {target}#{part}"


def test_a_phone_shows_every_page_without_sideways_scrolling(page: Page) -> None:
    page.width(390)
    wide = {}
    for name in PAGES:
        page.open(name)
        if (width := page.run(LOOK)["width"]) > 390:
            wide[name] = width
    page.width(1280)
    assert wide == {}


def test_equations_are_set_without_a_network(page: Page) -> None:
    page.open("book/chapters/dfad.html", settle=2)
    drawn, written = page.run('["mjx-container", ".math"].map(kind => document.querySelectorAll(kind).length)')
    assert drawn == written > 10
    addresses = page.run('performance.getEntriesByType("resource").map(entry => entry.name)')
    assert [address for address in addresses if not address.startswith((page.site, "data:"))] == []


def test_search_finds_contrastive(page: Page) -> None:
    page.open("search.html?q=contrastive", settle=0.5)
    script = """new Promise(done => { const look = () => {
      const found = [...document.querySelectorAll("#search-results li a")].map(link => link.href);
      found.length ? done(found) : setTimeout(look, 100); }; look(); })"""
    assert any("book/chapters/cmi.html" in address for address in page.run(script))
    assert page.problems == []


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("book/chapters/")])
def test_the_launch_button_opens_the_chapter(page: Page, name: str) -> None:
    page.open(name)
    notebook = Path(name).with_suffix(".ipynb").as_posix()
    wanted = f"https://colab.research.google.com/github/OWNER/NAME/blob/main/{notebook}"
    assert set(page.run(LOOK)["colab"]) == {wanted}


def test_the_book_in_one_page_needs_nothing_beside_it(site: Path) -> None:
    single = _render_single(site.parents[1] / "source", site.parents[1])
    alone = site.parents[1] / "alone"
    alone.mkdir()
    (alone / "book.html").write_bytes(single.read_bytes())
    with served(alone) as address, browser(address) as tab:
        tab.open("book.html")
        seen = tab.run(LOOK)
        assert tab.problems == [] and seen["broken"] == [] and seen["text"] > 20_000
        assert tab.run('document.querySelectorAll("mjx-container").length') > 50
