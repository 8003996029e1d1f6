"""Column types, and the annotations that the models use.

The declared types are those of the gateway's file, so a comparison shows no difference. A stored
value that does not have its column's type is returned as it is, so no read fails because of one
value; `lynkr_store.schemas.Reading` converts or drops it.
"""

from datetime import datetime
from typing import Annotated, Any

from sqlalchemy import BigInteger, Dialect, Double, Integer, Text
from sqlalchemy.orm import mapped_column
from sqlalchemy.types import DOUBLE_PRECISION, REAL, TypeDecorator, TypeEngine

from lynkr_store.schemas import epoch_ms, utc


class _CastByName(TypeEngine[Any]):
    """A type of PostgreSQL whose parameters are cast to exactly this type.

    SQLAlchemy's psycopg dialect casts a text to VARCHAR, and leaves a double to the driver, which
    sends the smallest integer that holds it. If another role created an operator for exactly these
    types, PostgreSQL would use it to compare them with a TEXT or DOUBLE PRECISION column.
    """

    render_bind_cast = True

    def adapt(self, cls: type[Any], **kw: Any) -> Any:  # noqa: ARG002
        """Keep this type: the dialect would replace it by its own."""
        return super().adapt(type(self), **kw)


class _Text(_CastByName, Text):
    """TEXT."""


class _DoublePrecision(_CastByName, DOUBLE_PRECISION[float]):
    """DOUBLE PRECISION."""

    def result_processor(self, dialect: Dialect, coltype: object) -> None:
        """No conversion: the driver returns a float."""


WholeNumber = BigInteger().with_variant(Integer(), "sqlite")
"""INTEGER in SQLite, where it holds 64 bits; BIGINT in PostgreSQL."""

Real: TypeEngine[float] = (
    Double().with_variant(REAL(), "sqlite").with_variant(_DoublePrecision(), "postgresql")
)
"""REAL in SQLite, which is a double there; DOUBLE PRECISION in PostgreSQL."""

PlainText = Text().with_variant(_Text(collation="C"), "postgresql")
"""TEXT, compared and ordered by its bytes on both."""


class EpochMillis(TypeDecorator[datetime]):
    """An instant, stored as epoch milliseconds. A naive datetime is an error."""

    impl = WholeNumber
    cache_ok = True

    def process_bind_param(self, value: datetime | int | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """To epoch milliseconds."""
        return None if value is None else epoch_ms(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """To an aware UTC datetime; a stored value that is not an instant is returned as it is."""
        if type(value) is not int:
            return value
        try:
            return utc(value)
        except OverflowError:
            return value  # type: ignore[return-value]

    def coerce_compared_value(self, op: Any, value: Any) -> TypeEngine[Any]:  # noqa: ARG002
        """Compare instants in their own type."""
        return self


class Flag(TypeDecorator[bool]):
    """A bool, stored as 0 or 1 in an integer column on both backends."""

    impl = WholeNumber
    cache_ok = True

    def process_bind_param(self, value: bool | None, dialect: Dialect) -> int | None:  # noqa: ARG002, FBT001
        """To 0 or 1."""
        return None if value is None else int(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> bool | None:  # noqa: ARG002
        """To a bool; any other stored value is returned as it is."""
        return bool(value) if type(value) is int and value in (0, 1) else value


Words = Annotated[str, mapped_column(PlainText)]
"""Names and free text: no fixed set of values, no maximum length."""

Instant = Annotated[datetime, mapped_column(EpochMillis)]
TokenCount = Annotated[int, mapped_column(WholeNumber)]
"""Tokens. NULL means not measured, which is not 0."""
Count = Annotated[int, mapped_column(WholeNumber)]
Score = Annotated[float, mapped_column(Real)]
"""Scores and rates."""
Dollars = Annotated[float, mapped_column(Real)]
"""US dollars. NULL means that the price is not known."""
Milliseconds = Annotated[float, mapped_column(Real)]
"""A duration."""
Latency = Annotated[float, mapped_column(Integer().with_variant(_DoublePrecision(), "postgresql"))]
"""A duration; the gateway declares it INTEGER but sometimes stores a fraction."""
YesNo = Annotated[bool, mapped_column(Flag)]
"""0 or 1. NULL means not known."""
JsonText = Annotated[str, mapped_column(PlainText)]
"""JSON, stored as text and not checked: other programs may store text that is not JSON."""
