"""fedgrad's algorithms: one paper, one file.

Each file holds the server half and the client half of one algorithm as plain vector arithmetic,
with the paper's formula in its docstring. Everything that touches data, files, processes or
configuration lives in `app`; nothing here imports it.
"""
