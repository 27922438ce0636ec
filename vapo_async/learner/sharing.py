"""Which rows a rank takes through the model, and in which passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vapo_async.learner.balance import shards
from vapo_async.learner.batch import LearnerBatch
from vapo_async.learner.packing import Layout, choose_layout, cut, pass_count


@dataclass(frozen=True)
class Pass:
    """Some rows of a batch, cut to the longest of them: they go through a model together."""

    rows: list[int]
    """At least one."""
    width: int
    lengths: list[int] | None
    """Tokens of each row, where they go through without padding between them; None: padded."""
    counts: bool
    """False: it is only made because another rank makes one too, and nothing of it is used."""

    def of(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [N, T]: [n, width]."""
        return x[self.rows, : self.width]

    def mask_of(self, mask: Tensor) -> Tensor:
        """Likewise of a mask, all False where nothing is used."""
        return self.of(mask) & self.counts


@dataclass(frozen=True)
class Sharing:
    """How passes are made.

    Args:
        rank: this process's.
        ranks: how many share the rows.
        max_tokens: of one pass.
        cost: of a row with so many tokens, by which the rows are dealt out.
        worth_packing: see :func:`vapo_async.learner.packing.choose_layout`; 0 where the models cannot take packed rows.
    """

    rank: int
    ranks: int
    max_tokens: int
    cost: Callable[[int], float]
    worth_packing: float

    def passes(self, batch: LearnerBatch, rows: Sequence[int]) -> list[Pass]:
        """This rank's passes over its share of some rows of a batch; all ranks have the same number of them.

        With parameters in parts every pass is something that all ranks do together.
        """
        lengths = [batch.lengths[row] for row in rows]
        shares = shards(lengths, self.ranks, self.cost)
        dealt = [[lengths[i] for i in share] for share in shares]
        layout = choose_layout(dealt, self.max_tokens, self.worth_packing)
        count = pass_count(dealt, self.max_tokens, layout)
        own = [rows[i] for i in shares[self.rank]]
        shortest = min(rows, key=batch.lengths.__getitem__)
        made = cut([batch.lengths[row] for row in own], self.max_tokens, layout, count)
        return [self._pass(batch, [own[i] for i in some], shortest, layout) for some in made]

    @staticmethod
    def _pass(batch: LearnerBatch, rows: list[int], filler: int, layout: Layout) -> Pass:
        lengths = [batch.lengths[row] for row in rows or [filler]]
        packed = lengths if layout is Layout.packed else None
        return Pass(rows or [filler], max(lengths), packed, counts=bool(rows))
