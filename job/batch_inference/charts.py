"""Plots as inline SVG: pygal draws, the page's style sheet colours, and screen readers get a title and a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

import pygal
import pygal.style
from markupsafe import Markup

# Two drawings of each plot: a phone shows the narrow one, where the text of the wide one would be too small to read.
_SIZES = {"wide": (760, 220), "narrow": (310, 200)}
# pygal draws for itself; on this page the style sheet does it.
_DROPPED = ("title", "desc", "defs", "script", "style")
_NAMESPACE = "{http://www.w3.org/2000/svg}"


def bars(
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
    """A bar chart.

    Args:
        name: Identifier in the page.
        title: What it shows, for screen readers.
        sentence: What there is to see, likewise.
        values: Heights; not negative.
        ticks: Labels of the x axis: number of the bar that they stand at, and text.
        text: Writes a value of the y axis.
        marks: Lines across it: places on the x axis, in bars from the left.
        sizes: What to draw, ``wide`` and ``narrow``.
    """
    return Markup("").join(
        _drawn(f"{name}-{size}", size, title, sentence, values, ticks, text, marks) for size in sizes
    )


def _drawn(
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
    # Of whole things there is no half.
    scale = steps(max(values, default=0.0), least=float(all(value == int(value) for value in values)))
    style = pygal.style.Style(label_font_size=11, major_label_font_size=11, font_family="sans-serif")
    chart = pygal.Bar(
        style=style, js=[], css=[], width=width, height=height, margin=2, margin_top=8, margin_right=14, spacing=6,
        show_legend=False, show_x_labels=False, show_x_guides=False, disable_xml_declaration=True, no_prefix=True,
        range=(0, scale[-1]), y_labels=[{"value": step, "label": text(step)} for step in scale],
        x_labels=[str(place) for place in range(len(values))], margin_bottom=22, print_values=False,
    )  # fmt: skip
    chart.add(title, [float(value) for value in values])
    root = chart.render_tree()
    _undress(root)
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
    # The tree's writer escapes all text.
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def _undress(element: ElementTree.Element) -> None:
    for child in list(element):
        tag = child.tag.removeprefix(_NAMESPACE) if isinstance(child.tag, str) else "comment"
        if tag in (*_DROPPED, "comment") or "overlay" in (child.get("class") or ""):
            element.remove(child)
        else:
            _undress(child)


def _annotate(
    root: ElementTree.Element, values: Sequence[float], ticks: dict[int, str], marks: Sequence[float]
) -> None:
    """Labels below the bars that they belong to, and lines across the plot."""
    plot = next((e for e in root.iter() if (e.get("class") or "") == "plot"), None)
    frame = None if plot is None else next((e for e in plot if (e.get("class") or "") == "background"), None)
    if plot is None or frame is None:
        return
    width, height = float(frame.get("width", 0)), float(frame.get("height", 0))
    drawn = [float(e.get("x", 0)) for e in plot.iter() if "rect" in (e.get("class") or "").split()]
    wide = next((float(e.get("width", 0)) for e in plot.iter() if "rect" in (e.get("class") or "").split()), width)
    # Bars stand in the middle of their places, and pygal leaves some room at both ends of the axis.
    each = drawn[1] - drawn[0] if len(drawn) > 1 else width
    left = drawn[0] - (each - wide) / 2 if len(drawn) > 1 else 0.0
    group = ElementTree.SubElement(plot, "g", {"class": "ticks"})
    for place, label in ticks.items():
        x = min(max(left + place * each, 0.0), width)
        anchor = "start" if x < 0.04 * width else "end" if x > 0.96 * width else "middle"
        element = ElementTree.SubElement(
            group, "text", {"x": f"{x:.1f}", "y": f"{height + 15:.1f}", "text-anchor": anchor}
        )
        element.text = label
    for mark in marks:
        x = min(max(left + mark * each, 0.0), width)
        ElementTree.SubElement(group, "path", {"class": "mark", "d": f"M{x:.1f} 0 v{height:.1f}"})


def steps(top: float, *, least: float = 0.0, most: int = 4) -> list[float]:
    """Round numbers from 0 to beyond ``top``, evenly spaced, at least ``least`` apart.

    >>> steps(730.0)
    [0.0, 200.0, 400.0, 600.0, 800.0]
    """
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    raw = max(top / most, least)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    return [float(f"{step * place:.6g}") for place in range(math.ceil(top / step - 1e-9) + 1)]
