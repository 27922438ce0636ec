"""Takes ``eval`` and ``exec`` off the roads of SymPy that honest answers go: a sealed process refuses both.

Each replacement gives what the original gives, or leaves the case to it, with one exception: a long decimal that mpmath
writes as a root stays a decimal (0.333333333333333, which SymPy reads as 1/3).
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

_LITERAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_IDENTIFIED = re.compile(r"\(?(-?[0-9]+)(?:/([0-9]+))?\)?")


@cache
def replace_eval() -> None:
    """For this process, for good; once."""
    from latex2sympy2_extended import latex2sympy2
    from sympy.core import evalf
    from sympy.polys import rootoftools
    from sympy.simplify import simplify  # the function, whose module it hides
    from sympy.utilities.lambdify import lambdify

    latex2sympy2._Latex2Sympy.parse_number = lambda _, text: sympy_number(text)
    # What stands alone with commas: a number in groups, or, after a zero, a decimal
    latex2sympy2.convert_number = lambda text: sympy_number(text.replace(",", ".") if text.startswith("0") else text)
    names = simplify.__globals__
    names["sympify"] = _identified(names["sympify"])
    evalf.lambdify = rootoftools.lambdify = _polynomial(lambdify)


def sympy_number(text: str) -> object:
    """The Integer, or the Float of as many digits as written. ``ValueError`` for what is no literal."""
    from sympy import Float, Integer

    text = text.replace(",", "").strip()
    if not _LITERAL.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return Float(text) if "." in text or "e" in text.lower() else Integer(int(text))


def _identified(sympify: Callable[..., Any]) -> Callable[..., Any]:
    """``sympify`` as nsimplify uses it: on the text that mpmath finds for a decimal, ``(3/4)`` for 0.75.

    ``ValueError`` for a text that is no ratio, upon which nsimplify reads the decimal as it stands.
    """
    from sympy import Rational

    def read(value: object, *args: Any, **options: Any) -> Any:
        if not isinstance(value, str):
            return sympify(value, *args, **options)
        ratio = _IDENTIFIED.fullmatch(value)
        if ratio is None:
            raise ValueError(f"{value!r} is not a ratio")
        return Rational(int(ratio[1]), int(ratio[2] or 1))

    return read


def _polynomial(lambdify: Callable[..., Any]) -> Callable[..., Any]:
    """``lambdify`` for one symbol and a polynomial of (Gaussian) integers: Horner's rule in place of generated code."""
    from mpmath import mpc
    from sympy import Poly, PolynomialError

    def function(symbol: Any, expression: Any) -> Callable[[Any], Any]:
        try:
            parts = [c.as_real_imag() for c in Poly(expression, symbol).all_coeffs()]
        except PolynomialError:
            return lambdify(symbol, expression)
        if not all(part.is_Integer for pair in parts for part in pair):
            return lambdify(symbol, expression)
        coefficients = [mpc(int(re), int(im)) if im else int(re) for re, im in parts]

        def horner(x: Any) -> Any:
            value: Any = 0
            for coefficient in coefficients:
                value = value * x + coefficient
            return value

        return horner

    return function
