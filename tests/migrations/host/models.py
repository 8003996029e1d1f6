"""The application's tables."""

from sqlalchemy import Enum, ForeignKey, Index, MetaData, Numeric, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class HostBase(DeclarativeBase):
    metadata = MetaData(
        naming_convention={"ix": "ix_%(column_0_label)s", "pk": "%(table_name)s_pk"}
    )


class Customer(HostBase):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    standing: Mapped[str] = mapped_column(Enum("good", "poor", name="standing"))
    note: Mapped[str | None] = mapped_column(String(200))

    __table_args__ = (Index("customers_by_name", "name"),)


class Invoice(HostBase):
    __tablename__ = "invoices"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(
        ForeignKey("customers.id", name="invoices_customer"), index=True
    )
    amount: Mapped[float] = mapped_column(Numeric(10, 2), server_default="0")
