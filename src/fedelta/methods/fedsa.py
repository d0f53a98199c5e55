"""FedSA-LoRA (Guo et al., 2410.01463, ICLR 2025): clients share A and keep B.

    ā_j = Σ_{S_j} p_i a_ij / c_j,      B_i stays at client i

Clients train both factors. They share A and never send B. There is no global model, so the score of a run is the mean
over its clients' own models, and its result is one adapter per client. On the server, B is zero.

The paper has equal ranks; with mixed ranks, A is averaged over the contributors of each row. The authors' code also
keeps the classifier local. Here, heads are averaged as in every method, because a head is not part of B.
"""

from dataclasses import replace

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan


@register
class FedSA(Method):
    name = "fedsa"
    paper = "FedSA-LoRA, arXiv 2410.01463"
    summary = "mean of A; every client keeps its own B and has its own model"
    properties = Properties(linear=True)
    personal = True
    refused = (
        ("refresh", "the server has no product to add to the base, because clients keep B"),
        ("norm_weighting", "the server sees no B and can't compute the norm"),
    )
    offline = "every client keeps its own B, so there is no global adapter to write"

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(down=frozenset("A"), train=frozenset("AB"), up=frozenset("A"), keep=frozenset("B"))

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        means = moments.means()
        pairs = {module: LoraPair(means[module].A, pair.B) for module, pair in state.adapter.items()}
        return replace(state, adapter=Adapter(pairs)), {}
