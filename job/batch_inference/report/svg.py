"""Charts as inline SVG: drawn by pygal, colored by the page's style sheet, with a title and a description for screen readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

import pygal
import pygal.style
from markupsafe import Markup

# Each chart is drawn twice: a phone shows the narrow one, since the text of the wide one would be too small there.
_SIZES = {"wide": (760, 220), "narrow": (310, 200)}
# Elements that pygal adds for a file of its own; on this page the style sheet replaces them.
_DROPPED_TAGS = ("title", "desc", "defs", "script", "style")
_NAMESPACE = "{http://www.w3.org/2000/svg}"


def bar_chart(
    name: str,
    title: str,
    sentence: str,
    values: Sequence[float],
    ticks: dict[int, str],
    *,
    text: Callable[[float], str],
    marks: Sequence[float] = (),
    sizes: Sequence[str] = ("wide", "narrow"),
) -> Markup:
    """Return a bar chart.

    Args:
        name: Identifier in the page.
        title: Title, for screen readers.
        sentence: Description of the data, for screen readers.
        values: Heights of the bars; not negative.
        ticks: Labels of the x axis, by the index of the bar that they stand at.
        text: Formats a value of the y axis.
        marks: Positions of vertical lines on the x axis, in bars from the left.
        sizes: Sizes to draw, ``wide`` and ``narrow``.
    """
    return Markup("").join(_draw(f"{name}-{size}", size, title, sentence, values, ticks, text, marks) for size in sizes)


def _draw(
    name: str,
    size: str,
    title: str,
    sentence: str,
    values: Sequence[float],
    ticks: dict[int, str],
    text: Callable[[float], str],
    marks: Sequence[float],
) -> Markup:
    width, height = _SIZES[size]
    # Counts have no fractions.
    scale = axis_steps(max(values, default=0.0), min_step=float(all(value == int(value) for value in values)))
    style = pygal.style.Style(label_font_size=11, major_label_font_size=11, font_family="sans-serif")
    chart = pygal.Bar(
        style=style, js=[], css=[], width=width, height=height, margin=2, margin_top=8, margin_right=14, spacing=6,
        show_legend=False, show_x_labels=False, show_x_guides=False, disable_xml_declaration=True, no_prefix=True,
        range=(0, scale[-1]), y_labels=[{"value": step, "label": text(step)} for step in scale],
        x_labels=[str(index) for index in range(len(values))], margin_bottom=22, print_values=False,
    )  # fmt: skip
    chart.add(title, [float(value) for value in values])
    root = chart.render_tree()
    _strip_pygal_extras(root)
    root.attrib.clear()
    root.set("class", f"plot {size}")
    root.set("viewBox", f"0 0 {width} {height}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for tag, content in (("desc", sentence), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = content
        root.insert(0, element)
    _annotate(root, values, ticks, marks)
    for element in root.iter():
        element.tag = str(element.tag).removeprefix(_NAMESPACE)
    # ElementTree escapes all text.
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def _strip_pygal_extras(element: ElementTree.Element) -> None:
    """Remove styles, scripts, tooltips and comments."""
    for child in list(element):
        tag = child.tag.removeprefix(_NAMESPACE) if isinstance(child.tag, str) else "comment"
        if tag in (*_DROPPED_TAGS, "comment") or "overlay" in (child.get("class") or ""):
            element.remove(child)
        else:
            _strip_pygal_extras(child)


def _annotate(
    root: ElementTree.Element, values: Sequence[float], ticks: dict[int, str], marks: Sequence[float]
) -> None:
    """Add labels below their bars, and vertical lines."""
    plot = next((e for e in root.iter() if (e.get("class") or "") == "plot"), None)
    frame = None if plot is None else next((e for e in plot if (e.get("class") or "") == "background"), None)
    if plot is None or frame is None:
        return
    width, height = float(frame.get("width", 0)), float(frame.get("height", 0))
    bars = [e for e in plot.iter() if "rect" in (e.get("class") or "").split()]
    lefts = [float(bar.get("x", 0)) for bar in bars]
    bar_width = float(bars[0].get("width", 0)) if bars else width
    # A bar stands in the middle of its slot, and pygal leaves some room at both ends of the axis.
    slot_width = lefts[1] - lefts[0] if len(lefts) > 1 else width
    origin = lefts[0] - (slot_width - bar_width) / 2 if len(lefts) > 1 else 0.0
    group = ElementTree.SubElement(plot, "g", {"class": "ticks"})
    for index, label in ticks.items():
        x = min(max(origin + index * slot_width, 0.0), width)
        anchor = "start" if x < 0.04 * width else "end" if x > 0.96 * width else "middle"
        element = ElementTree.SubElement(
            group, "text", {"x": f"{x:.1f}", "y": f"{height + 15:.1f}", "text-anchor": anchor}
        )
        element.text = label
    for mark in marks:
        x = min(max(origin + mark * slot_width, 0.0), width)
        ElementTree.SubElement(group, "path", {"class": "mark", "d": f"M{x:.1f} 0 v{height:.1f}"})


def axis_steps(top: float, *, min_step: float = 0.0, max_steps: int = 4) -> list[float]:
    """Return evenly spaced round numbers from 0 to at least ``top``, at least ``min_step`` apart.

    >>> axis_steps(730.0)
    [0.0, 200.0, 400.0, 600.0, 800.0]
    """
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    raw = max(top / max_steps, min_step)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    return [float(f"{step * index:.6g}") for index in range(math.ceil(top / step - 1e-9) + 1)]
