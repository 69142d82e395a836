"""The folder that goes first on a program's ``PYTHONPATH``; see ``sitecustomize.py`` in it."""
