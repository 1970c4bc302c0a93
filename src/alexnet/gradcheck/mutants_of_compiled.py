"""The mutants of the compiled pairs and of `library`: mistakes that their own shortcuts invite.

A shortcut replaces an index by a shift, a table, a byte or a gap of zeros. It is wrong where the shift leaves the row,
the table belongs to another window, the byte overflows or the gap is missing. The mathematics has its own mutants in
mutants_of_reference; where a compiled pair calls the same formula, one of those stands for all.
"""

from importlib import import_module

import torch

from alexnet.gradcheck.mutants import mutants, mutate
from alexnet.layers.compiled import local_response_norm as norm
from alexnet.layers.compiled import max_pool2d as pool
from alexnet.layers.compiled import norm_by_maps, on_cuda, pointwise, relu_lrn_pool

conv = import_module("alexnet.layers.compiled.conv2d")  # the package's own `conv2d` is the function

LINEAR = mutants("linear", pointwise.linear_backward, {
    "dw with images out of step": ("dy_NO.T", "dy_NO.roll(1, 0).T"),
}, "compiled")  # fmt: skip

RELU = mutants("relu", pointwise.relu_backward, {
    "dy read in its own memory order, not y's": ("flatten_dense(dy, y)", "flatten_dense(dy)"),
    "y >= 0 for y > 0: never closed": mutate(pointwise._relu_gradient, "y <= 0", "y < 0"),
}, "compiled")  # fmt: skip

TANH = mutants("tanh", pointwise._tanh_gradient, {
    "1 - y for 1 - y^2": ("y_wide * y_wide", "y_wide"),
}, "compiled")  # fmt: skip

DROPOUT = mutants("dropout", pointwise.dropout_forward, {
    "every slice has the first rows' mask": ("key, first_row)", "key, 0)"),
    "scale forgotten in the backward": mutate(pointwise._dropout_gradient, ") * scale", ")"),
    "the next unit's mask in the backward":
        mutate(pointwise.dropout_backward, "_units(keep)", "_units(keep).roll(1, 1)"),
    "units not mixed: neighbours share bits":
        ("_unit_words(x_NU.shape[1], x.device)", "torch.arange(x_NU.shape[1], device=x.device)"),
}, "compiled")  # fmt: skip

_winner_exchanged = mutate(pool.has_won, "float(place)", "float(place % 3 * 3 + place // 3)")
MAX_POOL2D = mutants("max_pool2d", pool._collected, {
    "= for += where windows overlap":
        ("total + torch.where(won, dy[window].to(total.dtype), 0)",
         "torch.where(won, dy[window].to(total.dtype), total)"),
    "one remainder's pixels not written":
        mutate(pool._gather, ".to(dy.dtype))",
               ".to(dy.dtype))\n    planes[-1].zero_()  # what the memory held before"),
    "places counted from 1": mutate(pool.has_won, "float(place)", "float(place + 1)"),
    "winner's row and column exchanged": _winner_exchanged,
    "border of windows on the other side":
        mutate(pool.gather, "(reach[1], ends[1] - Q, reach[0], ends[0] - P)",
               "(ends[1] - Q, reach[1], ends[0] - P, reach[0])"),
    "the last of the tied maxima wins":
        mutate(pool.pooled, "reversed(range(len(candidates)))", "range(len(candidates))"),
    "nine places to a byte":
        [mutate(pool.pooled, "candidates), BITS", "candidates), 9", "start + BITS", "start + 9"),
         mutate(pool.has_won, "place // BITS", "place // 9", "place % BITS", "place % 9")],
    "the search begins one place late": mutate(pool.max_pool2d_forward, "x.device)", "x.device) + 1"),
}, "compiled")  # fmt: skip

LOCAL_RESPONSE_NORM = mutants("local_response_norm", norm.window_sums, {
    "last map's neighbour in the next pixel": ("kept(term(x), keep[i])", "term(x)"),
    "tower boundary ignored": mutate(norm.neighbours, "norm.groups", "1"),
    "even window not reflected": mutate(norm.neighbours, "groups, after, before", "groups, before, after"),
    "first and last pixel left alone":
        ("edge(rows[:1]), between, edge(rows[-1:])", "term(rows[:1]), between, term(rows[-1:])"),
    "shifts one number too early": ("-before, after + 1", "-before - 1, after"),
    "s^-3/4 where s^-7/4 belongs": mutate(norm.gained_and_competing, "t * (a * root * root)", "t * a"),
    "by maps: tower boundary ignored":
        mutate(norm_by_maps.by_towers, "norm.groups, x.shape[1] // norm.groups", "1, x.shape[1]"),
    "by maps: even window not reflected": mutate(norm_by_maps._backward_into, "reach[::-1]", "reach"),
    "by maps: a neighbour left out": mutate(norm_by_maps.window_sum, "range(count)", "range(1, count)"),
    "by maps: t for q": mutate(norm_by_maps._backward_into, "bordered(q", "bordered(t"),
}, "compiled")  # fmt: skip

SAME_MAP_NORM = mutants("same_map_norm", on_cuda.competitors, {
    "square one pixel further on": mutate(on_cuda.shifted_sum, "a.narrow", "a.roll(1, dim).narrow"),
    "sum over a row for the square":
        mutate(on_cuda.square_sum, "shifted_sum(shifted_sum(padded, 2, size, W), 1, size, H)",
               "shifted_sum(padded, 2, size, W)[:, half : half + H]"),
    "divided by n, not by n^2": mutate(on_cuda.area, "size**2", "size"),
    "s^-3/4 where s^-7/4 belongs": ("(a / s)", "a"),
    "stored q is dy x, without the power": ("dy * gain(s, norm.beta) * (a / s)", "dy * a"),
}, "compiled")  # fmt: skip

_closed_windows_have_a_winner = mutate(relu_lrn_pool.closed, "NO_WINNER[ties]", '(ties == "all")')
RELU_LRN_POOL = mutants("relu_lrn_pool", relu_lrn_pool.relu_lrn_pool_backward, {
    "the ReLU's mask forgotten, paper's order":
        mutate(norm.norm_rows_backward, "torch.where(a <= 0, 0, piece) if relu else piece", "piece"),
    "towers ignored in the backward": ("x_part, norm,", "x_part, norm._replace(groups=1),"),
    "closed windows have a winner, 2012 order": _closed_windows_have_a_winner,
    "gathered for a window further on": ("gather(dy_part", "gather(dy_part.roll(1, 2)"),
}, "compiled")  # fmt: skip

# On a CPU bfloat16 takes the shifted products.
_first_taps_dropped = mutate(
    conv.kernel_from_depth, ": w.shape[2], : w.shape[3]", "-w.shape[2] :, -w.shape[3] :"
)
CONV2D_BF16 = mutants("conv2d", conv.line_steps, {
    "tap one row off": mutate(conv.shifted_products, "S - 1 - left)", "S - 1 - left).roll(row, 1)"),
    "no zeros between the rows": ("x.shape[3] + max(left, right)", "x.shape[3]"),
    "no zeros between the images": ("x.shape[2] + max(top, bottom)", "x.shape[2]"),
    "blocks' rows and columns exchanged":
        mutate(conv.kernel_from_depth, "0, 3, 4, 1, 5, 2", "0, 3, 4, 2, 5, 1"),
    "added taps kept, first taps dropped": _first_taps_dropped,
    "kernel filled up at the wrong end":
        mutate(conv.kernel_to_depth, "(0, -w.shape[3] % v, 0, -w.shape[2] % u)",
               "(-w.shape[3] % v, 0, -w.shape[2] % u, 0)"),
}, "compiled", torch.bfloat16)  # fmt: skip

_cut_off_on_the_wrong_side = mutate(
    conv.input_gradient, "(left, right, top, bottom) = x.shape", "(right, left, bottom, top) = x.shape"
)
CONV2D = mutants("conv2d", conv.columns, {
    "padding cut off on the wrong side": _cut_off_on_the_wrong_side,
    "the other tower's columns":
        ("return unfold(x, kernel, stride, padding, groups)",
         "return unfold(x, kernel, stride, padding, groups).roll(1, 0)"),
    "columns of the next image": ("unfold(x,", "unfold(x.roll(1, 0),"),
    "db of the first image": mutate(conv.bias_gradient, "dy.permute", "dy[:1].permute"),
}, "compiled")  # fmt: skip

LIBRARY_BF16 = mutants("conv2d", conv.kernel_from_depth, {
    "added taps kept, first taps dropped": _first_taps_dropped,
}, "library", torch.bfloat16)  # fmt: skip

LIBRARY = mutants("conv2d", conv.library_backward, {
    "padding cut off on the wrong side": _cut_off_on_the_wrong_side,
    "dw with images out of step": ("dy.contiguous", "dy.roll(1, 0).contiguous"),
}, "library")  # fmt: skip

CROSS_ENTROPY = mutants("cross_entropy", pointwise._loss_gradient, {
    "mean over the batch missing": ('dloss / images if reduction == "mean" else dloss', "dloss"),
    "smoothing forgotten in the backward":
        ("(1 - label_smoothing) * hit.to(top.dtype) + label_smoothing / classes", "hit.to(top.dtype)"),
    "logarithm added to the largest logit":
        ("(x.to(top.dtype) - top) - log_sum", "x.to(top.dtype) - (top + log_sum)"),
    "a batch's losses weighed by the first":
        mutate(pointwise.cross_entropy_backward, "reshape(-1, 1)", "reshape(-1, 1)[:1]"),
}, "compiled")  # fmt: skip

# The pairs that serve CUDA (on_cuda.py), compiled for the CPU and checked there.
CUDA = (
    *mutants("local_response_norm", on_cuda.window_sum, {
        "tower boundary ignored": ("maps = a", "norm = norm._replace(groups=1)\n    maps = a"),
        "even window not reflected":
            ("reversed(reach(norm.size, maps)) if reflected else reach(norm.size, maps)",
             "reach(norm.size, maps)"),
        "window one map further on": mutate(on_cuda.shifted_sum, "a.narrow", "a.roll(1, dim).narrow"),
        "s^-3/4 where s^-7/4 belongs": mutate(on_cuda.competitors, "(a / s)", "a"),
    }, "compiled"),
    *mutants("max_pool2d", on_cuda._wins, {
        "only the last of a pixel's windows": ("return wins", "return wins & (turn == (0, 0))"),
        "windows' rows and columns exchanged": mutate(on_cuda._pool_gradient, "(t, s), pool", "(s, t), pool"),
        "winner's row and column exchanged": _winner_exchanged,
    }, "compiled"),
    *mutants("relu_lrn_pool", on_cuda.gradient, {
        "the ReLU's mask forgotten, paper's order": ("torch.where(a <= 0, 0, dx) if relu else dx", "dx"),
        "closed windows have a winner, 2012 order": _closed_windows_have_a_winner,
    }, "compiled"),
    *mutants("dropout", on_cuda._dropout, {
        "every slice has the first rows' mask": ("key, first_row)", "key, 0)"),
        "units not mixed: neighbours share bits":
            ("unit_words(x.shape[1], x.device)", "torch.arange(x.shape[1], device=x.device)"),
    }, "compiled"),
)  # fmt: skip

MUTANTS_OF_COMPILED = (
    *LINEAR, *RELU, *TANH, *DROPOUT, *MAX_POOL2D, *LOCAL_RESPONSE_NORM, *SAME_MAP_NORM, *RELU_LRN_POOL,
    *CONV2D_BF16, *CONV2D, *LIBRARY_BF16, *LIBRARY, *CROSS_ENTROPY,
    *(m._replace(name=f"on CUDA: {m.name}", pair=on_cuda.ON_CUDA[m.where]) for m in CUDA),
)  # fmt: skip
