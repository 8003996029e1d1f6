"""SQL functions, named once and compiled per backend.

There is no default compilation: an unsupported database fails loudly.
"""

from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Double, Integer, case, cast, func, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from lynkr_store.domains import Domain

# A sum's two halves: each stays within 64 bits for more than four billion rows.
_LOW_BITS: Final = 31
_LOW_MASK: Final = 2**_LOW_BITS - 1


def measured(column: ColumnElement[Any], domain: Domain) -> ColumnElement[Any]:
    """The column's value, or NULL where the stored value is no measurement.

    The one comparison guards the range and the kind of the stored value: SQLite orders every
    text and blob after every number, and PostgreSQL orders NaN after infinity.
    """
    limit = literal(domain.limit, BigInteger)
    return case((column.between(-limit, limit), column))


class floor_plus_half(FunctionElement[int]):  # noqa: N801 - written like any SQL function
    """``floor(x + 0.5)`` of a double within ±2**53, as a 64-bit integer; NULL for NULL.

    The same integer on every backend: an addition and a floor of IEEE doubles. The backends' own
    rounding functions and casts disagree with each other on ties.
    """

    type = BigInteger()
    name = "floor_plus_half"
    inherit_cache = True


@compiles(floor_plus_half, "postgresql")
def _floor_postgresql(element: floor_plus_half, compiler: SQLCompiler, **kw: Any) -> str:
    return f"CAST(floor({compiler.process(element.clauses, **kw)} + 0.5) AS BIGINT)"


@compiles(floor_plus_half, "sqlite")
def _floor_sqlite(element: floor_plus_half, compiler: SQLCompiler, **kw: Any) -> str:
    # SQLite's floor() is an option of its build; CAST cuts toward zero, so a negative fraction
    # is one too high.
    x = f"({compiler.process(element.clauses, **kw)} + 0.5)"
    return f"(CAST({x} AS INTEGER) - (CAST({x} AS INTEGER) > {x}))"


def scaled(column: ColumnElement[Any], domain: Domain) -> ColumnElement[int]:
    """``floor(x * scale + 0.5)`` of a measured value in its domain's integer units, else NULL."""
    return floor_plus_half(cast(measured(column, domain), Double) * literal(domain.scale, Double))


def exact_sum(name: str, column: ColumnElement[Any], domain: Domain) -> list[ColumnElement[Any]]:
    """The three columns that make a `lynkr_store.queries.Sum`: how many values, their sum's halves.

    Halves, because one 64-bit sum could overflow, which SQLite answers with an error.

    Returns:
        ``{name}_count``, ``{name}_high`` and ``{name}_low``: the sum is
        ``high * 2**31 + low``, in the domain's units.
    """
    value = scaled(column, domain)
    return [
        func.count(measured(column, domain)).label(f"{name}_count"),
        func.sum(value.bitwise_rshift(literal(_LOW_BITS, Integer))).label(f"{name}_high"),
        func.sum(value.bitwise_and(_LOW_MASK)).label(f"{name}_low"),
    ]


def joined(high: int | None, low: int | None) -> int:
    """The sum whose halves `exact_sum` selects; 0 for no value."""
    return (int(high or 0) << _LOW_BITS) + int(low or 0)
