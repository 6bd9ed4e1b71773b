"""Whether torch.onnx asks: then the reference serves, whose operations ONNX has."""

from __future__ import annotations

import sys


def exporting() -> bool:
    """Whether this call is part of ``torch.onnx.export``."""
    onnx = sys.modules.get("torch.onnx")  # which is not loaded before somebody exports
    return onnx is not None and bool(onnx.is_in_onnx_export())


exporting._dynamo_marked_constant = True  # type: ignore[attr-defined] # for torch.compile, as ops._loading.missing
