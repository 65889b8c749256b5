"""Triton's interpreter brought to the arithmetic of the hardware.

bfloat16 rounds to nearest, where it truncates; a fused multiply-add rounds once, and a minimum passes over
nan, where those of Triton 3.6 do not. All three would be seen as errors of the kernels. And a bound of a
loop, an array of one element, becomes an index, which NumPy from 2.4 on refuses Triton 3.6.

And most of its time would go into what it need not do: patching the language anew for every call of a device
function, where once for each module and launch is enough; broadcasting operands of one shape to that shape;
describing the same few types and shapes again and again.
"""

import numpy as np
import torch
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_cast = Builder.cast_impl


def cast(self, source, target):
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return Handle((source.data.astype(np.uint32) << 16).view(np.float32), target.scalar)
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
        return Handle(rounded.view(torch.int16).numpy().view(np.uint16), target.scalar)
    return _cast(self, source, target)


def convert(self, source, target, rounding):
    return cast(self, source, target)


def fma(self, x, y, z):
    return Handle((x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)


def minimum(self, x, y):
    return self.binary_op(x, y, np.fmin)


def maximum(self, x, y):
    return self.binary_op(x, y, np.fmax)


def approximate_exp2(self, x):
    """exp2 with errors as large as the GPU's ex2.approx.ftz has them, 2^-22 relative; a function of x, as
    there."""
    finite = np.where(np.isfinite(x.data), x.data, 0).astype(np.float64)
    return Handle(
        (np.exp2(x.data) * (1 + 2.0**-22 * np.sin(12345.678 * finite))).astype(x.data.dtype), x.dtype.scalar
    )


def patch_once(patch=interpreter._patch_lang, launch=interpreter.GridExecutor.__call__):
    """Let the functions of a module find the language as the first of them in the launch has left it."""
    patched = set()

    def patch_new(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch_anew


def index_by_one_element(patch=interpreter._patch_lang_tensor):
    def patch_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor


def broadcast_less(broadcast=semantic.TritonSemantic.broadcast_impl_value):
    def broadcast_unlike(self, x, y):
        alike = x.type.is_block() and y.type.is_block() and x.type.shape.values == y.type.shape.values
        return (x, y) if alike else broadcast(self, x, y)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_unlike


def remember():
    """One description for a shape, a type, a tensor of a type; types go by their names."""
    with_element, block, begin, np_dtype = (
        tl.block_type.with_element_ty,
        tl.block_type.__init__,
        tl.tensor.__init__,
        interpreter._get_np_dtype,
    )
    blocks, dtypes = {}, {}

    def with_element_ty(self, scalar):
        known = self.__dict__.setdefault("known", {})
        return known.get(scalar.name) or known.setdefault(scalar.name, with_element(self, scalar))

    def block_type(self, element, shape):
        key = element.name, *(getattr(x, "value", x) for x in shape)
        if key not in blocks:
            block(self, element, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self, handle, type):
        description = type.__dict__.get("description")
        if description is None:
            begin(self, handle, type)
            type.description = {k: v for k, v in self.__dict__.items() if k != "handle"}
        else:
            self.__dict__.update(description, handle=handle)

    def get_np_dtype(type):
        return dtypes.get(type.name) or dtypes.setdefault(type.name, np_dtype(type))

    tl.block_type.with_element_ty, tl.block_type.__init__, tl.tensor.__init__ = (
        with_element_ty,
        block_type,
        tensor,
    )
    interpreter._get_np_dtype = get_np_dtype


def install():
    patch_once()
    index_by_one_element()
    broadcast_less()
    remember()
    Builder.cast_impl, Builder.create_fp_trunc, Builder.create_fp_ext, Builder.create_fma = (
        cast,
        cast,
        cast,
        fma,
    )
    Builder.create_fp_to_fp, Builder.create_minnumf, Builder.create_maxnumf = convert, minimum, maximum
