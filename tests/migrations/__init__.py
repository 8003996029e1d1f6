"""Revisions and adoption, on both backends."""
