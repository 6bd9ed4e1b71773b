"""The memories that have a name, what options they are made from, and published variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops._checks import check_choice
from .base import Memory
from .dnc import DNC
from .lrua import LRUA
from .ntm import NTM, Content
from .sparse import Sparse

MEMORIES: dict[str, type[Memory]] = {
    "lrua": LRUA,
    "ntm": NTM,
    "content": Content,
    "dnc": DNC,
    "sparse": Sparse,
}
OF_0_1 = (LRUA, NTM, Content)  # the memories of mann_fast 0.1


class Preset(NamedTuple):
    """options: of MemoryLayer. forget_bias: of the LSTM, above what a new one has. draw: gives a layer its first weights, where
    these are not the layer's own."""

    options: Mapping[str, Any]
    forget_bias: float = 0.0
    draw: Callable[[Any], None] | None = None


def _draw(layer: Any, draw: Callable[[Tensor, int, int], Any]) -> None:
    """``draw(weight, inputs, outputs)`` of the weights of LSTM, heads and projection, where the inputs of an LSTM are z and its
    hidden state, and the outputs those of one gate. Biases are 0."""
    for module in (layer.controller, layer.heads, layer.projection):
        if isinstance(module, nn.LSTMCell):
            inputs, outputs = module.input_size + module.hidden_size, module.hidden_size
        elif isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        else:
            continue
        for name, parameter in module.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
            else:
                draw(parameter, inputs, outputs)


def draw_as_sonnet(layer: Any) -> None:
    """As google-deepmind/dnc has it from Sonnet: normal with a deviation of inputs^-1/2, cut off at two deviations."""

    def draw(weight: Tensor, inputs: int, outputs: int) -> None:
        deviation = inputs**-0.5
        nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    _draw(layer, draw)


def draw_as_xavier(layer: Any) -> None:
    """As RobertCsordas/dnc: uniform (Glorot and Bengio 2010), with the gain of tanh for an LSTM's cell gate."""

    def draw(weight: Tensor, inputs: int, outputs: int) -> None:
        bound = math.sqrt(6 / (inputs + outputs))
        nn.init.uniform_(weight, -bound, bound)

    _draw(layer, draw)
    if isinstance(layer.controller, nn.LSTMCell):
        for weight in (layer.controller.weight_ih, layer.controller.weight_hh):
            weight.chunk(4)[2].mul_(nn.init.calculate_gain("tanh"))


OF_BABI = {"addressing": "dnc", "hidden_size": 256, "num_slots": 256, "slot_size": 64, "num_heads": 4}

# What the papers and their best known implementations compute; docs/variants.md says how far each is from its original.
PRESETS = {
    "santoro2016": Preset({"write_vector": "key", "sharpness": None, "write_target": "shared"}),
    "theano-ntm-one-shot": Preset({"sharpness": None}),
    "snowkylin": Preset(
        {"sharpness": None, "write_target": "shared", "order": "read_first", "eps": 1e-16}, forget_bias=1.0
    ),
    "snowkylin-2": Preset({"sharpness": None, "write_target": "shared", "eps": 1e-12}, forget_bias=1.0),
    "graves2014": Preset({"addressing": "ntm", "hidden_size": 100, "slot_size": 20, "num_heads": 1}),
    "graves2016": Preset(OF_BABI, forget_bias=1.0, draw=draw_as_sonnet),
    "csordas2019": Preset(
        {**OF_BABI, "masks": True, "deallocate": True, "link_sharpening": True, "clip": 20.0},
        forget_bias=1.0,
        draw=draw_as_xavier,
    ),
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
        if isinstance(memory, OF_0_1):
            options = {
                name: value for name, value in options.items() if not _says_nothing(memory, name, value)
            }
    own = options_of(memory)
    for name, value in options.items():
        if name not in own:
            has = f"addressing {name_of(memory)!r} has {', '.join(own)}"
            raise TypeError(f"{name} is no option here, got {value!r}; {has}")
    memory = replace(memory, **options)
    memory.make_cached()  # which is asked for at every call
    return memory


def _says_nothing(memory: Memory, name: str, value: object) -> bool:
    """Whether a configuration of mann_fast 0.1 has this whatever it was made with: it held the options of every memory, those
    of the others at their defaults, and order=None for the memory's own order."""
    if name in options_of(memory):
        return name == "order" and value is None
    known = [defaults[name] for defaults in map(options_of, MEMORIES.values()) if name in defaults]
    return isinstance(value, (str, int, float)) and value in known
