"""Triton's interpreter on the CPU, made to answer alike on every processor, and sooner."""

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def sum_dots_in_order() -> None:
    """tl.dot adds up a column at a time, as a GPU does: a row's bits do not depend on where it lies in the tile.

    The interpreter's own tl.dot is numpy's matmul. Its BLAS takes other paths for other processors, and on some of them
    a row at the edge of a tile is summed in another order than one inside.
    """

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        sum = d.data.copy()  # [..., M, N]
        left, right = a.data.astype(sum.dtype, copy=False), b.data.astype(sum.dtype, copy=False)
        for k in range(left.shape[-1]):
            sum += left[..., :, k, None] * right[..., k, None, :]
        return TensorHandle(sum, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def patch_once_a_launch() -> None:
    """A kernel's launch puts the interpreter's functions into triton.language; the functions that it calls find them.

    The interpreter puts them there again at each call, which is a third of its time.
    """
    patch = interpreter._patch_lang

    def patch_lang(fn):
        modules = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang
