"""Layout: process groups and mesh, FSDP2 and activation checkpointing, counted collectives, stateless random numbers.

Import from the files: ``ridgeline.parallel.rng`` needs numpy only, the others need torch.
"""
