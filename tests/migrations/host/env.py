"""The application's Alembic environment, which keeps its revision in ``alembic_version``."""

from alembic import context

from tests.migrations.host.models import HostBase

given = context.config.attributes

context.configure(
    connection=given["connection"],
    target_metadata=given.get("target_metadata", HostBase.metadata),
    include_object=given.get("include_object"),
    include_schemas=given.get("include_schemas", False),
)
with context.begin_transaction():
    context.run_migrations()
