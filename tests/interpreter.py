"""Triton's interpreter on the CPU, made to answer alike on every processor."""

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
