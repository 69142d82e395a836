"""What a compiler verb is pointed at: a function or model in a file or module, a model folder, or the demo's model.

``module:name`` and ``file.py:name`` name a function, an ``nn.Module`` (object or class) or a factory: a function
without arguments that returns one. Its inputs come from the same module: ``example_inputs()``, a function that returns
the arguments as a tuple (or keyword arguments as a dict), or ``INPUTS``, such a tuple or dict. A model that needs other
inputs than its neighbours carries them itself, as an attribute ``example_inputs`` of the named object.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.errors import UserError, nearest

DEMO = "demo"
DEMO_CONFIG = Path(__file__).parents[3] / "examples" / "demo.toml"
DEMO_VOCAB = 8192
EXAMPLES = "give the module a function example_inputs() that returns the arguments as a tuple, or a tuple INPUTS"


@dataclass
class Target:
    """Something to compile: ``call(*args, **kwargs)``, and the module that holds its parameters, if any."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; 0 for a function."""
        return sum(one.numel() for one in self.module.parameters()) if self.module is not None else 0

    def leaves(self) -> list[tuple[str, Tensor]]:
        """What can have a gradient: floating-point inputs, then parameters."""
        given = [(f"input {at}", one) for at, one in enumerate(self.args)] + [*self.kwargs.items()]
        found = [(name, one) for name, one in given if isinstance(one, Tensor) and one.is_floating_point()]
        return found + (list(self.module.named_parameters()) if self.module is not None else [])

    def require_grad(self) -> None:
        """Make the inputs ask for gradients when nothing else does, so that there is a backward pass."""
        if not any(one.requires_grad for _, one in self.leaves()):
            for _, one in self.leaves():
                one.requires_grad_(True)
        if not any(one.requires_grad for _, one in self.leaves()):
            raise UserError(f"{self.name}: no floating-point input and no parameter, so nothing has a gradient")


def resolve(text: str, seed: int = 0, batch: int = 1, seq_len: int = 64) -> Target:
    """The target that ``text`` names, built with this seed; ``batch`` and ``seq_len`` shape a language model's tokens.

    Raises:
        UserError: no such file, module, name or folder; no inputs; the user's code raised.
    """
    torch.manual_seed(seed)
    if text == DEMO:
        return _language_model(text, demo_model(), batch, seq_len)
    if ":" in text and not Path(text).exists():
        return _named(text)
    if Path(text).is_dir():
        from ridgeline.models import load

        return _language_model(text, load(text), batch, seq_len)
    if Path(text).suffix == ".py":
        raise UserError(f"target '{text}': say which function or model, as {text}:NAME")
    raise UserError(f"target '{text}': expected module:name, file.py:name, a model folder or '{DEMO}'")


class Logits(nn.Module):
    """A decoder from tokens to logits: the form that is compiled, exported and served."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder: Any = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` ``[batch, seq]`` int64 -> ``[batch, seq, vocab]``."""
        logits: Tensor = self.decoder.logits(self.decoder(tokens))
        return logits


def demo_model() -> nn.Module:
    """The demo's model in its training dtype, random weights: the shape `ridgeline demo` trains.

    Raises:
        UserError: the package came without its examples.
    """
    from ridgeline.config import load_config
    from ridgeline.models import Decoder, config_from_section

    if not DEMO_CONFIG.is_file():
        raise UserError(f"target '{DEMO}': {DEMO_CONFIG} is not there; name a model folder instead")
    config = load_config(DEMO_CONFIG)
    decoder = Decoder(config_from_section(config.model, DEMO_VOCAB))
    for name, parameter in decoder.named_parameters():
        std = decoder.init_std(name)
        nn.init.normal_(parameter, std=std) if std else nn.init.constant_(parameter, decoder.init_value(name))
    return decoder.to({"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype])


def _language_model(name: str, decoder: nn.Module, batch: int, seq_len: int) -> Target:
    config: Any = decoder.config
    longest = config.context_length
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: the model's context is {longest}")
    model = Logits(decoder).eval()
    tokens = torch.randint(0, config.vocab_size, (batch, seq_len))
    return Target(name, model, (tokens,), module=model)


def _named(text: str) -> Target:
    place, _, name = text.rpartition(":")
    module = load_place(place, f"target '{text}'")
    if not hasattr(module, name):
        found = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise UserError(f"target '{text}': no '{name}' in {place}{nearest(name, found)}")
    thing = getattr(module, name)
    if not callable(thing):
        raise UserError(f"target '{text}': '{name}' is a {type(thing).__name__}, not a function or a model")
    built = _built(thing, text)
    given = getattr(thing, "example_inputs", None) or getattr(built, "example_inputs", None)
    args, kwargs = _inputs(given or getattr(module, "example_inputs", getattr(module, "INPUTS", None)), text)
    return Target(text, built, args, kwargs, built if isinstance(built, nn.Module) else None)


def load_place(place: str, what: str) -> Any:
    """A module by name or the path of its file; what its own code raises is one line that begins with ``what``."""
    try:
        if not place.endswith(".py"):
            sys.path[:0] = [] if "" in sys.path else [""]
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise UserError(f"{what}: no file {place}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # Dynamo looks a function's module up by name
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: importing {place} raised {_short(error)}") from None


def _built(thing: Any, text: str) -> Callable[..., Any]:
    """The module of a class or factory; anything else as it is."""
    if isinstance(thing, nn.Module):
        return thing
    is_class = inspect.isclass(thing) and issubclass(thing, nn.Module)
    try:
        needs = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return thing  # type: ignore[no-any-return]
    required = [one for one in needs if one.default is one.empty and one.kind in (0, 1, 3)]
    if not is_class and required:
        return thing  # type: ignore[no-any-return]
    try:
        built = thing()
    except Exception as error:
        raise UserError(f"target '{text}': calling it without arguments raised {_short(error)}") from None
    return built if isinstance(built, nn.Module) else thing


def _inputs(given: Any, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is None:
        raise UserError(f"target '{text}': no example inputs; {EXAMPLES}")
    try:
        given = given() if callable(given) else given
    except Exception as error:
        raise UserError(f"target '{text}': example_inputs() raised {_short(error)}") from None
    if isinstance(given, dict):
        return (), dict(given)
    if isinstance(given, Tensor):
        return (given,), {}
    if not isinstance(given, (tuple, list)):
        raise UserError(f"target '{text}': example inputs are a {type(given).__name__}; {EXAMPLES}")
    return tuple(given), {}


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
