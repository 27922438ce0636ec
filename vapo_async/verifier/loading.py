"""Loads the judges of a worker, with everything that they would import or generate later: a sealed process can do
neither. Imports no torch.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress

Judge = Callable[[dict[str, object]], bool]
"""A job as :func:`.jobs.encode_job` wrote it in, the verdict out. Raises anything on a model's text."""

_GENERATORS = 32
"""Polynomial rings of up to so many variables are prepared."""
# What SymPy imports inside its functions and an answer can reach.
_LATE = (
    *("assumptions.facts", "assumptions.lra_satask", "assumptions.satask", "assumptions.wrapper"),
    *(f"assumptions.handlers.{name}" for name in ("calculus", "common", "matrices", "ntheory", "order", "sets")),
    *("assumptions.predicates.matrices", "assumptions.predicates.sets"),
    *("combinatorics.coset_table", "combinatorics.fp_groups", "combinatorics.galois", "combinatorics.homomorphisms"),
    *("concrete.delta", "discrete.recurrences"),
    *("integrals.heurisch", "integrals.manualintegrate", "integrals.risch"),
    *("logic.algorithms.dpll", "logic.algorithms.dpll2", "logic.algorithms.lra_theory"),
    *("matrices.expressions.applyfunc", "physics.matrices", "physics.units", "physics.units.util"),
    *("polys.dispersion", "polys.distributedmodules", "polys.domains.old_fractionfield"),
    *("polys.domains.old_polynomialring", "polys.domains.quotientring", "polys.numberfields.resolvent_lookup"),
    *("sets.handlers.add", "sets.handlers.functions", "sets.handlers.issubset", "sets.handlers.mul"),
    *("sets.handlers.power", "sets.setexpr", "tensor.array.array_derivatives"),
)
# Each takes another road through parser, simplification and comparison.
_EXAMPLES = (
    (r"\frac{x}{2}", r"x \cdot \frac12"),
    (r"\{1, \sqrt{2}\}", r"\{\frac{2}{\sqrt2}, 1\}"),
    ("(-1, 1]", r"-1 < x \le 1"),
    ("2y = x + 2", "y = 0.5x + 1"),
    ("2", r"\sum_{n=0}^\infty \frac{1}{2^n}"),
    (r"\frac{\pi^2}{6}", r"\sum_{n=1}^\infty \frac{1}{n^2}"),
)


def load(needs: Collection[str]) -> dict[str, Judge]:
    """The judges by what :func:`.jobs.needs` calls them. Raises whatever an import or a dataset's name raises."""
    judges = {name: _equivalence() if name == "math_verify" else _reasoning_gym(name) for name in sorted(needs)}
    # Both would open source files to show a line of them.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    return judges


def _equivalence() -> Judge:
    import math_verify  # noqa: F401 - imported for later

    from vapo_async.verifier.math import equivalent

    for name in _LATE:
        with suppress(ImportError):  # another SymPy may have moved it
            importlib.import_module(f"sympy.{name}")
    _generate_monomial_arithmetic()
    for gold, pred in _EXAMPLES:
        equivalent(gold, pred)
    return lambda job: equivalent(str(job["gold"]), str(job["pred"]))


def _generate_monomial_arithmetic() -> None:
    """SymPy writes and executes the arithmetic of monomials for each number of variables, and keeps it."""
    from sympy.polys.monomials import MonomialOps

    for count in range(1, _GENERATORS + 1):
        operations = MonomialOps(count)
        for name in ("mul", "pow", "mulpow", "ldiv", "div", "lcm", "gcd"):
            getattr(operations, name)()


def _reasoning_gym(needed: str) -> Judge:
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(needed.removeprefix("reasoning_gym "))

    def judge(job: dict[str, object]) -> bool:
        entry = {"question": "", "answer": job["answer"], "metadata": job["metadata"]}
        # The base scorer pays partial credit for an answer that contains the right one.
        return bool(score(job["pred"], entry) == 1.0)

    return judge
