"""SQL functions, each compiled for both backends.

There is no default compilation, so an unsupported database raises an error.
"""

from functools import lru_cache
from typing import Any, Final, TypeVar, assert_never, cast

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    Float,
    Integer,
    Label,
    Select,
    SelectBase,
    String,
    Subquery,
    Table,
    bindparam,
    case,
    func,
    literal,
    literal_column,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import ExternallyTraversible, replacement_traverse

from lynkr_store.backend import Backend
from lynkr_store.db.column_types import Real
from lynkr_store.schemas.units import Domain

# A sum's two halves: each stays within 64 bits for more than four billion rows.
_LOW_BITS: Final = 31
_LOW_MASK: Final = 2**_LOW_BITS - 1


def measured(column: ColumnElement[Any], domain: Domain) -> ColumnElement[Any]:
    """The column's value, or NULL if the stored value is not a measurement.

    One comparison checks both the range and the type of the stored value: SQLite orders every text
    and blob after every number, and PostgreSQL orders NaN after infinity.
    """
    limit = literal(domain.limit, column.type)
    return case((column.between(-limit, limit), column))


class scaled(FunctionElement[int]):  # noqa: N801 - named like an SQL function
    """``floor(x * scale + 0.5)`` of a measured value in its domain's integer units, else NULL.

    It is the same 64-bit integer on every backend, because it uses only products, sums and floors
    of IEEE doubles within ±2**53. The backends' own rounding functions and casts differ on ties.
    """

    type = BigInteger()
    name = "scaled"
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any], domain: Domain) -> None:
        limit, scale = literal(domain.limit, column.type), literal(domain.scale, Real)
        super().__init__(column, limit, scale)


@compiles(scaled, "postgresql")
def _scaled_postgresql(element: scaled, compiler: SQLCompiler, **kw: Any) -> str:
    x, limit, scale = (compiler.process(clause, **kw) for clause in element.clauses)
    units = f"CAST({x} AS DOUBLE PRECISION) * {scale} + CAST(0.5 AS DOUBLE PRECISION)"
    return f"CASE WHEN {x} BETWEEN -{limit} AND {limit} THEN CAST(floor({units}) AS BIGINT) END"


@compiles(scaled, "sqlite")
def _scaled_sqlite(element: scaled, compiler: SQLCompiler, **kw: Any) -> str:
    # Not every build of SQLite has floor(). CAST cuts toward zero, so it is one too high for a
    # negative fraction. Those are rare, so the other values take the shorter branch.
    x, limit, scale = (compiler.process(clause, **kw) for clause in element.clauses)
    units = f"({x} * {scale} + 0.5)"
    cut = f"CAST({units} AS INTEGER)"
    return (
        f"CASE WHEN {x} BETWEEN 0 AND {limit} THEN {cut} "
        f"WHEN {x} BETWEEN -{limit} AND 0 THEN {cut} - ({cut} > {units}) END"
    )


class as_real(FunctionElement[float]):  # noqa: N801
    """A number as a double, to compare it with one; SQLite compares all numbers as they are."""

    type = Real
    name = "as_real"
    inherit_cache = True


@compiles(as_real, "postgresql")
def _as_real_postgresql(element: as_real, compiler: SQLCompiler, **kw: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **kw)} AS DOUBLE PRECISION)"


@compiles(as_real, "sqlite")
def _as_real_sqlite(element: as_real, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


class count_of(FunctionElement[int]):  # noqa: N801
    """How many values are not NULL.

    Named with its schema: PostgreSQL's own ``count`` takes any type, so one that another role
    created for exactly this type would be preferred.
    """

    type = BigInteger()
    name = "count_of"
    inherit_cache = True


@compiles(count_of, "postgresql")
def _count_postgresql(element: count_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"pg_catalog.count({compiler.process(element.clauses, **kw)})"


@compiles(count_of, "sqlite")
def _count_sqlite(element: count_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"count({compiler.process(element.clauses, **kw)})"


class byte_length(FunctionElement[int]):  # noqa: N801
    """The length of a text in bytes: of its UTF-8, unless an SQLite file has another encoding."""

    type = BigInteger()
    name = "byte_length"
    inherit_cache = True


@compiles(byte_length, "postgresql")
def _byte_length_postgresql(element: byte_length, compiler: SQLCompiler, **kw: Any) -> str:
    text = compiler.process(element.clauses, **kw)
    return f"CAST(pg_catalog.octet_length({text}) AS BIGINT)"


@compiles(byte_length, "sqlite")
def _byte_length_sqlite(element: byte_length, compiler: SQLCompiler, **kw: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **kw)} AS BLOB))"


class each_id(FunctionElement[int]):  # noqa: N801
    """The ids that a scalar subquery of ``id`` selects, one in each row, in the column ``value``.

    The subquery may refer to earlier members of the same FROM: SQLite has no LATERAL, and allows
    this in a function's argument only.
    """

    type = BigInteger()
    name = "each_id"
    inherit_cache = True


@compiles(each_id, "sqlite")
def _each_sqlite(element: each_id, compiler: SQLCompiler, **kw: Any) -> str:
    # as an argument, not as a member of FROM, so that it can refer to the other members
    ids = compiler.process(element.clauses, **{**kw, "asfrom": False})
    return f"json_each((SELECT json_group_array(id) FROM {ids}))"  # noqa: S608 - compiled SQL


class one_of(FunctionElement[Any]):  # noqa: N801
    """The right side of ``column = value``, so that an index beginning with the column is used.

    PostgreSQL ignores a column that equals a constant when it considers the order of the rows. It
    then tends to scan the newest rows of all for the value, which takes long if the value became
    rare. An array of one value is not a constant, so only an index that begins with the column
    gives the order that the query asks for.
    """

    name = "one_of"
    inherit_cache = True


@compiles(one_of, "postgresql")
def _one_of_postgresql(element: one_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"ANY (ARRAY[{compiler.process(element.clauses, **kw)}])"


@compiles(one_of, "sqlite")
def _one_of_sqlite(element: one_of, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


class unindexed(FunctionElement[Any]):  # noqa: N801
    """The same value, written so that the planner does not choose an index for it.

    SQLite's planner has no statistics of the values unless ANALYZE was run, and may scan a whole
    index because of one term. See
    https://sqlite.org/optoverview.html#disqualifying_where_clause_terms_using_unary_

    PostgreSQL has statistics, but a generic plan assumes the same size for every range of numbers.
    It would then read two indexes for two ranges, one of which may contain the whole table. On
    PostgreSQL a text stays as it is, because the planner needs to know which texts are frequent.
    """

    name = "unindexed"
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        super().__init__(column)
        self.type = column.type


@compiles(unindexed, "postgresql")
def _unindexed_postgresql(element: unindexed, compiler: SQLCompiler, **kw: Any) -> str:
    value = compiler.process(element.clauses, **kw)
    return value if isinstance(element.type, String) else f"({value} + 0)"


@compiles(unindexed, "sqlite")
def _unindexed_sqlite(element: unindexed, compiler: SQLCompiler, **kw: Any) -> str:
    return f"+{compiler.process(element.clauses, **kw)}"


class same(FunctionElement[bool]):  # noqa: N801
    """Whether two texts are equal, with NULL equal to NULL only; it can be used in a join."""

    type = Boolean()
    name = "same"
    inherit_cache = True

    def self_group(self, against: Any = None) -> Any:
        """Stay as it is: SQLAlchemy adds ``= 1`` without a native boolean, and no index applies."""
        del against
        return self


@compiles(same, "postgresql")
def _same_postgresql(element: same, compiler: SQLCompiler, **kw: Any) -> str:
    # IS NOT DISTINCT FROM cannot be the key of a hash join
    one, other = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"(coalesce({one}, '') = coalesce({other}, '') AND ({one} IS NULL) = ({other} IS NULL))"


@compiles(same, "sqlite")
def _same_sqlite(element: same, compiler: SQLCompiler, **kw: Any) -> str:
    one, other = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({one} IS {other})"


def inserting(backend: Backend, table: Table) -> Any:
    """The dialect's own INSERT, which has ON CONFLICT."""
    match backend:
        case Backend.SQLITE:
            return sqlite_insert(table)
        case Backend.POSTGRESQL:
            # the engine has imported the dialect by now; a store on SQLite never imports it
            from sqlalchemy.dialects.postgresql import insert  # noqa: PLC0415

            return insert(table)
        case _:
            assert_never(backend)


def each_row(statement: Select[*tuple[Any, ...]]) -> Subquery:
    """A subquery that evaluates each of its expressions once for each row.

    Both databases would otherwise replace names by their expressions, and evaluate an expression
    three times if three sums use it. With OFFSET they do not.
    """
    return statement.offset(0).subquery()


_Statement = TypeVar("_Statement", bound=SelectBase)


def written_out(statement: _Statement) -> _Statement:
    """The same statement with its constants in its text; its parameters stay parameters.

    A constant that is sent separately costs as much as a parameter: psycopg splits the text at
    each, and PostgreSQL by default plans a statement with parameters again for each execution.
    """

    def constant(element: ExternallyTraversible, **_: Any) -> ColumnElement[Any] | None:
        if not isinstance(element, BindParameter) or element.required:
            return None
        value = literal_column(_written(element.value), element.type)
        return value if isinstance(element.value, str) else _written_number(value)

    return cast("_Statement", replacement_traverse(statement, {}, constant))


class _written_number(FunctionElement[Any]):  # noqa: N801
    """A constant with its type: PostgreSQL takes bare digits for an INTEGER if they fit."""

    name = "written_number"
    inherit_cache = True

    def __init__(self, digits: ColumnElement[Any]) -> None:
        super().__init__(digits)
        self.type = digits.type


@compiles(_written_number, "postgresql")
def _written_number_postgresql(element: _written_number, compiler: SQLCompiler, **kw: Any) -> str:
    digits = compiler.process(element.clauses, **kw)
    type_ = element.type.dialect_impl(compiler.dialect)
    if not isinstance(type_, BigInteger | Float):
        return digits
    return f"CAST({digits} AS {compiler.dialect.type_compiler_instance.process(type_)})"


@compiles(_written_number, "sqlite")
def _written_number_sqlite(element: _written_number, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


@lru_cache(maxsize=None, typed=True)  # 1 is not 1.0
def _written(value: float | str) -> str:
    return str(literal(value).compile(compile_kwargs={"literal_binds": True}))


def whole_number(name: str) -> BindParameter[int]:
    """A whole number as a parameter of a statement."""
    return bindparam(name, type_=BigInteger())


def exact_sum(name: str, value: ColumnElement[int]) -> list[Label[Any]]:
    """The three columns of an exact sum of scaled values: their number, and the sum's two halves.

    Two halves, because one 64-bit sum could overflow, and SQLite then raises an error.

    Returns:
        ``{name}_count``, ``{name}_high`` and ``{name}_low``: the sum is ``high * 2**31 + low``, in
            the domain's units.
    """
    return [
        count_of(value).label(f"{name}_count"),
        func.sum(value.bitwise_rshift(literal(_LOW_BITS, Integer))).label(f"{name}_high"),
        func.sum(value.bitwise_and(literal(_LOW_MASK, BigInteger))).label(f"{name}_low"),
    ]


def joined(high: int | None, low: int | None) -> int:
    """The sum whose halves `exact_sum` selects; 0 if there was no value."""
    return (int(high or 0) << _LOW_BITS) + int(low or 0)
