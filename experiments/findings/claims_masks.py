"""Claims about masks on networks that are not trained: of criteria, learned, and in bits."""

from experiments.findings.claim import (
    CURVE,
    DENSE_ARM,
    FIRST_PRUNED,
    LEARNED,
    PAPER,
    UNTRAINED,
    Claim,
    each,
    of,
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
from experiments.study.studies import ALL, CONV, SCORES, SIGNS, WEIGHTS

SAME_SIGN = {**UNTRAINED, "criterion": "large_final_same_sign"}
ON_INIT = {**LEARNED, "weights": "init"}
SMALLEST = {**LEARNED, "weights": "signed_constant", "rescale": True}
HEADING = {"pruned": "heading.pruned", "kept": "heading.kept"}
untrained = of("supermasks", CONV, CURVE, best=True)
heading = of("supermasks", ALL, CURVE, columns=HEADING)
learned = of("learned", ("fc", "conv4"), (1,), profiles=PAPER)
scores = of("learned-sensitivity", ("fc",), (1,), few=2, profiles=PAPER)
MASKS: tuple[Claim, ...] = (
    *(
        of("first-bars", ALL, rounds)(
            "an untrained network is at chance, " + words,
            {"untrained": {**UNTRAINED, "criterion": "random"}},
            near("untrained", CHANCE, 0.05), "about 10%",
        )
        for words, rounds in (("unmasked", (0,)), ("under a random mask", CURVE))
    ),
    # Before 2026-11-30 the statistic of `best` claims was that of the best round of the mean curve.
    # All rows of FC were there then: 32.0, 74.5, 82.9% of it are 34.4, 76.2, 86.6% of each run's.
    *(
        untrained(
            f"{criterion} on untrained {found.fields['weights']} weights reaches about "
            f"{found.value:.0%}",
            {criterion: found.fields}, near(criterion, found.value, found.within), found.words,
            networks=(found.network,),
        )
        for found in PUBLISHED
        for criterion in [str(found.fields["criterion"])]
    ),
    # of the convolutional networks only: all rows of FC were there when these two were written
    untrained(
        "large_final_same_sign beats large_final on untrained weights, each at its best density",
        each("criterion", *SIGNS[:2], **UNTRAINED), beats("large_final_same_sign", "large_final"),
        "far above",
    ),
    untrained(
        "large_final_same_sign is better on signed constants than on initial weights",
        each("weights", *WEIGHTS, **SAME_SIGN), beats("signed_constant", "init"),
        "86% against 80%, 41% against 24%",
    ),
    # No row had the counts of these two (`heading`) when they were written.
    *(
        heading(
            text, {name: {**UNTRAINED, "criterion": "large_final"} for name in HEADING}, test,
            "pruned weights tend to zero", rounds=rounds,
        )
        for text, test, rounds in (
            ("of the weights that large_final prunes more were heading to zero than of those it "
             "keeps", beats("pruned", "kept"), CURVE),
            ("most of the weights that large_final prunes first (rounds 1 to 4) were heading to "
             "zero", beats("pruned", "kept", least=0.5), FIRST_PRUNED),
        )
    ),
    *(
        learned(
            f"a mask learned on the initial weights, not rescaled, reaches about {found.value:.0%}",
            {"learned": ON_INIT}, near("learned", found.value, found.within), found.words,
            networks=(found.network,), few=2,
        )
        for found in LEARNED_MASKS
    ),
    *(
        learned(
            f"learned masks on {weights} weights are better with rescaling",
            {"rescaled": {**LEARNED, "weights": weights, "rescale": True},
             "not rescaled": {**LEARNED, "weights": weights}},
            beats("rescaled", "not rescaled"), "better", networks=ALL,
        )
        for weights in WEIGHTS
    ),
    *(
        learned(
            f"a learned mask beats the best mask of a criterion ({ours} against {other})",
            {"learned": ON_INIT,
             "large_final_same_sign": {**SAME_SIGN, "weights": "signed_constant"}},
            beats("learned", "large_final_same_sign"), f"{ours} against {other}",
            networks=(network,), rounds=CURVE, best=True,
        )
        for network, ours, other in (("fc", "95.3%", "86%"), ("conv4", "65.4%", "41%"))
    ),
    learned(
        "rescaling closes most of the gap of a learned mask to the trained network",
        {"rescaled": {**ON_INIT, "rescale": True}, "dense": DENSE_ARM, "not rescaled": ON_INIT},
        fallen("rescaled", "dense", "not rescaled", most=0.5), "most of the gap",
    ),
    # Two seeds of FC were there when this was written.
    learned(
        "a rescaled learned mask and one seed take 1/32 of the dense network's bits and lose 2 "
        "points at most",
        {"mask and seed": SMALLEST, "dense": DENSE_ARM, "bits": SMALLEST},
        compressed("mask and seed", "dense", "bits", by=0.02, share=1 / 32),
        "a network is a mask and one seed", columns={"bits": "bits"},
    ),
    scores(
        "initial scores decide how much a learned mask keeps (the paper's figure 7: about 20% to "
        "80%)",
        {f"score {score:g}": {**LEARNED, "init_score": score} for score in (-4.0, 4.0)},
        apart("score -4", 0.20, "score 4", 0.80), "about 20% to 80%",
        networks=("fc", "conv4"), statistic="density",
    ),
    scores(
        "from scores of -2 to 2 (12% to 88% at the start) learned masks are about equally good "
        "(the supplement, as recalled: 93.3% to 95.3%)",
        {f"score {score:g}": {**LEARNED, "init_score": score}
         for score in SCORES if abs(score) <= 2},
        between(0.933 - 0.01, 0.953 + 0.01), "93.3% to 95.3%",
    ),
    *(
        of("permutation", ("fc",), (1,), few=2, profiles=PAPER)(
            f"one random network solves the task with its {what} permuted, too, by another mask "
            "(the authors' remark; 1 point below at most)",
            {"permuted": {**LEARNED, "permuted": what}, "as it is": LEARNED},
            no_worse("permuted", "as it is", by=0.01), "possible",
        )
        for what in ("pixels", "classes")
    ),
)  # fmt: skip
