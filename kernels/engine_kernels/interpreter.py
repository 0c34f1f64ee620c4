"""Makes Triton's interpreter round as a GPU does.

Triton 3.6 and 3.7 interpret a conversion to bf16 as truncation, and their rounding to the nearest fp8 does not carry
into the exponent. Torch converts rightly (to the nearest, ties to even): conversions between float types go through it.
Products of bf16 blocks, which Triton 3.7 takes for integers (their bits), are products of their values here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def _torch_types(tl: Any) -> dict[Any, torch.dtype]:
    return {tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16,
            tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def repair() -> None:
    """Replaces the interpreter's conversions between torch's float types, and ``dot``. Called once, by ``jit``."""
    from triton import language as tl
    from triton.runtime import interpreter

    types, original = _torch_types(tl), interpreter._convert_float
    cast_impl: Any = interpreter.InterpreterBuilder.cast_impl

    def convert(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source not in types or target not in types:
            return original(data, source, target, rounding_mode)
        bits = torch.from_numpy(np.array(data, copy=True, order="C"))  # 0-dimensional arrays and views too
        if target in (tl.float8e4nv, tl.float8e5):  # saturates, as the hardware does; torch gives NaN or infinity
            wide, top = bits.view(types[source]).float(), torch.finfo(types[target]).max
            bits = torch.where(wide.isnan(), wide, wide.clamp(-top, top)).to(types[target])
        else:
            bits = bits.view(types[source]).to(types[target])
        width = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[types[target].itemsize]
        return bits.view(width).numpy().reshape(data.shape)

    def cast(builder: Any, source: Any, target_type: Any) -> Any:
        from_type, to_type = source.dtype.scalar, target_type.scalar
        if from_type == to_type or from_type not in types or to_type not in types:
            return cast_impl(builder, source, target_type)
        data = convert(source.data, from_type, to_type, None).view(interpreter._get_np_dtype(target_type))
        return interpreter.TensorHandle(data, to_type)

    def dot(_builder: Any, a: Any, b: Any, sums: Any, _input_precision: Any, _max_num_imprecise_acc: Any) -> Any:
        """Operands as tensor cores see them: the narrow floats are exact in fp32."""
        wide = [convert(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)
                if handle.dtype.scalar in types and handle.dtype.scalar.primitive_bitwidth < 32 else handle.data
                for handle in (a, b)]
        with np.errstate(invalid="ignore"):  # infinities are somebody's test
            return interpreter.TensorHandle(np.matmul(*wide, dtype=sums.data.dtype) + sums.data, sums.dtype.scalar)

    interpreter._convert_float = convert
    setattr(interpreter.InterpreterBuilder, "cast_impl", cast)  # noqa: B010 - Triton's argument names differ
    setattr(interpreter.InterpreterBuilder, "create_dot", dot)  # noqa: B010
