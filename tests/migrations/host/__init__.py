"""An application that has an Alembic environment of its own, and the store in its database."""
