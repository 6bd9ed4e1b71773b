"""mann_fast: fused external-memory ops, layers and models for PyTorch."""

from typing import TYPE_CHECKING, Any

from . import ops, reference
from .layers import MemoryLayer, MemoryStack, MemoryState
from .models import MANN
from .ops import backend, backends

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .learner import FewShotLearner

__all__ = [
    "MANN",
    "FewShotLearner",
    "MemoryLayer",
    "MemoryStack",
    "MemoryState",
    "backend",
    "backends",
    "ops",
    "reference",
]


def __getattr__(name: str) -> Any:
    """FewShotLearner reads images, and so needs more than torch: it is imported when somebody asks for it."""
    if name == "FewShotLearner":
        from .learner import FewShotLearner

        return FewShotLearner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
