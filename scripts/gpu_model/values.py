"""What the expressions of instructions call: NumPy on the rows of all lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def wide(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def rounded(exact: np.ndarray, how: str) -> np.ndarray:
    """Floats of these, rounded down, up or toward zero."""
    near = exact.astype(np.float32)
    down = (near > exact) & ((how == "RM") | (exact > 0))
    up = (near < exact) & ((how == "RP") | (exact < 0))
    if how != "RP":
        near = np.where(down, np.nextafter(near, np.float32(-np.inf)), near)
    if how != "RM":
        near = np.where(up, np.nextafter(near, np.float32(np.inf)), near)
    return near


def saturated(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of doubles, rounded once but for the last bit."""
    product = a * b
    ah, bh = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))
    rest = ((ah * bh - product) + ah * (b - bh) + (a - ah) * bh) + (a - ah) * (b - bh)
    total = product + c
    by = total - product
    rest = rest + ((product - (total - by)) + (c - by))
    return np.where(np.isfinite(rest), total + rest, product + c)


def divides_simply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether a quotient of floats and its parts keep away from the ends of the range."""
    (_, up), (_, down) = np.frexp(a), np.frexp(b)
    simple = np.isfinite(a) & np.isfinite(b) & (b != 0) & (abs(down) < 126) & (abs(up - down) < 126)
    return simple & ((up > -100) | (a == 0))


def to_integer(x: np.ndarray, step: Callable, bits: int, signed: bool) -> np.ndarray:
    whole = step(x.astype(np.longdouble))
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    whole = np.clip(np.where(np.isnan(whole), 0, whole), least, most)
    return whole.astype(np.int64).view(np.uint64) if signed else whole.astype(np.uint64)


def half(word: np.ndarray, upper: int) -> np.ndarray:
    return (word >> np.uint32(16 * upper)).astype(np.uint16).view(np.float16).astype(np.float32)


def bits_of_half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def bits_of_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    near = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), near)


def permuted(a: np.ndarray, selector: np.ndarray, b: np.ndarray) -> np.ndarray:
    both, result = wide(a, b), np.zeros(len(a), np.uint64)
    for i in range(4):
        which = selector.astype(np.uint64) >> np.uint64(4 * i)
        byte = both >> (which & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result |= np.where(which & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result


def shifted(value: np.ndarray, by: np.ndarray, left: bool, bits: int, wraps: bool, upper: bool) -> np.ndarray:
    """A shift of 64 bits; their lower or upper half counts. As far as `bits` says, or further by as much as is over."""
    most = np.uint64(bits)
    by = by.astype(np.uint64)
    by = by & np.uint64(63 if bits == 63 else 31) if wraps else np.minimum(by, most)
    value = value << by if left else value >> by.astype(value.dtype)
    return value >> value.dtype.type(32) if upper else value


def bit_length(x: np.ndarray) -> np.ndarray:
    return np.frexp(x.astype(np.float64))[1].astype(np.uint32)


def count_bits(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4), axis=1).sum(1)


CALLED = {f.__name__: f for f in (wide, rounded, saturated, fused, divides_simply, to_integer, half, bits_of_half,
                                  bits_of_bfloat16, permuted, shifted, bit_length, count_bits)}  # fmt: skip
CALLED |= {"copyto": np.copyto, "where": np.where, "np": np, "u32": np.uint32, "u64": np.uint64, "i64": np.int64,
           "f32": np.float32, "f64": np.float64, "isnan": np.isnan}  # fmt: skip
