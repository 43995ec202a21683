"""How curves look: marker, line, colour. Told apart by marker and line; colour only helps.

Opposite criteria share a marker, one filled, one hollow. With the sign kept: solid and filled;
without: dotted and hollow, as in the paper.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    marker: str
    line: Any  # a matplotlib line style
    color: str
    filled: bool = True

    @property
    def plot(self) -> dict[str, Any]:
        return {
            "marker": self.marker,
            "linestyle": self.line,
            "color": self.color,
            "markerfacecolor": self.color if self.filled else "white",
        }


SOLID, DOTTED = "-", (0, (1, 1.4))
DASHED, DASH_DOT, LONG = (0, (4, 1.6)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2))

BLUE, ORANGE, GREEN, PURPLE = "#00429d", "#d9722e", "#1b7837", "#7b3294"
RED, BROWN, GREY, BLACK, TEAL = "#b2182b", "#8c510a", "#6f6f6f", "#000000", "#01857a"

CRITERION = {
    "large_final": Style("o", SOLID, BLUE),
    "small_final": Style("o", DASHED, BLUE, False),
    "large_init": Style("s", SOLID, GREEN),
    "small_init": Style("s", DASHED, GREEN, False),
    "large_init_large_final": Style("D", SOLID, PURPLE),
    "small_init_small_final": Style("D", DASHED, PURPLE, False),
    "magnitude_increase": Style("^", SOLID, ORANGE),
    "movement": Style("v", DASH_DOT, BROWN),
    "random": Style("x", DOTTED, GREY),
    "large_final_same_sign": Style("P", SOLID, RED),
    "large_final_diff_sign": Style("P", DASHED, RED, False),
    "magnitude_increase_same_sign": Style("<", SOLID, TEAL),
    "magnitude_increase_diff_sign": Style("<", DASHED, TEAL, False),
}

MASK1 = {
    "rewind": Style("o", SOLID, BLUE),
    "reinit": Style("s", DOTTED, ORANGE, False),
    "signed_reinit": Style("s", SOLID, ORANGE, True),
    "reinit_permute": Style("P", DOTTED, BROWN, False),
    "signed_reinit_permute": Style("P", SOLID, BROWN, True),
    "reshuffle": Style("^", DOTTED, GREEN, False),
    "signed_reshuffle": Style("^", SOLID, GREEN, True),
    "constant": Style("D", DOTTED, PURPLE, False),
    "signed_constant": Style("D", SOLID, PURPLE, True),
    "reinit_rescaling": Style("v", DASHED, RED, False),
    "signed_reinit_rescaling": Style("v", LONG, RED, True),
    "constant_rescaling": Style("<", DASHED, TEAL, False),
    "signed_constant_rescaling": Style("<", LONG, TEAL, True),
    "mask_init": Style("*", DASH_DOT, TEAL),
}

MASK0 = {
    "zero": Style("o", SOLID, BLUE, True),
    "freeze_init": Style("s", DASHED, ORANGE, False),
    "freeze_init_zero_mask": Style("^", DASH_DOT, GREEN, True),
    "freeze_init_zero_all": Style("D", LONG, PURPLE, True),
    "freeze_init_zero_reshuffle": Style("v", DOTTED, BROWN, False),
    "freeze_init_zero_rev": Style("x", DOTTED, RED, True),
    "freeze_reinit": Style("P", DOTTED, TEAL, False),
    "original": Style("*", SOLID, GREY, True),
}

# For curves that differ in a number, or in what has no style above.
CYCLE = tuple(
    Style(marker, line, color, filled)
    for marker, line, color, filled in (
        ("o", SOLID, BLUE, True),
        ("s", DASHED, ORANGE, False),
        ("^", DASH_DOT, GREEN, True),
        ("D", DOTTED, PURPLE, False),
        ("v", LONG, BROWN, True),
        ("P", SOLID, RED, True),
        ("x", DOTTED, GREY, True),
        ("<", DASHED, TEAL, False),
        ("*", SOLID, BLACK, True),
    )
)
