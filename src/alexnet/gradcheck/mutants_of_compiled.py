"""The mutants of the compiled pairs and of `library`: mistakes that their own shortcuts invite.

A shortcut replaces an index by a shift, a table, a byte or a gap of zeros. It is wrong where the shift leaves the row,
the table belongs to another window, the byte overflows or the gap is missing. The mathematics has its own mutants in
mutants_of_reference; where a compiled pair calls the same formula, one of those stands for all.
"""

from importlib import import_module

import torch

from alexnet.gradcheck.mutants import Table, mutants, mutate
from alexnet.layers.compiled import local_response_norm as norm
from alexnet.layers.compiled import max_pool2d as pool
from alexnet.layers.compiled import norm_by_maps, on_cuda, pointwise, relu_lrn_pool

conv = import_module("alexnet.layers.compiled.conv2d")  # the package's own `conv2d` is the function

LINEAR: Table = {
    "dw with images out of step": mutate(pointwise.linear_backward, "dy_NO.T", "dy_NO.roll(1, 0).T"),
}

RELU: Table = {
    "dy read in its own memory order, not y's": mutate(
        pointwise.relu_backward, "flatten_dense(dy, y)", "flatten_dense(dy)"
    ),
    "y >= 0 for y > 0: never closed": mutate(pointwise._relu_gradient, "y <= 0", "y < 0"),
}

TANH: Table = {
    "1 - y for 1 - y^2": mutate(pointwise._tanh_gradient, "y_wide * y_wide", "y_wide"),
}

DROPOUT: Table = {
    "every slice has the first rows' mask": mutate(pointwise.dropout_forward, "key, first_row)", "key, 0)"),
    "scale forgotten in the backward": mutate(pointwise._dropout_gradient, ") * scale", ")"),
    "the next unit's mask in the backward": mutate(
        pointwise.dropout_backward, "_units(keep)", "_units(keep).roll(1, 1)"
    ),
    "units not mixed: neighbours share bits": mutate(
        pointwise.dropout_forward,
        "_unit_words(x_NU.shape[1], x.device)",
        "torch.arange(x_NU.shape[1], device=x.device)",
    ),
}

_winner_exchanged = mutate(pool.has_won, "float(place)", "float(place % 3 * 3 + place // 3)")
MAX_POOL2D: Table = {
    "= for += where windows overlap": mutate(
        pool._collected,
        "total + torch.where(won, dy[window].to(total.dtype), 0)",
        "torch.where(won, dy[window].to(total.dtype), total)",
    ),
    "one remainder's pixels not written": mutate(
        pool._gather,
        ".to(dy.dtype))",
        ".to(dy.dtype))\n    planes[-1].zero_()  # what the memory held before",
    ),
    "places counted from 1": mutate(pool.has_won, "float(place)", "float(place + 1)"),
    "winner's row and column exchanged": _winner_exchanged,
    "border of windows on the other side": mutate(
        pool.gather,
        "(reach[1], ends[1] - Q, reach[0], ends[0] - P)",
        "(ends[1] - Q, reach[1], ends[0] - P, reach[0])",
    ),
    "the last of the tied maxima wins": mutate(
        pool.pooled, "reversed(range(len(candidates)))", "range(len(candidates))"
    ),
    "nine places to a byte": (
        mutate(pool.pooled, "candidates), BITS", "candidates), 9", "start + BITS", "start + 9"),
        mutate(pool.has_won, "place // BITS", "place // 9", "place % BITS", "place % 9"),
    ),
    "the search begins one place late": mutate(pool.max_pool2d_forward, "x.device)", "x.device) + 1"),
}

_slope_like_gain = mutate(norm.gained_and_competing, "t * (a * root * root)", "t * a")
LOCAL_RESPONSE_NORM: Table = {
    "last map's neighbour in the next pixel": mutate(norm.window_sums, "kept(term(x), keep[i])", "term(x)"),
    "tower boundary ignored": mutate(norm.neighbours, "norm.groups", "1"),
    "even window not reflected": mutate(norm.neighbours, "groups, after, before", "groups, before, after"),
    "first and last pixel left alone": mutate(
        norm.window_sums,
        "edge(rows[:1]), between, edge(rows[-1:])",
        "term(rows[:1]), between, term(rows[-1:])",
    ),
    "shifts one number too early": mutate(norm.window_sums, "-before, after + 1", "-before - 1, after"),
    "s^-3/4 where s^-7/4 belongs": _slope_like_gain,
    "by maps: tower boundary ignored": mutate(
        norm_by_maps.by_towers, "norm.groups, x.shape[1] // norm.groups", "1, x.shape[1]"
    ),
    "by maps: even window not reflected": mutate(norm_by_maps._backward_into, "reach[::-1]", "reach"),
    "by maps: a neighbour left out": mutate(norm_by_maps.window_sum, "range(count)", "range(1, count)"),
    "by maps: t for q": mutate(norm_by_maps._backward_into, "bordered(q", "bordered(t"),
}

SAME_MAP_NORM: Table = {
    "square one pixel further on": mutate(on_cuda.shifted_sum, "a.narrow", "a.roll(1, dim).narrow"),
    "sum over a row for the square": mutate(
        on_cuda.square_sum,
        "shifted_sum(shifted_sum(padded, 2, size, W), 1, size, H)",
        "shifted_sum(padded, 2, size, W)[:, half : half + H]",
    ),
    "divided by n, not by n^2": mutate(on_cuda.area, "size**2", "size"),
    "s^-3/4 where s^-7/4 belongs": mutate(on_cuda.competitors, "(a / s)", "a"),
    "stored q is dy x, without the power": mutate(
        on_cuda.competitors, "dy * gain(s, norm.beta) * (a / s)", "dy * a"
    ),
}

_closed_windows_have_a_winner = mutate(relu_lrn_pool.closed, "NO_WINNER[ties]", '(ties == "all")')
RELU_LRN_POOL: Table = {
    "the ReLU's mask forgotten, paper's order": mutate(
        norm.norm_rows_backward, "torch.where(a <= 0, 0, piece) if relu else piece", "piece"
    ),
    "towers ignored in the backward": mutate(
        relu_lrn_pool.relu_lrn_pool_backward, "x_part, norm,", "x_part, norm._replace(groups=1),"
    ),
    "closed windows have a winner, 2012 order": _closed_windows_have_a_winner,
    "gathered for a window further on": mutate(
        relu_lrn_pool.relu_lrn_pool_backward, "gather(dy_part", "gather(dy_part.roll(1, 2)"
    ),
}

# On a CPU bfloat16 takes the shifted products.
_first_taps_dropped = mutate(
    conv.kernel_from_depth, ": w.shape[2], : w.shape[3]", "-w.shape[2] :, -w.shape[3] :"
)
CONV2D_BF16: Table = {
    "tap one row off": mutate(conv.shifted_products, "S - 1 - left)", "S - 1 - left).roll(row, 1)"),
    "no zeros between the rows": mutate(conv.line_steps, "x.shape[3] + max(left, right)", "x.shape[3]"),
    "no zeros between the images": mutate(conv.line_steps, "x.shape[2] + max(top, bottom)", "x.shape[2]"),
    "blocks' rows and columns exchanged": mutate(
        conv.kernel_from_depth, "0, 3, 4, 1, 5, 2", "0, 3, 4, 2, 5, 1"
    ),
    "added taps kept, first taps dropped": _first_taps_dropped,
    "kernel filled up at the wrong end": mutate(
        conv.kernel_to_depth,
        "(0, -w.shape[3] % v, 0, -w.shape[2] % u)",
        "(-w.shape[3] % v, 0, -w.shape[2] % u, 0)",
    ),
}

_cut_off_on_the_wrong_side = mutate(
    conv.input_gradient, "(left, right, top, bottom) = x.shape", "(right, left, bottom, top) = x.shape"
)
CONV2D: Table = {
    "padding cut off on the wrong side": _cut_off_on_the_wrong_side,
    "the other tower's columns": mutate(
        conv.columns,
        "return unfold(x, kernel, stride, padding, groups)",
        "return unfold(x, kernel, stride, padding, groups).roll(1, 0)",
    ),
    "columns of the next image": mutate(conv.columns, "unfold(x,", "unfold(x.roll(1, 0),"),
    "db of the first image": mutate(conv.bias_gradient, "dy.permute", "dy[:1].permute"),
}

LIBRARY_BF16: Table = {"added taps kept, first taps dropped": _first_taps_dropped}
LIBRARY: Table = {
    "padding cut off on the wrong side": _cut_off_on_the_wrong_side,
    "dw with images out of step": mutate(conv.library_backward, "dy.contiguous", "dy.roll(1, 0).contiguous"),
}

CROSS_ENTROPY: Table = {
    "mean over the batch missing": mutate(
        pointwise._loss_gradient, 'dloss / images if reduction == "mean" else dloss', "dloss"
    ),
    "smoothing forgotten in the backward": mutate(
        pointwise._loss_gradient,
        "(1 - label_smoothing) * hit.to(top.dtype) + label_smoothing / classes",
        "hit.to(top.dtype)",
    ),
    "logarithm added to the largest logit": mutate(
        pointwise._loss_gradient, "(x.to(top.dtype) - top) - log_sum", "x.to(top.dtype) - (top + log_sum)"
    ),
    "a batch's losses weighed by the first": mutate(
        pointwise.cross_entropy_backward, "reshape(-1, 1)", "reshape(-1, 1)[:1]"
    ),
}

# The pairs that serve CUDA (on_cuda.py), compiled for the CPU and checked there.
CUDA: dict[str, Table] = {
    "local_response_norm": {
        "tower boundary ignored": mutate(
            on_cuda.window_sum, "maps = a", "norm = norm._replace(groups=1)\n    maps = a"
        ),
        "even window not reflected": mutate(
            on_cuda.window_sum,
            "reversed(reach(norm.size, maps)) if reflected else reach(norm.size, maps)",
            "reach(norm.size, maps)",
        ),
        "window one map further on": mutate(on_cuda.shifted_sum, "a.narrow", "a.roll(1, dim).narrow"),
        "s^-3/4 where s^-7/4 belongs": mutate(on_cuda.competitors, "(a / s)", "a"),
    },
    "max_pool2d": {
        "only the last of a pixel's windows": mutate(
            on_cuda._wins, "return wins", "return wins & (turn == (0, 0))"
        ),
        "windows' rows and columns exchanged": mutate(on_cuda._pool_gradient, "(t, s), pool", "(s, t), pool"),
        "winner's row and column exchanged": _winner_exchanged,
    },
    "relu_lrn_pool": {
        "the ReLU's mask forgotten, paper's order": mutate(
            on_cuda.gradient, "torch.where(a <= 0, 0, dx) if relu else dx", "dx"
        ),
        "closed windows have a winner, 2012 order": _closed_windows_have_a_winner,
    },
    "dropout": {
        "every slice has the first rows' mask": mutate(on_cuda._dropout, "key, first_row)", "key, 0)"),
        "units not mixed: neighbours share bits": mutate(
            on_cuda._dropout, "unit_words(x.shape[1], x.device)", "torch.arange(x.shape[1], device=x.device)"
        ),
    },
}

MUTANTS_OF_COMPILED = (
    *mutants("linear", LINEAR, "compiled"),
    *mutants("relu", RELU, "compiled"),
    *mutants("tanh", TANH, "compiled"),
    *mutants("dropout", DROPOUT, "compiled"),
    *mutants("max_pool2d", MAX_POOL2D, "compiled"),
    *mutants("local_response_norm", LOCAL_RESPONSE_NORM, "compiled"),
    *mutants("same_map_norm", SAME_MAP_NORM, "compiled"),
    *mutants("relu_lrn_pool", RELU_LRN_POOL, "compiled"),
    *mutants("conv2d", CONV2D_BF16, "compiled", torch.bfloat16),
    *mutants("conv2d", CONV2D, "compiled"),
    *mutants("conv2d", LIBRARY_BF16, "library", torch.bfloat16),
    *mutants("conv2d", LIBRARY, "library"),
    *mutants("cross_entropy", CROSS_ENTROPY, "compiled"),
    *(
        mutant._replace(name=f"on CUDA: {mutant.name}", pair=on_cuda.ON_CUDA[where])
        for where, table in CUDA.items()
        for mutant in mutants(where, table, "compiled")
    ),
)
