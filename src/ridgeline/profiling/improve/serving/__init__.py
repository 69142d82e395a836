"""``improve`` for a served model: the engine under a fixed load, a process per run, greedy answers compared.

The parent (:mod:`job`, :mod:`rules`, :mod:`outputs`) imports no torch; :mod:`child` is what runs in the process.
"""

from ridgeline.profiling.improve.serving.job import Load, Served, ServeJob, from_run, parse_load

__all__ = ["Load", "ServeJob", "Served", "from_run", "parse_load"]
