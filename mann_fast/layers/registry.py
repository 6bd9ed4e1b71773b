"""The memories that have a name, what options they are made from, and published variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ..ops._checks import check_choice
from .base import Memory
from .lrua import LRUA
from .ntm import NTM, Content

MEMORIES: dict[str, type[Memory]] = {"lrua": LRUA, "ntm": NTM, "content": Content}


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

    A saved configuration may hold the options of every memory. So what belongs to another one is passed over where it has
    that memory's default, and order=None is the memory's own.

    Raises TypeError for an option that the memory does not have, or a state that is none; TypeError, ValueError as
    :class:`Memory`.
    """
    if not isinstance(addressing, Memory):
        check_choice("addressing", addressing, tuple(MEMORIES))
    memory = addressing if isinstance(addressing, Memory) else MEMORIES[addressing]()
    own, name = options_of(memory), name_of(memory)
    taken = {}
    for option, value in options.items():
        others = {other: options_of(kind) for other, kind in MEMORIES.items() if option in options_of(kind)}
        if option == "order" and value is None:
            continue
        if option in own:
            taken[option] = value
        elif not others:
            raise TypeError(f"{option} is no option; addressing {name!r} has {', '.join(own)}")
        elif all(value != defaults[option] for defaults in others.values()):
            known = ", ".join(map(repr, others))
            raise TypeError(f"{option} is an option of addressing {known}, not of {name!r}, got {value!r}")
    memory = replace(memory, **taken)
    _ = memory.state_like  # once: it is asked for at every call
    return memory
