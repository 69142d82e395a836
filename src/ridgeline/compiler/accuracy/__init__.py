"""Eager and compiled against float64: who is closer, and which operator is responsible when compiled is worse.

reference.py   the answer in float64
measure.py     errors of each output and gradient
prefix.py      parts of a captured graph
blame.py       the first operator that is worse, and the stage of the compiler that does it
repro.py       a script that shows it by itself
check.py       all of it for a target
"""
