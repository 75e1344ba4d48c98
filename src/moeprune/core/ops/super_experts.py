"""Super experts: those whose outputs hold extreme activations, by the rule of REAP's authors.

Few experts of a model write outliers into the residual stream that later layers depend on; removing
one can break a model although its average score is low. Source: the code of arXiv 2510.13999.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1
EARLY = 0.75


def super_experts(largest: Mapping[int, Sequence[float]]) -> dict[int, frozenset[int]]:
    """The super experts of each layer, from the largest activation of every expert.

    An expert is one if its largest activation exceeds both the 99.5 % quantile (by linear
    interpolation) over all experts of the model and a tenth of the largest of all, and its layer is
    in the first three quarters of the MoE layers: towards the end large outputs are the rule.

    Args:
        largest: by layer index, for each expert the largest |activation| of its output. Values
            that are not finite are left out of the quantile and protect nobody.

    Returns:
        By layer index; layers without super experts are not in it.
    """
    finite = [a for values in largest.values() for a in values if np.isfinite(a)]
    if not finite:
        return {}
    bar = max(float(np.quantile(finite, QUANTILE)), SHARE_OF_LARGEST * max(finite))
    found = {}
    for position, (layer, values) in enumerate(sorted(largest.items())):
        if position < EARLY * len(largest):
            above = frozenset(e for e, a in enumerate(values) if np.isfinite(a) and a > bar)
            if above:
                found[layer] = above
    return found
