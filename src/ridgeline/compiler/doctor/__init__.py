"""The compiler doctor: what torch.compile does to a program, ranked by the seconds it loses.

::

    ridgeline doctor train.py --> target.py    what to run: a script, module:callable, or a command such as torchrun
                                  session.py   starts it under the injection, waits, reads what it wrote, ranks
                                  inside.py    (in the program) hooks torch.compile, writes one file at the end
                                  observe.py   (in the program) events of the compiler --> Raw
                                  assemble.py  Raw --> Observation: broken.py, recompiled.py, silent.py
                                  timing.py    (in the program) eager against compiled, interleaved
                                  ranks.py     the same frames on several ranks
                                  report.py    verdict, advice, JSON, budget
                     --> fixes.py        candidates.py: settings.py and rewrites/ that may help a finding
                                         search.py: tries them in workers.py -> worker.py, judged by proof.py and time

Import from the files: those that run in the program need torch and the standard library alone.
"""
