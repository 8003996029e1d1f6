"""The application's revisions, h1 to h3."""
