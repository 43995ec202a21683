"""Claims about masks on networks that are not trained: of criteria, learned, and in bits."""

from experiments.findings.claim import (
    CURVE,
    DENSE_ARM,
    FIRST_PRUNED,
    LEARNED,
    PAPER,
    UNTRAINED,
    Claim,
)
from experiments.findings.predicates import (
    apart,
    beats,
    between,
    compressed,
    fallen,
    near,
    no_worse,
)
from experiments.findings.published import CHANCE, LEARNED_MASKS
from experiments.findings.published import MASKS as PUBLISHED
from experiments.study import studies

MASKS: tuple[Claim, ...] = (
    *(
        Claim(
            "first-bars",
            "an untrained network is at chance, " + words,
            studies.ALL,
            {"untrained": {**UNTRAINED, "criterion": "random"}},
            rounds,
            near("untrained", CHANCE, 0.05),
            original="about 10%",
        )
        for words, rounds in (("unmasked", (0,)), ("under a random mask", CURVE))
    ),
    # Before 2026-11-30 the statistic of `best` claims was that of the best round of the mean curve.
    # All rows of FC were there then: 32.0, 74.5, 82.9% of it are 34.4, 76.2, 86.6% of each run's.
    *(
        Claim(
            "supermasks",
            f"{found.fields['criterion']} on untrained {found.fields['weights']} weights reaches "
            f"about {found.value:.0%}",
            (found.network,),
            {str(found.fields["criterion"]): found.fields},
            CURVE,
            near(str(found.fields["criterion"]), found.value, found.within),
            best=True,
            original=found.words,
        )
        for found in PUBLISHED
    ),
    # of the convolutional networks only: all rows of FC were there when these two were written
    Claim(
        "supermasks",
        "large_final_same_sign beats large_final on untrained weights, each at its best density",
        studies.CONV,
        {name: {**UNTRAINED, "criterion": name} for name in studies.SIGNS[:2]},
        CURVE,
        beats("large_final_same_sign", "large_final"),
        best=True,
        original="far above",
    ),
    Claim(
        "supermasks",
        "large_final_same_sign is better on signed constants than on initial weights",
        studies.CONV,
        {
            weights: {**UNTRAINED, "criterion": "large_final_same_sign", "weights": weights}
            for weights in studies.WEIGHTS
        },
        CURVE,
        beats("signed_constant", "init"),
        best=True,
        original="86% against 80%, 41% against 24%",
    ),
    # No row had the counts of these two (`heading`) when they were written.
    Claim(
        "supermasks",
        "of the weights that large_final prunes more were heading to zero than of those it keeps",
        studies.ALL,
        {name: {**UNTRAINED, "criterion": "large_final"} for name in ("pruned", "kept")},
        CURVE,
        beats("pruned", "kept"),
        columns={"pruned": "heading.pruned", "kept": "heading.kept"},
        original="pruned weights tend to zero",
    ),
    Claim(
        "supermasks",
        "most of the weights that large_final prunes first (rounds 1 to 4) were heading to zero",
        studies.ALL,
        {name: {**UNTRAINED, "criterion": "large_final"} for name in ("pruned", "kept")},
        FIRST_PRUNED,
        beats("pruned", "kept", least=0.5),
        columns={"pruned": "heading.pruned", "kept": "heading.kept"},
        original="pruned weights tend to zero",
    ),
    *(
        Claim(
            "learned",
            f"a mask learned on the initial weights, not rescaled, reaches about {found.value:.0%}",
            (found.network,),
            {"learned": {**LEARNED, "weights": "init"}},
            (1,),
            near("learned", found.value, found.within),
            few=2,
            profiles=PAPER,
            original=found.words,
        )
        for found in LEARNED_MASKS
    ),
    *(
        Claim(
            "learned",
            f"learned masks on {weights} weights are better with rescaling",
            studies.ALL,
            {
                "rescaled": {**LEARNED, "weights": weights, "rescale": True},
                "not rescaled": {**LEARNED, "weights": weights},
            },
            (1,),
            beats("rescaled", "not rescaled"),
            profiles=PAPER,
            original="better",
        )
        for weights in studies.WEIGHTS
    ),
    *(
        Claim(
            "learned",
            f"a learned mask beats the best mask of a criterion ({learned} against {other})",
            (network,),
            {
                "learned": {**LEARNED, "weights": "init"},
                "large_final_same_sign": {
                    **UNTRAINED,
                    "criterion": "large_final_same_sign",
                    "weights": "signed_constant",
                },
            },
            CURVE,
            beats("learned", "large_final_same_sign"),
            best=True,
            profiles=PAPER,
            original=f"{learned} against {other}",
        )
        for network, learned, other in (("fc", "95.3%", "86%"), ("conv4", "65.4%", "41%"))
    ),
    Claim(
        "learned",
        "rescaling closes most of the gap of a learned mask to the trained network",
        ("fc", "conv4"),
        {
            "rescaled": {**LEARNED, "weights": "init", "rescale": True},
            "dense": DENSE_ARM,
            "not rescaled": {**LEARNED, "weights": "init"},
        },
        (1,),
        fallen("rescaled", "dense", "not rescaled", most=0.5),
        profiles=PAPER,
        original="most of the gap",
    ),
    # Two seeds of FC were there when this was written.
    Claim(
        "learned",
        "a rescaled learned mask and one seed take 1/32 of the dense network's bits and lose 2 "
        "points at most",
        ("fc", "conv4"),
        {
            "mask and seed": {**LEARNED, "weights": "signed_constant", "rescale": True},
            "dense": DENSE_ARM,
            "bits": {**LEARNED, "weights": "signed_constant", "rescale": True},
        },
        (1,),
        compressed("mask and seed", "dense", "bits", by=0.02, share=1 / 32),
        columns={"bits": "bits"},
        profiles=PAPER,
        original="a network is a mask and one seed",
    ),
    Claim(
        "learned-sensitivity",
        "initial scores decide how much a learned mask keeps (the paper's figure 7: about 20% to "
        "80%)",
        ("fc", "conv4"),
        {f"score {score:g}": {**LEARNED, "init_score": score} for score in (-4.0, 4.0)},
        (1,),
        apart("score -4", 0.20, "score 4", 0.80),
        few=2,
        statistic="density",
        profiles=PAPER,
        original="about 20% to 80%",
    ),
    Claim(
        "learned-sensitivity",
        "from scores of -2 to 2 (12% to 88% at the start) learned masks are about equally good "
        "(the supplement, as recalled: 93.3% to 95.3%)",
        ("fc",),
        {
            f"score {score:g}": {**LEARNED, "init_score": score}
            for score in studies.SCORES
            if abs(score) <= 2
        },
        (1,),
        between(0.933 - 0.01, 0.953 + 0.01),
        few=2,
        profiles=PAPER,
        original="93.3% to 95.3%",
    ),
    *(
        Claim(
            "permutation",
            f"one random network solves the task with its {what} permuted, too, by another mask "
            "(the authors' remark; 1 point below at most)",
            ("fc",),
            {"permuted": {**LEARNED, "permuted": what}, "as it is": LEARNED},
            (1,),
            no_worse("permuted", "as it is", by=0.01),
            few=2,
            profiles=PAPER,
            original="possible",
        )
        for what in ("pixels", "classes")
    ),
)
