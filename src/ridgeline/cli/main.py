"""The ``ridgeline`` program: one file per verb beside this one, imported only when that verb is called."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ridgeline import __version__
from ridgeline.errors import closest, nearest, os_reason

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
    "improve": "find what holds a training job or a server back, try the knob, prove the gain",
    "doctor": "what torch.compile does to a program: breaks, recompilations, fallbacks, and what they cost",
    "run": "a script under the settings of a doctor.toml, its code untouched",
    "generate": "generate text from a model",
    "serve": "OpenAI-compatible endpoint with continuous batching",
    "load": "load-test an endpoint: TTFT, latency percentiles, throughput",
    "compile": "what torch.compile makes of a model: all levels in one page; accuracy; packages",
    "runs": "list, show, compare and report runs",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``ridgeline`` program."""
    try:
        code = _main(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        code = 1
    except KeyboardInterrupt:  # while a verb is imported; within one, `verb` answers
        code = _refuse("interrupted", 130)
    raise SystemExit(_flush(code))


def _flush(code: int) -> int:
    """Write out what is printed; the exit code, which is 1 if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The reader has gone (`| head`): nobody to tell. Either way nothing more may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0 and not isinstance(error, BrokenPipeError):
            return _refuse(f"standard output: {os_reason(error)}", 1)
        return code or 1
    return code


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
    elif args[0] == "--version":
        print(f"ridgeline {__version__}")
    elif args[0] in VERBS:
        module = importlib.import_module(f"ridgeline.cli.{args[0]}")
        return _call(module.app, args[0], args[1:])
    else:
        what = "option" if args[0].startswith("-") else "verb"
        return _refuse(f"no such {what} '{args[0]}'{nearest(args[0], VERBS)}", 2)
    return 0


def _call(app: Any, name: str, args: list[str]) -> int:
    """Run a verb; the exit code. Its usage errors are one line, as all others are."""
    import typer
    from typer.main import get_command

    command: Any = get_command(app)
    names = list(getattr(command, "commands", ()))
    if names and not args:
        return _refuse(f"{name}: say which (valid: {', '.join(names)})", 2)
    if names and not args[0].startswith("-") and args[0] not in names:
        return _refuse(f"{name}: no such sub-verb '{args[0]}'{nearest(args[0], names)}", 2)
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, or the one that typer brings along since 0.26
    try:
        code = command.main(args=args, prog_name=f"ridgeline {name}", standalone_mode=False)
    except usage_error as error:
        return _refuse(_usage(error), 2)
    except typer.Abort:
        return _refuse("interrupted", 130)
    return code if isinstance(code, int) else 0


def _usage(error: Any) -> str:
    """The message alone; for an unknown option with the nearest one, or where they are listed."""
    name = getattr(error, "option_name", "")
    if type(error).__name__ == "NoSuchOption" and error.ctx is not None:
        options = [one for parameter in error.ctx.command.params for one in parameter.opts if one.startswith("--")]
        match = closest(name, [*options, "--help"])
        hint = f"did you mean '{match}'?" if match else f"`{error.ctx.command_path} --help` lists them"
        return f"no such option '{name}' ({hint})"
    message = str(error.format_message()).rstrip(".")
    return message[:1].lower() + message[1:]


def _refuse(message: str, code: int) -> int:
    print(f"ridgeline: {' '.join(message.split())}", file=sys.stderr)
    return code


def _help() -> str:
    rows = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    return (
        "ridgeline: one line from raw text to a served endpoint, every number beside its limit.\n\n"
        f"usage: ridgeline VERB [OPTIONS]      ridgeline VERB --help      ridgeline --version\n\n{rows}\n\n"
        "Every verb takes --json. Exit codes: 0 done, 1 the job failed, 2 the input is wrong."
    )
