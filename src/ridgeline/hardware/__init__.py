"""What this machine is (:func:`inventory`), what it can do (:func:`ceilings`), and what its maker says (:func:`peaks_for`).

Only the standard library is imported here; torch is imported by the processes that measure.
"""

from ridgeline.hardware.inventory import inventory
from ridgeline.hardware.measured import Ceilings, cache_folder, ceilings
from ridgeline.hardware.peaks import Peaks, peaks_for

__all__ = ["Ceilings", "Peaks", "cache_folder", "ceilings", "inventory", "peaks_for"]
