"""What other libraries report, as records: one module for each library, with an extra of its name.

A module uses only the public names of `lynkr_store`; importing it imports that library.
"""
