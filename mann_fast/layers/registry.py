"""The memories that have a name, what options they are made from, and published variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ..ops._checks import check_choice
from .base import Memory
from .dnc import DNC
from .lrua import LRUA
from .ntm import NTM, Content

MEMORIES: dict[str, type[Memory]] = {"lrua": LRUA, "ntm": NTM, "content": Content, "dnc": DNC}


class Preset(NamedTuple):
    """options: of MemoryLayer. forget_bias: of the LSTM, above what a new one has."""

    options: Mapping[str, Any]
    forget_bias: float = 0.0


# What the papers and their best known implementations compute; docs/variants.md says how far each is from its original.
PRESETS = {
    "santoro2016": Preset({"write_vector": "key", "sharpness": None, "write_target": "shared"}),
    "theano-ntm-one-shot": Preset({"sharpness": None}),
    "snowkylin": Preset(
        {"sharpness": None, "write_target": "shared", "order": "read_first", "eps": 1e-16}, forget_bias=1.0
    ),
    "snowkylin-2": Preset({"sharpness": None, "write_target": "shared", "eps": 1e-12}, forget_bias=1.0),
    "graves2014": Preset({"addressing": "ntm", "hidden_size": 100, "slot_size": 20, "num_heads": 1}),
}


def options_of(memory: Memory | type[Memory]) -> dict[str, Any]:
    """The names of a memory's options, sizes first, with their defaults."""
    return {field.name: field.default for field in fields(memory)}


def name_of(memory: Memory) -> str:
    """The name in MEMORIES; of another memory that of its class."""
    names = (name for name, kind in MEMORIES.items() if kind is type(memory))
    return next(names, type(memory).__name__)


def make_memory(addressing: str | Memory, options: Mapping[str, Any]) -> Memory:
    """The memory of that name, or the one given, with these options in the place of its own.

    Raises TypeError for an option that the memory does not have, or where its state is none; TypeError, ValueError as
    :class:`Memory`.
    """
    if isinstance(addressing, Memory):
        memory = addressing
    else:
        check_choice("addressing", addressing, tuple(MEMORIES))
        memory = MEMORIES[addressing]()
        options = {name: value for name, value in options.items() if not _says_nothing(memory, name, value)}
    own = options_of(memory)
    for name, value in options.items():
        if name not in own:
            has = f"addressing {name_of(memory)!r} has {', '.join(own)}"
            raise TypeError(f"{name} is no option here, got {value!r}; {has}")
    memory = replace(memory, **options)
    _ = memory.state_like  # once: it is asked for at every call
    return memory


def _says_nothing(memory: Memory, name: str, value: object) -> bool:
    """Whether a configuration of mann_fast 0.1 has this whatever it was made with: it held the options of every memory, those
    of the others at their defaults, and order=None for the memory's own order."""
    if name in options_of(memory):
        return name == "order" and value is None
    known = [defaults[name] for defaults in map(options_of, MEMORIES.values()) if name in defaults]
    return isinstance(value, (str, int, float)) and value in known
