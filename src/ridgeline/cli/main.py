"""The ``ridgeline`` program: one file per verb beside this one, imported only when that verb is called."""

from __future__ import annotations

import importlib
import os
import sys

from ridgeline import __version__
from ridgeline.errors import nearest

# verb -> one-line help; the module beside this file has the verb's name and an `app`.
# Kept as data so that `ridgeline --help` imports no room.
VERBS = {
    "demo": "the whole line on embedded defaults: text, model, profile, endpoint, report",
    "env": "devices and their measured ceilings",
    "data": "build a token dataset from raw text; ask why a document was dropped",
    "models": "import GGUF files, inspect models",
    "plan": "parameters, FLOPs, memory and time before running",
    "train": "pretrain a model, or continue one",
    "profile": "where a training step's time goes, and what to try",
    "trace": "any PyTorch trace: what it lacks, where its time went, what to try",
    "improve": "find what holds a training job back, try the knob, prove the gain",
    "generate": "generate text from a model",
    "serve": "OpenAI-compatible endpoint with continuous batching",
    "load": "load-test an endpoint: TTFT, latency percentiles, throughput",
    "runs": "list, show, compare and report runs",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``ridgeline`` program."""
    try:
        _main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone (`| head`): nobody to tell, and nothing more to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
    elif args[0] == "--version":
        print(f"ridgeline {__version__}")
    elif args[0] in VERBS:
        module = importlib.import_module(f"ridgeline.cli.{args[0]}")
        module.app(args=args[1:], prog_name=f"ridgeline {args[0]}")
    else:
        what = "option" if args[0].startswith("-") else "verb"
        print(f"ridgeline: no such {what} '{args[0]}'{nearest(args[0], VERBS)}", file=sys.stderr)
        raise SystemExit(2)


def _help() -> str:
    rows = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    return (
        "ridgeline: one line from raw text to a served endpoint, every number beside its limit.\n\n"
        f"usage: ridgeline VERB [OPTIONS]      ridgeline VERB --help      ridgeline --version\n\n{rows}\n\n"
        "Every verb takes --json. Exit codes: 0 done, 1 the job failed, 2 the input is wrong."
    )
