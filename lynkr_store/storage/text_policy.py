"""Stores the policy for texts on an engine, so that everything that writes with it applies it."""

from typing import Final

from sqlalchemy import Connection, Engine

from lynkr_store.ingest.validation import TextPolicy

_POLICY: Final = "lynkr_store_text_policy"  # the execution option of an engine that a store uses


def set_policy(engine: Engine, policy: TextPolicy) -> None:
    """Set the policy of every `RoutingRepository` on the engine that gets no other policy.

    It is an execution option of the engine itself, so it applies to a host's own Sessions too.
    """
    engine.update_execution_options(**{_POLICY: policy})


def policy_in(bind: Engine | Connection) -> TextPolicy | None:
    """The policy that was set on the engine, or None."""
    policy: TextPolicy | None = bind.get_execution_options().get(_POLICY)
    return policy
