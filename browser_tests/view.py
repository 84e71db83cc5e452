"""The explorer as a person handles it: cells are clicked where they are drawn, numbers read where they stand."""

from dataclasses import dataclass
from typing import Any

from playwright.sync_api import Locator, Page

_PLACE = """
([plot, x, y]) => {
  const figure = document.querySelector(plot), { xaxis, yaxis } = figure._fullLayout, box = figure.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}
"""
_CUT = """
() => [...document.querySelectorAll(".plx svg.main-svg")].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll(".xtick text, .ytick text, .xtitle, .ytitle, .gtitle, .legendtext, .cbtitle text")].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1);
  }).map((text) => text.textContent);
})
"""
_OVERLAPPING = """
() => [...document.querySelectorAll(".plx svg.main-svg")].flatMap((svg) => {
  const texts = [...svg.querySelectorAll(".ytick text")];
  const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]).filter(([, box]) => box.width);
  return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([, other]) => one.left < other.right && other.left < one.right &&
    Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 4).map(([b]) => `${a} / ${b}`));
})
"""


@dataclass(frozen=True)
class View:
    """The explorer in a page."""

    page: Page

    def part(self, role: str) -> Locator:
        """The element that plays a role."""
        return self.page.locator(f".plx [data-role='{role}']").first

    def ready(self) -> "View":
        """Wait until it is drawn."""
        self.page.wait_for_selector(".plx[data-ready=true]")
        return self

    def choose(self, role: str, value: str) -> None:
        """Choose in one of the lists."""
        self.part(role).select_option(value)

    def click(self, column: float, row: float, plot: str = "heatmap") -> None:
        """Click where a plot has these coordinates: of the heatmap, a column and a row."""
        self.part(plot).scroll_into_view_if_needed()
        x, y = self.page.evaluate(_PLACE, [f".plx [data-role='{plot}']", column, row])
        self.page.mouse.move(x, y)
        self.page.mouse.click(x, y)

    @property
    def label(self) -> str:
        """The cell that is shown."""
        return self.part("cell").get_attribute("data-label") or ""

    def wait_for(self, label: str) -> None:
        """Wait until a cell is shown."""
        self.page.wait_for_selector(f".plx [data-role=cell][data-label='{label}']")

    def number(self, place: str, role: str = "mean") -> float:
        """A number in the panel, to all its digits: of a row, given as a selector of its attributes."""
        return float(self.page.locator(f".plx {place} [data-role='{role}']").first.get_attribute("data-value") or "nan")

    def effect(self, method: str, role: str = "mean") -> float:
        """The effect of the shown cell under a method."""
        return self.number(f"tr[data-method='{method}']", role)

    def tokens(self, side: str, kind: str = "") -> list[str]:
        """The tokens of a prompt; those that are ``changed`` or ``here``."""
        return self.part(side).locator(f".token{'.' + kind if kind else ''}").all_inner_texts()

    def drawn(self, plot: str) -> list[dict[str, Any]]:
        """What plotly has drawn."""
        return self.page.evaluate("(plot) => document.querySelector(plot).data.map((one) => ({ ...one }))", f".plx [data-role='{plot}']")

    def faults(self) -> dict[str, Any]:
        """Texts that are cut off or lie on each other, and whether the page is wider than its window."""
        wide = self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth + 1")
        return {"cut": self.page.evaluate(_CUT), "overlapping": self.page.evaluate(_OVERLAPPING), "wide": wide}


SOUND = {"cut": [], "overlapping": [], "wide": False}
