"""`make docs`: a strict build, no dead link, nothing fetched, and pages without a complaint in Chromium."""

import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import chromium, complaints, requested

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts/docs_site"))

import docstrings  # noqa: E402
import formulas  # noqa: E402
import make_site  # noqa: E402
import npm  # noqa: E402
import pages  # noqa: E402


@pytest.fixture(scope="module")
def packages():
    """Skips where npm cannot fetch what the site takes along."""
    try:
        return [npm.fetch(package, ROOT / ".venv" / "npm") for package in npm.SHA256]
    except (SystemExit, subprocess.TimeoutExpired) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(packages, tmp_path_factory):
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("docs")
    words = [sys.executable, "scripts/docs_site/make_site.py", "--output_dir", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out / "site"


# Pages


def notebook(tmp_path, *cells):
    """The Markdown of a notebook with these cells (type, source, outputs), and what its writer found."""
    (tmp_path / "nbs").mkdir()
    listed = [{"cell_type": kind, "source": text, "outputs": outputs} for kind, text, outputs in cells]
    (tmp_path / "nbs/a.ipynb").write_text(json.dumps({"cells": listed}))
    writer = pages.Writer(tmp_path, tmp_path / "src")
    return (tmp_path / "src" / writer.notebook("nbs/a.ipynb")).read_text(), writer


def test_a_notebook_becomes_a_page_with_its_code_and_outputs(tmp_path):
    printed = {"output_type": "stream", "text": ["one\n", "\x1b[31mtwo\x1b[0m\n"]}
    image = {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<Figure>"}}
    sharp = image | {"metadata": {"image/png": {"width": 96, "height": 48}}}
    folded = "<details><summary>More</summary>\n\n| a |\n|---|\n\n</details>"
    turned = '<div class="slider"><input type="range"></div>'
    slider = {"output_type": "execute_result", "data": {"text/html": [turned], "text/plain": "<HTML>"}}
    text, writer = notebook(
        tmp_path,
        ("markdown", f"# Title\n\n> In a line\n\n{folded}", []),
        ("code", "#| default_exp method.flow", []),
        ("code", "#| export\ndef f(x):\n    return x", [printed, image]),
        ("code", "#| hide\nsecret = 1", []),
        ("code", "#| hide_input\nplumbing = 1", [sharp, slider]),
    )
    assert '```python title="scfm/method/flow.py"\ndef f(x):\n    return x\n```' in text
    assert "one\ntwo\n```" in text and "secret" not in text and "default_exp" not in text
    assert '<details markdown="1"><summary>More</summary>' in text
    assert "plumbing" not in text and "](a_4_0.png)" in text and turned in text and "<HTML>" not in text
    assert "](a_4_0.png){ .output width=96 }" in text and "](a_2_1.png){ .output }" in text
    assert (tmp_path / "src/nbs/a_2_1.png").read_bytes() == b"\0\0\0"
    assert writer.titles["nbs/a.md"] == ("Title", "In a line")


def test_links_lead_to_pages_and_files_that_come_along(tmp_path):
    (tmp_path / "toy").mkdir()
    for name in ("README.md", "toy/judge.py", "toy/scores.json"):
        (tmp_path / name).write_text("{}")
    links = (
        "[a](../README.md) [b](a.ipynb#here) [`c`](../toy/judge.py) [d](../toy/scores.json) [e](../toy) "
        "[f](https://arxiv.org) `[g](../toy)` [h](#there)"
    )
    text, writer = notebook(tmp_path, ("markdown", f"# T\n\n{links}", []))
    assert "[a](../index.md) [b](a.md#here) [`c`](../toy/judge.py.md) [d](../toy/scores.json) e " in text
    assert "[f](https://arxiv.org)" in text and "[h](#there)" in text
    writer.linked_files()
    assert (tmp_path / "src/toy/scores.json").is_file() and (tmp_path / "src/toy/judge.py.md").is_file()


def test_formulas_are_taken_out_of_prose_and_not_of_code(tmp_path):
    found = []
    text = (
        "From $a_1$ to $b$:\n\n$$\nx = *y*\n$$\n\n`$HOME`\n\n```\n$c$\n```\n\n    echo $d $e\n\n5 $ and 6 $"
    )
    out = formulas.take_out(text, "page", found)
    assert [(f.tex, f.block) for f in found] == [("a_1", False), ("b", False), ("x = *y*", True)]
    assert "`$HOME`" in out and "$c$" in out and "echo $d $e" in out and "5 $ and 6 $" in out
    (tmp_path / "f.json").write_text(json.dumps(["<i>A</i>", "<i>B</i>", "<b>C</b>"]))
    words = [word for word in out.split() if "qqformula" in word]
    html = formulas.put_in(f"{words[0]} {words[1]} <p>{words[2]}</p>", tmp_path / "f.json")
    assert html == '<i>A</i> <i>B</i>: <div class="formula"><b>C</b></div>'


def test_the_lines_of_a_docstring_become_a_list():
    text = "Sums 2 * x.\n\nx: (B, ...), a\n    long one\nscale, shift: in [0, 1]\n\nValueError for `a*b`."
    assert docstrings.to_markdown(text).splitlines() == [
        r"Sums 2 \* x.",
        "",
        "",
        r"- **`x`**: (B, ...), a",
        "    long one",
        r"- **`scale, shift`**: in \[0, 1\]",
        "",
        "",
        "ValueError for `a*b`.",
    ]


# The site


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, fault",
    [("[x](nowhere.md)", "nowhere.md"), ("[x](#nowhere)", "#nowhere"), (r"$\frac$", "index.md: ParseError")],
)
def test_a_fault_stops_the_build(packages, tmp_path, monkeypatch, text, fault):
    def one_page(source):
        found = []
        source.mkdir(parents=True)
        (source / "index.md").write_text("# T\n\n" + formulas.take_out(text, "index.md", found))
        return ["index.md"], found

    monkeypatch.setattr(make_site, "write_sources", one_page)
    with pytest.raises(SystemExit, match=fault):
        make_site.build(tmp_path)


class Links(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.places = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.places |= {named[name] for name in ("id", "name") if named.get(name)}
        if tag == "a" and "href" in named:
            self.links.add(named["href"])
        elif tag == "link" and named.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.add(named["href"])
        elif named.get("src"):
            self.loaded.add(named["src"])


@pytest.mark.slow
def test_every_link_leads_somewhere_and_nothing_is_loaded_from_outside(site):
    found = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) >= 100
    for path, page in found.items():
        assert not [url for url in page.loaded if urlsplit(url).scheme not in ("", "data")], path.name
        for url in page.links | page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.relative_to(site)}: {url}"
            if parts.fragment and target in found:
                assert unquote(parts.fragment) in found[target].places | {"__tabbed"}, f"{path.name}: {url}"
    assert "qqformula" not in "".join(path.read_text(encoding="utf-8") for path in found)


@pytest.mark.slow
def test_pages_open_from_disk_without_a_complaint(site, tmp_path):
    with chromium(tmp_path, dark=True) as driver:
        shapes = {"mobile": True, "width": 390, "height": 844, "deviceScaleFactor": 1}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shapes)
        for page in ("index", "nbs/learn/01_consistency", "docs/results", "api/scfm.method.consistency"):
            driver.get((site / f"{page}.html").as_uri())
            wide, dark = driver.execute_script(
                "return [document.documentElement.scrollWidth, document.body.dataset.mdColorScheme]"
            )
            assert wide <= 390, f"{page} is {wide} pixels wide on a phone"
            assert dark == "slate"
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get((site / "nbs/learn/01_consistency.html").as_uri())
        fonts = "return document.fonts.ready.then(all => [...all].filter(f => f.status == 'loaded').length)"
        assert driver.find_elements("css selector", ".formula .katex") and driver.execute_script(fonts)
        driver.execute_script("document.querySelector('.md-search__input').focus()")
        driver.find_element("css selector", ".md-search__input").send_keys("consistency_target")
        end = time.monotonic() + 30
        while not (hits := driver.find_elements("css selector", "a.md-search-result__link")):
            assert time.monotonic() < end, "the search finds nothing"
            time.sleep(0.2)
        assert any("consistency" in hit.get_attribute("href") for hit in hits)
        assert not complaints(driver)
        assert not [url for url in requested(driver) if not url.startswith("file://")]
