"""Fed-PLoRA (2602.16936): a client trains r_i of R rank-1 modules and adds the others to its base for the round.

    client i:  I_i, r_i of the R indices at random;      base  W0 + Σ_{j∉I_i} b_j a_j,      trains j ∈ I_i
    server:    b̄_j = Σ_{i: j∈I_i} p_i s_i b_ij / c_j,    ā_j likewise

Every client trains on the whole global model, and over the rounds low-rank clients train all indices, too. The change
of the base lasts for one round. The indices are drawn without replacement for each client and round. An index that no
client drew keeps its values; the paper does not define this case.
"""

from dataclasses import replace

import numpy as np
import torch

from fedelta.lora.adapter import Adapter
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import ClientStart, ClientView, Method, Properties
from fedelta.methods.state import MethodState
from fedelta.seeds import derive_seed


@register
class FedPLoRA(Method):
    name = "fed-plora"
    paper = "Fed-PLoRA, arXiv 2602.16936"
    summary = "clients train random rank indices and add the others to their base for the round"
    properties = Properties(reduces_to_fedit="equal ranks", linear=True)

    offline = "adapter folders do not state their rank indices; with the first indices it equals replication"

    def personalize(self, state: MethodState, client: ClientView) -> ClientStart:
        R = state.adapter.rank
        rng = np.random.default_rng(derive_seed(state.seed, "rank indices", state.round, client.id))
        drawn = sorted(rng.choice(R, client.rank, replace=False).tolist())
        trained, rest = torch.tensor(drawn), torch.tensor([j for j in range(R) if j not in drawn], dtype=torch.long)
        tail = Adapter({m: pair.select(rest) for m, pair in state.adapter.items()}).products() if len(rest) else {}
        return ClientStart(state.adapter.map(lambda pair: pair.select(trained)), tail, trained)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means()), {}
