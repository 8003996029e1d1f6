"""SQL functions, named once and compiled per backend.

There is no default compilation: an unsupported database fails loudly.
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
    """The column's value, or NULL where the stored value is no measurement.

    The one comparison guards the range and the kind of the stored value: SQLite orders every
    text and blob after every number, and PostgreSQL orders NaN after infinity.
    """
    limit = literal(domain.limit, column.type)
    return case((column.between(-limit, limit), column))


class scaled(FunctionElement[int]):  # noqa: N801 - written like any SQL function
    """``floor(x * scale + 0.5)`` of a measured value in its domain's integer units, else NULL.

    The same 64-bit integer on every backend: products, sums and floors of IEEE doubles within
    ±2**53. The backends' own rounding functions and casts disagree with each other on ties.
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
    # SQLite's floor() is an option of its build; CAST cuts toward zero, so a negative fraction
    # is one too high. There are hardly any, so the others do not pay for them.
    x, limit, scale = (compiler.process(clause, **kw) for clause in element.clauses)
    units = f"({x} * {scale} + 0.5)"
    cut = f"CAST({units} AS INTEGER)"
    return (
        f"CASE WHEN {x} BETWEEN 0 AND {limit} THEN {cut} "
        f"WHEN {x} BETWEEN -{limit} AND 0 THEN {cut} - ({cut} > {units}) END"
    )


class as_real(FunctionElement[float]):  # noqa: N801
    """A number as a double, to be compared with one; SQLite compares numbers of any kind."""

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
    """How many values there are that are not NULL.

    PostgreSQL's own ``count`` takes any type, and so yields to one that takes exactly this.
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


class each_id(FunctionElement[int]):  # noqa: N801
    """The ids that a scalar subquery of ``id`` selects, one a row, in the column ``value``.

    The subquery may be correlated with what stands before it in the same FROM: SQLite allows that
    to a function's argument, and not to a subquery, for it has no LATERAL.
    """

    type = BigInteger()
    name = "each_id"
    inherit_cache = True


@compiles(each_id, "sqlite")
def _each_sqlite(element: each_id, compiler: SQLCompiler, **kw: Any) -> str:
    # an argument, and no member of FROM: else it would not be correlated with the others there
    ids = compiler.process(element.clauses, **{**kw, "asfrom": False})
    return f"json_each((SELECT json_group_array(id) FROM {ids}))"  # noqa: S608 - compiled SQL


class one_of(FunctionElement[Any]):  # noqa: N801
    """What a column equals when it equals the value, said so that an index in its order is used.

    To PostgreSQL a column that equals a constant has no part in the order of the rows. It then
    likes to walk the newest rows of all in search of the value, the more so the more of them the
    whole table has; where it became rare, that takes long. An array of one is no constant, so
    that only an index which begins with the column has the order asked for.
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
    """The same value, which a planner takes for no reason to use an index.

    SQLite's has no statistics of the values unless somebody ran ANALYZE, and walks the whole of an
    index for the sake of one term. See
    https://sqlite.org/optoverview.html#disqualifying_where_clause_terms_using_unary_

    PostgreSQL's knows better, but not where it plans for any parameters: then every range of a
    number is as short as every other to it, and it reads two indexes for two of them, one of which
    may hold the whole table. To it a text stays what it is: of those it has to know the frequent.
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
    """Whether two texts are equal, NULL being equal to NULL alone; fit for a join."""

    type = Boolean()
    name = "same"
    inherit_cache = True

    def self_group(self, against: Any = None) -> Any:
        """Itself: ``… = 1``, as a dialect without a type for it asks for, is no use to an index."""
        del against
        return self


@compiles(same, "postgresql")
def _same_postgresql(element: same, compiler: SQLCompiler, **kw: Any) -> str:
    # IS NOT DISTINCT FROM can be no key of a hash join
    one, other = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"(coalesce({one}, '') = coalesce({other}, '') AND ({one} IS NULL) = ({other} IS NULL))"


@compiles(same, "sqlite")
def _same_sqlite(element: same, compiler: SQLCompiler, **kw: Any) -> str:
    one, other = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({one} IS {other})"


def inserting(backend: Backend, table: Table) -> Any:
    """The dialect's own INSERT, which can say what is done ON CONFLICT."""
    match backend:
        case Backend.SQLITE:
            return sqlite_insert(table)
        case Backend.POSTGRESQL:
            # its engine has imported the dialect by now; a store on SQLite never does
            from sqlalchemy.dialects.postgresql import insert  # noqa: PLC0415

            return insert(table)
        case _:
            assert_never(backend)


def each_row(statement: Select[*tuple[Any, ...]]) -> Subquery:
    """A subquery that is computed as written: each expression once a row.

    Both databases would else put the expressions in the place of their names, and compute what
    is used in three sums three times: with OFFSET they do not.
    """
    return statement.offset(0).subquery()


_Statement = TypeVar("_Statement", bound=SelectBase)


def written_out(statement: _Statement) -> _Statement:
    """The same statement with its constants in its text; its parameters stay what they are.

    A constant that is sent beside the text costs as much as a parameter: psycopg takes the text
    apart at each, and PostgreSQL, unless told otherwise, plans anew what has any.
    """

    def constant(element: ExternallyTraversible, **_: Any) -> ColumnElement[Any] | None:
        if not isinstance(element, BindParameter) or element.required:
            return None
        value = literal_column(_written(element.value), element.type)
        return value if isinstance(element.value, str) else _written_number(value)

    return cast("_Statement", replacement_traverse(statement, {}, constant))


class _written_number(FunctionElement[Any]):  # noqa: N801
    """A constant number of its type: to PostgreSQL its digits are an INTEGER where they fit."""

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
    """A parameter of a statement."""
    return bindparam(name, type_=BigInteger())


def exact_sum(name: str, value: ColumnElement[int]) -> list[Label[Any]]:
    """The three columns of an exact sum of scaled values: how many there are, the sum's halves.

    Halves, because one 64-bit sum could overflow, which SQLite answers with an error.

    Returns:
        ``{name}_count``, ``{name}_high`` and ``{name}_low``: the sum is
        ``high * 2**31 + low``, in the domain's units.
    """
    return [
        count_of(value).label(f"{name}_count"),
        func.sum(value.bitwise_rshift(literal(_LOW_BITS, Integer))).label(f"{name}_high"),
        func.sum(value.bitwise_and(literal(_LOW_MASK, BigInteger))).label(f"{name}_low"),
    ]


def joined(high: int | None, low: int | None) -> int:
    """The sum whose halves `exact_sum` selects; 0 for no value."""
    return (int(high or 0) << _LOW_BITS) + int(low or 0)
