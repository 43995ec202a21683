"""Which figure a study is: of the paper, and of the authors' article for readers, numbered apart.

The paper's numbers are those of the NeurIPS version, as far as they are known from third parties.
"""

from collections.abc import Sequence

PAPER: dict[str, tuple[str, ...]] = {  # figure -> studies
    "1": ("dense",),
    "2": ("dense",),
    "3": ("mask-criteria",),
    "4": ("mask-1",),
    "5": ("mask-0",),
    "6": ("dense",),
    "7": ("supermasks",),
    "S5": ("same-sign",),
    "table1": ("supermasks", "learned"),
}
ARTICLE: dict[str, tuple[str, ...]] = {
    "1": ("first-bars",),
    "2": ("mask-0",),
    "3": ("mask-0",),
    "5": ("dense",),
    "6": ("dense",),
    "7": ("mask-criteria",),
    "8": ("mask-1",),
    "9": ("dense",),
    "10": ("supermasks",),
}


def studies_of(figure: str) -> tuple[str, ...]:
    """The studies of a figure: "7", "S5" and "table1" of the paper, "article-7" of the article.

    Raises:
        ValueError: there is none.
    """
    table, name = PAPER, figure
    if figure.startswith("article-"):
        table, name = ARTICLE, figure.removeprefix("article-")
    if name not in table:
        known = [*PAPER, *(f"article-{number}" for number in ARTICLE)]
        raise ValueError(f"figure must be one of {', '.join(known)}; got {figure!r}.")
    return table[name]


def figures_of(study: str) -> str:
    """In words: "figure 3 of the paper, 7 of the article"; "" where it is in neither."""
    told = []
    for table, where in ((PAPER, "paper"), (ARTICLE, "article")):
        found = [name for name, studies in table.items() if study in studies]
        numbers = [name for name in found if name != "table1"]
        if numbers:
            told.append(f"figure{'s' * (len(numbers) > 1)} {_listed(numbers)} of the {where}")
        if "table1" in found:
            told.append("table 1")
    return ", ".join(told)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
