"""A process that compiles a target once, to fill the cache folder of its environment.

python -m ridgeline.compiler.package.warm TARGET SEED BATCH SEQ_LEN
"""

from __future__ import annotations

import sys

from ridgeline.errors import JobError, UserError


def main(arguments: list[str]) -> int:
    """Compile and run; 1 and one line on stderr when that fails."""
    import torch

    from ridgeline.compiler.failures import compiling
    from ridgeline.compiler.target import resolve

    text, seed, batch, seq_len = arguments
    try:
        target = resolve(text, int(seed), int(batch), int(seq_len))
        with compiling(target.name), torch.no_grad():
            torch.compile(target.module or target.call, dynamic=False)(*target.args, **target.kwargs)
    except (UserError, JobError) as error:
        print(f"ridgeline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
