"""Which rows a rank takes through the model, and in which passes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vapo_async.learner.batch import LearnerBatch
from vapo_async.learner.packing import microbatches


@dataclass(frozen=True)
class Pass:
    """Some rows of a batch, cut to the longest of them: they go through a model together."""

    rows: list[int]
    """At least one."""
    width: int
    counts: bool
    """False: it is only made because another rank makes one too, and nothing of it is used."""

    def of(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [N, T]: [n, width]."""
        return x[self.rows, : self.width]

    def mask_of(self, mask: Tensor) -> Tensor:
        """Likewise of a mask, all False where nothing is used."""
        return self.of(mask) & self.counts


def passes(batch: LearnerBatch, rows: Sequence[int], *, rank: int, ranks: int, max_tokens: int) -> list[Pass]:
    """The passes of one rank over its share of some rows of a batch; all ranks have the same number of them.

    With parameters in parts every pass is something that all ranks do together.
    """
    shares = _shares([batch.lengths[row] for row in rows], ranks)
    cuts = [
        [[rows[share[i]] for i in cut] for cut in microbatches([batch.lengths[rows[j]] for j in share], max_tokens)]
        for share in shares
    ]
    fill = [rows[0]]
    own = [Pass(cut, max(batch.lengths[row] for row in cut), counts=True) for cut in cuts[rank]]
    missing = max(map(len, cuts)) - len(own)
    return own + [Pass(fill, batch.lengths[fill[0]], counts=False)] * missing


def _shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    if ranks == 1:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [sorted(order[rank::ranks]) for rank in range(ranks)]
