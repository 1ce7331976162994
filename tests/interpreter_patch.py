"""Makes Triton's interpreter (TRITON_INTERPRET=1) right for bfloat16. Call `apply()` before launching a kernel.

The interpreter keeps bfloat16 in NumPy arrays of uint16 and does its arithmetic on those integers, so sums, products
and comparisons come out as nonsense, without a word; casts to bfloat16 cut bits off instead of rounding. Here each such
operation goes through float32 and rounds once, to nearest even, as a GPU does. tl.device_assert, which the interpreter
skips by default, is turned on too. And what the interpreter replaces in triton.language before each call of a device
function, it replaces once for all: that took up to half the time. Written for triton 3.6 to 3.9; it touches their
internals, so it is a test helper.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns: bfloat16 is the upper half of a float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))  # ties go to the even neighbour
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + half) >> 16).astype(np.uint16))


def apply() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is first imported: @triton.jit reads it once")
    import triton.language as tl
    from triton.runtime import interpreter

    builder, Handle, bf16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.bfloat16

    def is_bf16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == bf16)

    def as_float32(handle: Any) -> Any:
        return Handle(widen(handle.data), tl.float32) if is_bf16(handle) else handle

    plain_binary, plain_unary, plain_dot = builder.binary_op, builder.unary_op, builder.create_dot
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable) -> Any:
        if not is_bf16(lhs):
            return plain_binary(self, lhs, rhs, op)
        out = op(widen(lhs.data), widen(rhs.data))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(narrow(out), bf16)

    def unary_op(self: Any, arg: Any, op: Callable) -> Any:
        return Handle(narrow(op(widen(arg.data))), bf16) if is_bf16(arg) else plain_unary(self, arg, op)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, as_float32(a), as_float32(b), *rest)

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        if to.scalar == bf16 and not is_bf16(src):
            return Handle(narrow(src.data), bf16)
        if is_bf16(src) and to.scalar != bf16:
            wide = as_float32(src)
            return wide if to.scalar == tl.float32 else plain_cast(self, wide, to)
        return plain_cast(self, src, to)

    def create_fp_to_fp(self: Any, src: Any, to: Any, rounding: Any) -> Any:
        through_bf16 = is_bf16(src) or to.scalar == bf16
        return self.cast_impl(src, to) if through_bf16 else plain_fp_to_fp(self, src, to, rounding)

    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp

    plain_sum, plain_cumsum = interpreter.ReduceOps.sum, interpreter.ScanOps.cumsum

    def rounded(self: Any, out: np.ndarray) -> Any:
        bits = narrow(out)
        return self.to_tensor(bits if np.ndim(out) else bits.item(), bf16)

    def reduce_sum(self: Any, x: Any) -> Any:
        if x.dtype.scalar != bf16:
            return plain_sum(self, x)
        return rounded(self, np.sum(widen(x.handle.data), axis=self.axis, keepdims=self.keep_dims))

    def scan_cumsum(self: Any, x: Any) -> Any:
        if x.dtype.scalar != bf16:
            return plain_cumsum(self, x)
        return [rounded(self, np.cumsum(widen(x.handle.data), axis=self.axis))]

    interpreter.ReduceOps.sum, interpreter.ScanOps.cumsum = reduce_sum, scan_cumsum

    plain_patch_lang, patched = interpreter._patch_lang, set()

    def patch_lang(fn: Callable) -> Any:
        if id(fn.__globals__) not in patched:
            plain_patch_lang(fn)
            patched.add(id(fn.__globals__))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_lang
    # The options object is frozen; asserts are compiled in only in debug mode.
    object.__setattr__(interpreter.interpreter_builder.options, "debug", True)
