"""Fed-SB (Singhal et al., 2502.15436): A and the basis of B are fixed, and clients train the r×r core between them.

    ΔW = s·Q·C·A,  Q (m×r), A (r×n) the same at all clients;      C̄ = Σ p_i s_i C_i

The product is linear in C, so the mean is exact. An update has r² numbers per layer, independent of the layer's size.
Equal ranks only.

The paper computes Q, A and the first C from the SVD of the first gradient over the pooled data (LoRA-SB), which a
federated server does not see. fedelta draws Q (orthonormal) and A from the seed and starts from C = 0, so that only
cores are sent. The method needs a larger rank than others (up to 200 in the paper).
"""

from dataclasses import replace

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan

CORE = frozenset({"core"})


@register
class FedSB(Method):
    name = "fed-sb"
    paper = "Fed-SB, arXiv 2502.15436"
    summary = "an r×r core between two fixed factors; exact, r² numbers per layer"
    mixed_ranks = False
    properties = Properties(exact="always", linear=True)
    refused = (("server_optimizer", "it would move B out of the span of its basis"),)
    offline = "its clients share a basis of B that adapter folders do not contain"

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(down=CORE, train=CORE, up=CORE)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        # Every B_i is Q·C_i, so the mean of B is Q·C̄.
        means = moments.means()
        pairs = {module: LoraPair(pair.A, means[module].B) for module, pair in state.adapter.items()}
        return replace(state, adapter=Adapter(pairs)), {}
