"""Families of timm that were looked at, and on which too little is gained, with the reason that `apply` gives.

Shares are those of the models' multiply-adds, measured over all of timm's models of the family.
"""

REFUSED: dict[str, str] = {
    "timm.models.mvitv2": (
        "queries, keys and values of each block are pooled by convolutions over the whole grid. Only the MLPs could "
        "run on fewer tokens, which hold as little as 49 % of the multiply-adds: keep rate 0.7 would leave 0.85 of "
        "them even if matching tokens cost nothing."
    ),
    "timm.models.pvt_v2": (
        "each MLP has a convolution over the whole grid between its two layers, and the attention holds at most 32 % "
        "of the multiply-adds, of which keep rate 0.7 would save less than a third."
    ),
}
