"""Ridgeline: one PyTorch-native line from raw text to a served endpoint.

Importing this package imports no heavy library: rooms are imported by name, when they are used
(``from ridgeline.inference import Engine``).
"""

__version__ = "0.1.0"
