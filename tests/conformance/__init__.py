"""One suite over every backend, sync and async."""
