"""Names beside the points of a chart, where they cover neither points nor other names. Knows nothing of caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FONT_SIZE, _POINT = 8.0, 6.0  # points of 1/72 inch; a marker is twice the second across
_WIDE, _HIGH = 0.62, 1.15  # of a character and a line, in font sizes
# where a name may stand: the distance of its middle from the point, in (its width / 2 + marker, lines)
_PLACES = tuple(
    (side, lines)
    for lines in (0.0, -0.9, 0.9, -1.6, 1.6, -2.4, 2.4, -3.2, 3.2, -4.0, 4.0)
    for side in (1, -1, 0)
    if side or abs(lines) > 0.8
)
_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """A name, if it has one, and the point in data coordinates that it belongs to."""

    words: str
    at: tuple[float, float]
    color: str
    is_bold: bool = False


def label_points(axes: Any, labels: Sequence[Label]) -> None:
    """Write each name at the first place that is free; one that has none is left out. Axes must have their limits."""
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    inside = (frame.x0 / scale, frame.y0 / scale, frame.x1 / scale, frame.y1 / scale)
    at = [tuple(coordinate / scale for coordinate in axes.transData.transform(label.at)) for label in labels]
    taken: list[_Box] = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in at]
    for label, (x, y) in sorted(zip(labels, at, strict=True), key=lambda pair: not pair[0].is_bold):
        width, height = _WIDE * _FONT_SIZE * len(label.words), _HIGH * _FONT_SIZE
        for side, lines in _PLACES if label.words else ():
            middle = side * (width / 2 + _POINT + 1), lines * height
            left, low = x + middle[0] - width / 2, y + middle[1] - height / 2
            box = (left, low, left + width, low + height)
            if _holds(inside, box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                style = {"ha": "center", "va": "center", "fontsize": _FONT_SIZE, "color": label.color, "zorder": 6}
                style |= {
                    "bbox": {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
                }
                weight = "bold" if label.is_bold else "normal"
                axes.annotate(label.words, label.at, middle, textcoords="offset points", fontweight=weight, **style)
                break


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _holds(outer: _Box, inner: _Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]
