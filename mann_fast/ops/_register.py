"""From the declaration of an op: schemas, fake rules, gradients and batching rules of its raw ops, and how they are called.

Each kind of kernel implements the raw ops of a library of its own. Every raw op is registered under the Autograd key, to
differentiate or to raise: whatever reaches it, by way of vmap, torch.func, torch.export, torch.compile or forward mode, gets
the right gradient or an error, never none in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .._anchors import anchors_shape
from ._declare import Argument, Op, Output, Sizes, always, fixed_sizes, sizes_of

NAMESPACES = {"cpp": "mann_fast", "cuda": "mann_fast_cuda", "triton": "mann_fast_triton"}
LIBRARIES = {backend: torch.library.Library(name, "DEF") for backend, name in NAMESPACES.items()}

OPS: dict[str, Op] = {}  # every declared op, by name

_implemented: dict[tuple[str, str, str], bool] = {}
_raw: dict[tuple[str, str], Any] = {}  # of an op's name and a backend, the raw op
_functions: dict[tuple[str, str], type[_SingleLevelFunction]] = {}


def declare(op: Op) -> Op:
    """Register an op with all kinds of kernels."""
    OPS[op.name] = op
    for backend, library in LIBRARIES.items():
        library.define(op.schema)
        forward = _Raw(library, op.name, op.arguments, op.outputs, backend)
        forward.register(_forward_fake(op))
        _raw[op.name, backend] = forward.op
        if op.saved:
            library.define(op.backward_schema)
            backward = _Raw(library, f"{op.name}_backward", op.backward_arguments, op.results, backend)
            backward.register(_backward_fake(op, len(op.outer)))
            function = _functions[op.name, backend] = _differentiated(op, forward.op, backward.op, backend)
            backward.differentiate(_refused(op, backward.op))
            forward.differentiate(function)
    if op.layout:
        LIBRARIES["cuda"].define(
            f"{op.name}_layout(int B, int N, int D, {op.layout}, int anchor_every)"
            " -> (int blocks, int warps, str memory, int shared)"
        )
    return op


def has_kernels(name: str, backend: str, device: str) -> bool:
    """Whether a backend, which has been loaded, implements the op of this name for tensors of this type of device."""
    key = name, backend, device
    if key not in _implemented:
        dispatch_key = "Meta" if device == "meta" else device.upper()
        _implemented[key] = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{NAMESPACES[backend]}::{name}", dispatch_key
        )
    return _implemented[key]


has_kernels._dynamo_marked_constant = True  # for torch.compile, as _loading.missing


def call(op: Op, backend: str, *values: Any) -> Any:
    """Run a raw op, with gradients where they are asked for."""
    level = forward_ad._current_level
    if torch.compiler.is_compiling():
        if level >= 0:  # a compiled graph would drop tangents on their way here
            raise NotImplementedError(_NO_FORWARD_MODE.format(op.name))
        return _raw[op.name, backend](*values)
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return _raw[op.name, backend](*values)
    # What the Autograd key would do, without a way through the dispatcher into Python: a step is called T times.
    if op.saved and (level >= 0 or _asks_gradient(values)):
        return _apply(_functions[op.name, backend], values)
    return _run(_raw[op.name, backend], values)


_NO_FORWARD_MODE = (
    "{} has no forward-mode derivative (jvp, jacfwd); use mann_fast.reference or "
    "`with mann_fast.backend('reference')` for that, not compiled"
)


def _asks_gradient(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*values)


def _apply(function: type[_SingleLevelFunction], values: Sequence[Any]) -> Any:
    """``function.apply`` at the level of the transform that is being carried out. (torch.autograd.Function would hand the call
    to all of them, and bind the values to a signature, which takes 30 us.)"""
    for i in function.constants:
        if values[i] is not None and values[i].requires_grad:
            values = (*values[:i], values[i].detach(), *values[i + 1 :])
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return function.apply(*values)
    return function.apply(*values)


def _run(op: Any, values: Sequence[Any]) -> Any:
    """Call a raw op past autograd."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*values)
    except RuntimeError as error:
        if "API call failed" in str(error) or "not enough memory" in str(error):
            _explain(op, values, error)
        raise


def _explain(op: Any, values: Sequence[Any], error: RuntimeError) -> None:
    """Raise what the stable ABI keeps to itself when torch refuses it something: to allocate, which is done again here."""
    given = [x for x in values if isinstance(x, Tensor)]
    with torch.no_grad():
        results = op(*(x.to("meta") if isinstance(x, Tensor) else x for x in values))
    outputs = [results] if isinstance(results, Tensor) else list(results)
    copies = [x for x in given if not x.is_contiguous()]
    try:
        _ = [torch.empty(x.shape, dtype=x.dtype, device=given[0].device) for x in (*copies, *outputs)]
    except torch.AcceleratorError:  # of what ran before
        raise
    except RuntimeError:
        pass
    else:
        if "not enough memory" not in str(error):
            return
    of_outputs, of_copies = (sum(x.numel() * x.element_size() for x in part) for part in (outputs, copies))
    raise torch.OutOfMemoryError(
        f"{op._opname} is out of memory on {given[0].device}: its outputs take {of_outputs:,} bytes"
        + (f", and copies of arguments that are not contiguous {of_copies:,}" if copies else "")
    ) from error


def _below(op: Any, values: Sequence[Any]) -> Any:
    """Call a raw op inside the forward of a Function: past autograd, and on to the transforms outside."""
    if torch._C._are_functorch_transforms_active():
        # A Function's forward has gradients off; those outside record theirs.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return _run(op, values)
    return _run(op, values)


def _recorded() -> bool:
    """Whether somebody may differentiate what is computed now, or map over it."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _differentiated(op: Op, forward_op: Any, backward_op: Any, backend: str) -> type[_SingleLevelFunction]:
    """The Function around an op: forward keeps what backward takes."""
    arguments = [a.name for a in op.arguments]
    everything = [*op.names, *(f"output {x.name}" for x in op.outputs)]
    saved = [
        everything.index(name if name in arguments else f"output {name}")
        for name in (*op.saved, *op.also_saved)
    ]
    options = [everything.index(option.name) for option in op.backward_options]
    # What is kept counts as differentiable: so backward, which takes it, refuses to be differentiated whatever asks for it.
    constant = [i for i, x in enumerate(op.outputs) if x.integer or not x.differentiable]
    kept = [i for i, x in enumerate(op.outputs) if x.kept and i not in constant]
    perhaps = [i for i, x in enumerate(op.outputs) if i not in constant and (x.kept or x.when is not always)]
    outer = [i for i, x in enumerate(op.outputs) if x in op.outer]
    differentiable = [i for i, a in enumerate(op.arguments) if a.differentiable]

    class Differentiated(_SingleLevelFunction):
        constants = [i for i, a in enumerate(op.arguments) if not a.differentiable]

        @staticmethod
        def forward(ctx, *values):
            if op.interval and values[-1] == 0:
                values = (*values[:-1], op.interval(values, backend))
            outputs = _below(forward_op, values)
            both = (*values, *outputs)
            ctx.save_for_backward(*[both[i] for i in saved])
            ctx.options = [both[i] for i in options]
            missing = [outputs[i] for i in perhaps if _missing(op.outputs[i], outputs[i])]
            ctx.mark_non_differentiable(*[outputs[i] for i in constant], *missing)
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            if any(grads[i] is not None for i in kept):
                raise NotImplementedError(f"what {op.name} keeps for its backward has no gradient")
            grads = [grads[i] for i in outer]
            if all(grad is None for grad in grads):
                return (None,) * len(op.names)
            tensors = ctx.saved_tensors  # once: a checkpoint hands each out one time
            values = (*grads, *tensors[: len(op.saved)], *ctx.options)
            results = backward_op(*values) if _recorded() else _below(backward_op, values)
            if op.gradients:
                results = op.gradients(ctx, tensors, results)
            of_values, needed = [None] * len(op.names), ctx.needs_input_grad
            for i, result in zip(differentiable, results, strict=True):
                if needed[i]:  # else it may be the empty one of an argument that did not come
                    of_values[i] = result if op.gradients or op.arguments[i].per_sample else result.sum(0)
            return tuple(of_values)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(_NO_FORWARD_MODE.format(op.name))

    return Differentiated


def _refused(op: Op, backward_op: Any) -> type[_SingleLevelFunction]:
    """The Function around an op's backward, whose results raise where they are themselves differentiated."""

    class Refused(_SingleLevelFunction):
        constants = ()

        @staticmethod
        def forward(ctx, *values):
            return _below(backward_op, values)

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(
                f"{op.name} has no second derivative; "
                "use mann_fast.reference or `with mann_fast.backend('reference')` for that"
            )

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(_NO_FORWARD_MODE.format(op.name))

    return Refused


def define_in_place(schema: str) -> None:
    """A raw op of the C++ and CUDA kernels that changes tensors of its one caller, who differentiates it himself: for all
    others it raises where a gradient is asked for."""
    name = schema.split("(")[0]
    for backend in ("cpp", "cuda"):
        library = LIBRARIES[backend]
        library.define(schema)
        op = getattr(getattr(torch.ops, NAMESPACES[backend]), name).default

        def autograd(*values, op=op):
            if forward_ad._current_level >= 0 or _asks_gradient(values):
                raise NotImplementedError(
                    f"{name} has no gradient; use the public functions of mann_fast.ops"
                )
            return _run(op, values)

        library.impl(name, autograd, "Autograd")


def _missing(output: Output, tensor: Tensor) -> bool:
    """Whether this is the empty tensor that stands for an output that there is not."""
    return tensor.dim() == 1 and len(output.argument.names) > 1


class _Raw:
    """A raw op of one library."""

    def __init__(
        self,
        library: torch.library.Library,
        name: str,
        arguments: Sequence[Argument],
        outputs: Sequence[Output],
        backend: str,
    ):
        self.library, self.name = library, name
        self.arguments, self.outputs = arguments, outputs
        self.qualified = f"{NAMESPACES[backend]}::{name}"
        self.op = getattr(getattr(torch.ops, NAMESPACES[backend]), name).default

    def register(self, fake: Callable[..., Any]) -> None:
        torch.library.register_fake(self.qualified, fake, lib=self.library)
        torch.library.register_vmap(self.qualified, self._batched, lib=self.library)

    def differentiate(self, function: type[_SingleLevelFunction]) -> None:
        def autograd(*values):
            if forward_ad._current_level >= 0 or _asks_gradient(values):
                return _apply(function, values)
            return _run(self.op, values)

        self.library.impl(self.name, autograd, "Autograd")

    def _batched(self, info: Any, in_dims: tuple[int | None, ...], *values: Any) -> Any:
        """vmap: what is mapped over joins the samples, which are a batch already; one call for each where it is a tensor that
        all samples share, as weights are."""
        count, size = len(self.arguments), info.batch_size
        if size == 0:  # nothing of which to learn how many samples each has
            raise ValueError(f"{self.name} cannot be mapped over an axis of size 0")
        tensors = list(zip(self.arguments, values[:count], in_dims[:count], strict=True))
        if any(dim is not None and not a.per_sample for a, _, dim in tensors):
            return self._one_by_one(size, in_dims, values)
        folded = [x if x is None or not a.per_sample else _fold(a, x, dim, size) for a, x, dim in tensors]
        results = self.op(*folded, *values[count:])
        if isinstance(results, Tensor):
            return _unfold(self.outputs[0], results, size)
        return tuple(
            zip(*(_unfold(x, y, size) for x, y in zip(self.outputs, results, strict=True)), strict=True)
        )

    def _one_by_one(self, size: int, in_dims: tuple[int | None, ...], values: tuple[Any, ...]) -> Any:
        results = []
        for i in range(size):
            one = (x if dim is None else x.select(dim, i) for x, dim in zip(values, in_dims, strict=True))
            results.append(self.op(*one))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(self.outputs)


def _fold(argument: Argument, value: Tensor, dim: int | None, size: int) -> Tensor:
    """With the axis that vmap maps over, or copies where it has none, as part of the axis B."""
    logical = value.dim() - (dim is not None)
    names = argument.names_of(logical)
    if len(names) != logical:  # the empty one of an output that there was not
        return value if dim is None else value.select(dim, 0)
    place = names.index("B")
    if dim is None:
        value = value.unsqueeze(place).expand(*value.shape[:place], size, *value.shape[place:])
    else:
        value = value.movedim(dim, place)
    return value.flatten(place, place + 1)


def _unfold(output: Output, result: Tensor, size: int) -> tuple[Tensor, int | None]:
    """A result of samples folded with ``size``, and the place of the axis that was folded."""
    if _missing(output, result):
        return result, None
    place = output.argument.names_of(result.dim()).index("B")
    return result.unflatten(place, (size, result.shape[place] // size)), place


def _fakes(outputs: Sequence[Output], op: Op, values: dict[str, Any], sizes: Sizes) -> Any:
    """What a fake rule gives: empty tensors of the declared shapes."""
    steps = "T" in sizes
    sizes = {"T": 1, **sizes, **{option.name: values.get(option.name) for option in op.options}}
    sizes |= op.extents(sizes)
    keeps = op.interval is not None and values["anchor_every"] != 0
    if keeps and "A" not in sizes and any("A" in output.argument.names for output in outputs):
        sizes["A"], *_, sizes["P"] = anchors_shape(sizes["T"], 0, 0, sizes["N"], values["anchor_every"])
        # Where T is a symbol, their number is one of its own that is found at run time: of an expression of T torch would ask
        # whether it is 0 or 1, and compile each answer apart.
        if isinstance(sizes["A"], torch.SymInt) and sizes["A"].node.maybe_as_int() is None:
            sizes["A"] = torch.library.get_ctx().new_dynamic_size()
    results = []
    for output in outputs:
        like, names = values[output.like], output.argument.names if steps else output.argument.step_names
        there = output.when(values) and (keeps or not output.kept or not op.interval)
        of_axes = sizes | fixed_sizes(names)
        shape = [of_axes[name] for name in names] if there else [0]
        results.append(like.new_empty(shape, dtype=torch.int64 if output.integer else like.dtype))
    return tuple(results) if len(results) > 1 else results[0]


def _forward_fake(op: Op) -> Callable[..., Any]:
    def fake(*given):
        sizes = sizes_of(op.arguments, given[: len(op.arguments)])
        return _fakes(op.outputs, op, dict(zip(op.names, given, strict=True)), sizes)

    return fake


def _backward_fake(op: Op, outer: int) -> Callable[..., Any]:
    arguments, options = op.saved_arguments, [option.name for option in op.backward_options]

    def fake(*given):
        given = given[outer:]
        values = dict(zip((*op.saved, *options), given, strict=True))
        return _fakes(op.results, op, values, sizes_of(arguments, given[: len(arguments)]))

    return fake
