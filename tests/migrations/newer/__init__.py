"""A release that is yet to come: its revisions, and a program that applies them as it would."""
