"""What lies beside the rows of a store, in its curves, joined to them for claims and tables.

Rows are as they were committed; runs made before their curves were stored have none, and rows of
them lack what is joined here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def joined(rows: Iterable[Row], curves: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with `validation_accuracy`, of untrained networks, and `heading`, where stored.

    Args:
        curves: of `Store.curves`: an entry for each training, and one for all masks of a run on an
            untrained network, whose lists are over its rounds.
    """
    masks = {entry["run_id"]: entry for entry in curves if entry["of"] == "rounds"}
    trainings = {(entry["run_id"], entry["round"]): entry for entry in curves}
    told = []
    for row in rows:
        row, name = dict(row), row.get("stored_as", row["run_id"])
        if row["schedule"] == "one_shot":
            entry = masks.get(name)
            if entry is not None and entry["first"] <= row["round"] <= entry["last"]:
                at = row["round"] - entry["first"]
                row["validation_accuracy"] = entry["accuracy"][at]
                if "heading" in entry:
                    row["heading"] = entry["heading"][at]
        elif "heading" in (entry := trainings.get((name, row["round"]), {})):
            row["heading"] = entry["heading"]
        told.append(row)
    return told
