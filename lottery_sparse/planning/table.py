"""The result of `ls.plan`, as a value and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from lottery_sparse.planning.measuring import FORMS, Cost


@dataclass(frozen=True)
class Row:
    """A layer with its measured costs, its present form, and the best form.

    Attributes:
        shape: of the layer's input.
        density: share of the weights that the mask keeps.
        nonzero: share of the weights that it keeps and that are not zero.
        paths: form -> what it takes. "dense" is there for comparison in a training, since it has no
            mask.
    """

    name: str
    kind: str  # "Linear 784 -> 300"
    shape: tuple[int, ...]
    density: float
    nonzero: float
    paths: dict[str, Cost]
    present: str
    choice: str

    @property
    def ratio(self) -> float:
        """Time of the dense layer over that of the choice: above 1 is faster than dense."""
        return self._speed("dense", self.choice)

    @property
    def verdict(self) -> str:
        """A sentence: the form that the layer gets, and why."""
        now = self.paths[self.present]
        beside = ""
        if "dense" in self.paths and self.choice != "dense":
            beside = f" ({self.ratio:.2f}x as fast as dense)"
        if self.choice != self.present:
            speed, memory = self._speed(self.present, self.choice), self._memory(self.choice)
            return (
                f"{self.present} -> {self.choice}: {speed:.2f}x as fast, {memory:.2f}x the "
                f"memory{beside}"
            )
        stays = f"stays {self.present}{beside}"
        if not now.reliable:
            return f"{stays}: not measured reliably, repetitions differ {1 + now.spread:.2f}x"
        others = {n: c.ms for n, c in self.paths.items() if c.reliable and n != self.present}
        others.pop("dense", None)
        if not others:
            known = set(self.paths) - {"dense", self.present}
            why = "no other form was measured reliably" if known else "it has no other form"
            return f"{stays}: {why}"
        best = min(others, key=others.__getitem__)
        takes = f"{best} takes {1 / self._speed(self.present, best):.2f}x the time"
        return f"{stays}: {takes} and {self._memory(best):.2f}x the memory"

    def _speed(self, a: str, b: str) -> float:
        if a not in self.paths:
            return float("nan")
        return self.paths[a].ms / self.paths[b].ms

    def _memory(self, form: str) -> float:
        return self.paths[form].bytes / max(self.paths[self.present].bytes, 1)


@dataclass(frozen=True)
class Plan:
    """The result of `plan`, and whether it was applied; as text it is a table."""

    rows: list[Row]
    training: bool
    threads: int
    applied: bool

    def __str__(self) -> str:
        forms = [name for name in FORMS if any(name in row.paths for row in self.rows)]
        head = ["layer", "what", "input", "kept", *(f"{n} ms / kB" for n in forms), "form"]
        lines = [head]
        for row in self.rows:
            cells = [
                f"{'' if c.reliable else '~'}{c.ms:.3f} / {c.bytes / 1e3:.0f}"
                if (c := row.paths.get(n))
                else "-"
                for n in forms
            ]
            size = "x".join(map(str, row.shape))
            kept = f"{row.density:.4g}"
            if row.nonzero < row.density:
                kept += f" ({row.nonzero:.4g} not zero)"
            lines.append([row.name, row.kind, size, kept, *cells, row.verdict])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        what = "a training step" if self.training else "inference"
        title = f"{what} of each layer, {self.threads} thread(s)"
        return "\n".join([title, *table, *self._notes()])

    def _notes(self) -> list[str]:
        before, after = (
            (sum(c.ms for c in costs), sum(c.bytes for c in costs) / 1e3)
            for costs in (
                [row.paths[row.present] for row in self.rows],
                [row.paths[row.choice] for row in self.rows],
            )
        )
        changed = sum(row.choice != row.present for row in self.rows)
        now = f"{changed} of {len(self.rows)} layers get another form"
        notes = [
            f"together {before[0]:.3f} ms and {before[1]:.0f} kB as they were, {after[0]:.3f} ms "
            f"and {after[1]:.0f} kB as planned; {now if self.applied else 'nothing is changed'}"
        ]
        if not all(cost.reliable for row in self.rows for cost in row.paths.values()):
            notes.append(
                "~ was not measured reliably: repetitions disagree; such a form is not taken"
            )
        for row in self.rows:
            if row.nonzero < row.density and row.choice not in ("dense", "packed"):
                zeros = 1 - row.nonzero / row.density
                notes.append(
                    f"{row.name}: {zeros:.4g} of the weights that its mask keeps are zero; "
                    "ls.set_masks_(model, ls.Masks.of_nonzero(model)) prunes them"
                )
        return notes
