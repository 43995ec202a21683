"""Criteria, actions and studies in the paper's words, for whoever reads figures and reports.

Files that programs read (CSV, JSON) keep the names of the code.
"""

from collections.abc import Mapping
from typing import Any

CRITERIA = {
    "large_final": "large final",
    "small_final": "small final",
    "large_init": "large init",
    "small_init": "small init",
    "large_init_large_final": "large init large final",
    "small_init_small_final": "small init small final",
    "magnitude_increase": "magnitude increase",
    "movement": "movement",
    "random": "random",
    "large_final_same_sign": "large final, same sign",
    "large_final_diff_sign": "large final, diff. sign",
    "magnitude_increase_same_sign": "magnitude increase, same sign",
    "magnitude_increase_diff_sign": "magnitude increase, diff. sign",
    "none": "dense",
}
# What a criterion keeps the largest of in each layer, of w_i before and w_f after training (TeX).
FORMULAS = {
    "large_final": r"$|w_f|$",
    "small_final": r"$-|w_f|$",
    "large_init": r"$|w_i|$",
    "small_init": r"$-|w_i|$",
    "large_init_large_final": r"$\min(\alpha|w_f|, |w_i|)$",
    "small_init_small_final": r"$-\max(\alpha|w_f|, |w_i|)$",
    "magnitude_increase": r"$|w_f| - |w_i|$",
    "movement": r"$|w_f - w_i|$",
    "random": "0, ties at random",
    "large_final_same_sign": r"$\max(0, w_i w_f / |w_i|)$",
    "large_final_diff_sign": r"$\max(0, -w_i w_f / |w_i|)$",
}
MASK1 = {
    "rewind": "rewind to init",
    "reinit": "reinit, rand sign",
    "signed_reinit": "reinit, init sign",
    "reinit_permute": "reinit by permutation",
    "signed_reinit_permute": "reinit by permutation, init sign",
    "reshuffle": "reshuffle, rand sign",
    "signed_reshuffle": "reshuffle, init sign",
    "constant": "constant, rand sign",
    "signed_constant": "constant, init sign",
    "reinit_rescaling": "reinit / density",
    "signed_reinit_rescaling": "reinit / density, init sign",
    "constant_rescaling": "constant / density",
    "signed_constant_rescaling": "constant / density, init sign",
}
MASK0 = {
    "zero": "zero",
    "freeze_init": "frozen at init",
    "freeze_init_zero_mask": "Variant 1",
    "freeze_init_zero_all": "Variant 2",
    "freeze_init_zero_reshuffle": "as many zeros, at random",
    "freeze_init_zero_rev": "zero if it grew",
}
WEIGHTS = {"init": "initial weights", "signed_constant": "signed constants"}
NETWORKS = {"fc": "FC", "conv2": "Conv2", "conv4": "Conv4", "conv6": "Conv6"}
DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "mnist-mini": "a subset of MNIST",
        "fashion-mnist": "Fashion-MNIST"}  # fmt: skip
REST = {
    "no rescale": "not rescaled",
    "rescale": "rescaled",
    "final_at the end": "masks of the end",
    "none": "as it is",
    "pixels": "pixels permuted",
    "classes": "classes permuted",
    "trained": "weights trained, too",
    "no trained": "weights as they were",
}


def network(name: str) -> str:
    return NETWORKS.get(name, name)


def arm(label: str, fields: Mapping[str, Any]) -> str:
    """The label of a curve (`studies.Arm.label`) in words; fields: those of its rows."""
    trained = fields["trained"] and fields["schedule"] == "iterative"
    tables = (CRITERIA, MASK1, MASK0, REST) if trained else (REST, CRITERIA, WEIGHTS)

    def word(part: str) -> str:
        return next((table[part] for table in tables if part in table), part)

    return " = ".join(", ".join(map(word, some.split(", "))) for some in label.split(" = "))


def said(text: str, study: str = "") -> str:
    """A sentence with the names of the code in it, in words.

    study: signed_constant is a mask-1 action in some, and what is masked, untrained, in others.
    """
    known = {**CRITERIA, **MASK0, **MASK1}
    if study not in ("mask-1", "rescaling"):
        known["signed_constant"] = WEIGHTS["signed_constant"]
        text = text.replace("signed_constant weights", "signed_constant")
        text = text.replace("init weights", "initial weights")
    for name in sorted(known, key=len, reverse=True):
        if "_" in name:
            text = text.replace(name, known[name])
    return text
