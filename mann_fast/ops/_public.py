"""What public functions do: they check what comes, ask which backend serves, and call the reference or the raw op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .._state import START
from . import _backend, _checks
from ._declare import Argument, Op, Sizes
from ._register import call
from ._sequences import NAMES, NO_SEQUENCES, Values, raw_sequences

Tensors = Sequence[Tensor | None]


def run(op: Op, reference: Callable[..., Any], tensors: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A public function that takes tensors and options, and gives the outputs, as the raw op does."""

    def then(sizes: Sizes) -> tuple[Any, ...]:
        return op.raw_options(options, sizes)

    raw = _checks.check_tensors(op.arguments, None, tensors, choices=options.values(), then=then)
    device = tensors[0].device
    backend = _backend.serving(device, op)
    if backend == "reference":
        with _backend.without_autocast(device.type):
            return reference(*tensors, **options)
    outputs = call(op, backend, *tensors, *raw)
    return outputs[: op.num_given] if op.num_given > 1 else outputs


def checked(
    op: Op,
    arguments: tuple[Argument, ...],
    names: Sequence[str] | None,
    tensors: Tensors,
    options: Mapping[str, Any],
    agree: Callable[[Sizes, Tensors], None] = lambda sizes, tensors: None,
    steps: bool = True,
) -> tuple[Sizes, tuple[Any, ...]]:
    """The size of every axis, and the raw op's options, of arguments that are right. agree: raises where tensors, each right by
    itself, do not go together; from sizes and from which there are."""

    def then(sizes: Sizes) -> tuple[Sizes, tuple[Any, ...]]:
        agree(sizes, tensors)
        return sizes, op.raw_options(options, sizes)

    return _checks.check_tensors(arguments, names, tensors, steps=steps, choices=options.values(), then=then)


class Scan:
    """The public functions of a memory's step and scan, which are one raw op. They differ in the leading T and in what begins
    and ends samples, which only a scan has.

    kind: the type of the state. of_step, of_scan: the reference's. step_names: what callers of a step know its inputs by, where
    those of a scan do not; prefix: of the inputs' names. arguments: state, inputs and what is of sequences, where these are not
    those of the raw op. start: every number of a memory where a sample begins anew.
    """

    def __init__(
        self,
        op: Op,
        kind: Any,
        of_step: Callable[..., Any],
        of_scan: Callable[..., Any],
        step_names: Sequence[str] = (),
        *,
        prefix: str = "",
        arguments: tuple[Argument, ...] = (),
        start: float = START,
    ):
        self.op, self.kind, self.of_step, self.of_scan, self.start = op, kind, of_step, of_scan, start
        # A step comes without T.
        self.arguments = arguments or tuple(
            replace(a, axes=a.axes.replace("T ", "[T] ")) if a.axes.startswith("T ") else a
            for a in op.arguments
        )
        state = [f"state.{name}" for name in kind._fields]
        inputs = [prefix + a.name for a in self.arguments[len(state) : -len(NAMES)]]
        self.scan_names = (*state, *inputs, *NAMES)
        self.step_names = (*state, *(step_names or inputs), *NAMES)
        self.needs_steps = op.outputs[0].axes.startswith("T ")  # then a step is a scan of one

    def agree(self, sizes: Sizes, tensors: Tensors) -> None:
        """Raises where tensors, each right by itself, do not go together; from sizes and from which there are."""

    def look(self, state: Any, prefix: str = "state") -> None:
        """Raises where the values of a state, which callers know by that name, are wrong."""

    def raw_state(self, state: Any) -> Tensors:
        """As the raw op takes it."""
        return state

    def raw_inputs(self, inputs: Tensors) -> Tensors:
        return inputs

    def public_inputs(self, inputs: Tensors) -> Sequence[Any]:
        """As the public functions take them."""
        return inputs

    def public_state(self, given: Tensors, state: Any, sizes: Sizes) -> Any:
        """What the raw op has given of a state that came in as ``state``."""
        return self.kind(*given)

    def step(self, state: Any, *inputs: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        return self._run(state, inputs, None, options)

    def scan(
        self, state: Any, *inputs: Tensor | None, sequences: Values, **options: Any
    ) -> tuple[Tensor, Any]:
        return self._run(state, inputs, sequences, options)

    def _run(
        self, state: Any, inputs: Tensors, sequences: Values | None, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        _checks.check_tuple("state", state, self.kind)
        steps, op = sequences is not None, self.op
        names = self.scan_names if steps else self.step_names
        tensors = (*state, *inputs, *(sequences or NO_SEQUENCES))
        sizes, raw = checked(op, self.arguments, names, tensors, options, self.agree, steps)
        self.look(state)
        memory = state[0]
        if sequences:
            steps_of = inputs[0].shape[0]  # type: ignore[union-attr]
            sequences = raw_sequences(memory, steps_of, *sequences, value=self.start)
        backend = _backend.serving(memory.device, op)
        if backend == "reference":
            with _backend.without_autocast(memory.device.type):
                given = (self.kind(*state), *self.public_inputs(inputs))
                if sequences is None:
                    return self.of_step(*given, **options)
                return self.of_scan(*given, **options, **dict(zip(NAMES, sequences, strict=True)))
        of_inputs = self.raw_inputs(inputs)
        alone = self.needs_steps and not steps
        if alone:
            of_inputs = [x if x is None else x.unsqueeze(0) for x in of_inputs]
        outputs = call(op, backend, *self.raw_state(state), *of_inputs, *(sequences or NO_SEQUENCES), *raw)
        after = self.public_state(outputs[1 : op.num_given], state, sizes)
        return outputs[0].squeeze(0) if alone else outputs[0], after
