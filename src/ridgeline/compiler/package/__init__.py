"""Packages that start fast: a compiled model, the compiler's caches, and a manifest of what they fit.

    manifest.py   what a package was made with, and whether this machine is such a one
    build.py      make a package
    load.py       use one

A package holds machine code and is as trustworthy as its maker: the checksums find damage, not malice.
"""
