"""The logger that config.yaml names: each attempt becomes a row of LYNKR_STORE_URL."""

from lynkr_store import Store, StoreSettings
from lynkr_store.integrations.litellm import StoreLogger

# the proxy's server ends by SIGTERM, without the interpreter's exit
store = Store(settings=StoreSettings(handle_sigterm=True))
logger = StoreLogger(store)
