"""A page as a browser lays it out, on a screen and on a phone: it fills its column, nothing is cut, small or covered.

To look at one: ``faults(laid_out(browser, screen, path.as_uri()))``. What is measured stands in ``MEASURE``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from browser import Browser


@dataclass(frozen=True)
class Screen:
    """In CSS pixels."""

    width: int
    height: int
    scale: int = 1
    mobile: bool = False


SCREENS = {"screen": Screen(1280, 900), "phone": Screen(400, 860, scale=2, mobile=True)}
LEAST_PX = 11.0
FILLS = 0.8  # of its column, by a figure
PLOTTED = 0.7  # of a figure's width, by its axes
MEASURE = """() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }
  const scale = t => { const m = t.getScreenCTM(); return Math.hypot(m.a, m.b) }
  const shown = e => e.checkVisibility()
  const letters = 'h1, h2, h3, p, li, td, th, dt, dd, figcaption, pre, label, button, input, select, textarea'
  const captions = [...document.querySelectorAll('figcaption')].filter(shown)
  return {
    page: [document.documentElement.scrollWidth, innerWidth],
    column: (document.querySelector('main') ?? document.querySelector('h1')).clientWidth,
    letters: [...document.querySelectorAll(letters)].filter(shown).map(e => parseFloat(getComputedStyle(e).fontSize)),
    captions: captions.map(e => [e.textContent, e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight]),
    images: [...document.images].filter(shown).map(i => [i.alt, i.naturalWidth, box(i)]),
    videos: [...document.querySelectorAll('video')].filter(shown).map(box),
    cells: [...document.querySelectorAll('td')].filter(shown).map(e => [e.textContent, e.scrollWidth - e.clientWidth]),
    tables: [...document.querySelectorAll('table')].map(box),
    figures: [...document.querySelectorAll('figure:has([role=img])')].map(f => ({
      title: f.querySelector('[role=img]').ariaLabel,
      frame: box(f.querySelector('.picture')),
      pictures: [...f.querySelectorAll('svg')].filter(s => s.checkVisibility()).map(s => ({
        box: box(s),
        axes: [...s.querySelectorAll('g[id^=axes_] > g[id^=patch_]:first-child')].map(box),
        texts: [...s.querySelectorAll('text')].map(t =>
          ({text: t.textContent, box: box(t), px: parseFloat(getComputedStyle(t).fontSize) * scale(t)})),
      })),
    })),
  }
}"""

Box = tuple[float, float, float, float]


def opened(browser: Browser, screen: str, address: str) -> None:
    """Open a page on one of ``SCREENS``."""
    shown = SCREENS[screen]
    browser.resize(shown.width, shown.height, shown.scale, mobile=shown.mobile)
    browser.open(address)
    browser.wait(f"location.href === {address!r} && document.readyState === 'complete'")


def signed_in(browser: Browser, screen: str, address: str) -> None:
    """Open a page that asks for a name, and come to its guideline."""
    opened(browser, screen, f"{address}/")
    browser.wait("document.activeElement && document.activeElement.id === 'name'")
    assert list(faults(measured(browser))) == []
    browser.type(f"ann on a {screen}")
    browser.press("Enter")
    browser.wait("!!document.getElementById('guideline') && !document.getElementById('guideline').hidden")
    assert list(faults(measured(browser))) == []


def check_planted(browser: Browser, styles: Mapping[str, str]) -> None:
    """Of the page that is open: each style is a fault, which is told in these words."""
    for told, style in styles.items():
        browser.add_style(style)
        said = list(faults(measured(browser)))
        assert any(told in fault for fault in said), (told, said[:3])
        browser.remove_style()


def laid_out(browser: Browser, screen: str, address: str) -> dict[str, Any]:
    """What ``faults`` reads of the page at ``address``."""
    opened(browser, screen, address)
    return measured(browser)


def measured(browser: Browser) -> dict[str, Any]:
    """Of the page that is open."""
    return browser.value(f"({MEASURE})()")


def crossing(a: Box, b: Box) -> float:
    """How far two boxes reach into one another, in pixels; 0 or less where they do not."""
    return min(min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))


def faults(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a page as it was measured."""
    if found["page"][0] > found["page"][1]:
        yield f"the page is {found['page'][0]} px wide, the screen {found['page'][1]}"
    if min(found["letters"]) < LEAST_PX:
        yield f"text of {min(found['letters'])} px"
    yield from (f"a cell is cut: {text}" for text, hidden in found["cells"] if hidden > 1)
    yield from (f"a caption is cut: {text}" for text, *hidden in found["captions"] if max(hidden) > 1)
    yield from (f"an image is not there: {name}" for name, width, _ in found["images"] if not width)
    media = [box for *_, box in found["images"]] + found["videos"]
    yield from (f"media beyond the edge: {box}" for box in media if box[2] > found["page"][1] + 1)
    if any(crossing(a, b) > 1 for a, b in itertools.combinations(media, 2)):
        yield "media lie on each other"
    widths = [right - left for left, _, right, _ in found["tables"]]
    yield from (f"a table of {width} px in its column" for width in widths if width > found["column"] + 1)
    for figure in found["figures"]:
        title, frame = figure["title"], figure["frame"]
        if len(figure["pictures"]) != 1:
            yield f"{title}: {len(figure['pictures'])} pictures are shown of it"
            continue
        (shown,) = figure["pictures"]
        picture = shown["box"]
        if frame[2] - frame[0] < FILLS * found["column"]:
            yield f"{title}: {frame[2] - frame[0]:.0f} px of a column of {found['column']}"
        if picture[2] > frame[2] + 1:
            yield f"{title}: cut at the right"
        left, right = min(box[0] for box in shown["axes"]), max(box[2] for box in shown["axes"])
        if right - left < PLOTTED * (picture[2] - picture[0]):
            yield f"{title}: its axes have {(right - left) / (picture[2] - picture[0]):.0%} of it"
        for text in shown["texts"]:
            if text["px"] < LEAST_PX - 0.01:
                yield f"{title}: {text['text']!r} has {text['px']:.1f} px"
            if (
                crossing(text["box"], picture)
                < min(text["box"][2] - text["box"][0], text["box"][3] - text["box"][1]) - 1
            ):
                yield f"{title}: {text['text']!r} is cut"
        for a, b in itertools.combinations(shown["texts"], 2):
            if crossing(a["box"], b["box"]) > 2:
                yield f"{title}: {a['text']!r} lies on {b['text']!r}"
