"""What is kept of texts, as an engine says it to whoever writes on it."""

from typing import Final

from sqlalchemy import Connection, Engine

from lynkr_store.ingest.validation import TextPolicy

_POLICY: Final = "lynkr_store_text_policy"  # the execution option of an engine that a store uses


def set_policy(engine: Engine, policy: TextPolicy) -> None:
    """Have each `RoutingRepository` on the engine that is given no policy keep this one.

    An execution option says so, on the engine itself: it holds for a host's own Sessions too.
    """
    engine.update_execution_options(**{_POLICY: policy})


def policy_in(bind: Engine | Connection) -> TextPolicy | None:
    """The policy that the engine was given, or None."""
    policy: TextPolicy | None = bind.get_execution_options().get(_POLICY)
    return policy
