"""This release's number."""

__version__ = "0.1.0"
