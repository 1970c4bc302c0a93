"""The mutants of the reference pairs, operation by operation."""

from alexnet.gradcheck.mutants import Table, mutants, mutate
from alexnet.gradcheck.mutants_of_rules import MUTANTS_OF_RULES
from alexnet.layers.conv2d import _weight_from_rows, conv2d_backward, fold, images_at_once
from alexnet.layers.cross_entropy import cross_entropy_backward, cross_entropy_forward
from alexnet.layers.dropout import dropout_backward, dropout_forward
from alexnet.layers.linear import linear_backward
from alexnet.layers.local_response_norm import local_response_norm_backward, local_response_norm_forward
from alexnet.layers.max_pool2d import max_pool2d_backward, max_pool2d_forward
from alexnet.layers.relu import relu_backward, relu_forward
from alexnet.layers.relu_lrn_pool import relu_lrn_pool_backward, relu_lrn_pool_forward
from alexnet.layers.same_map_norm import same_map_norm_backward, same_map_norm_forward
from alexnet.layers.tanh import tanh_backward

LINEAR: Table = {
    "dx by W' where W is square": mutate(
        linear_backward, "dy @ w", "dy @ (w.T if len(w) == len(w.T) else w)"
    ),
    "dw with images out of step": mutate(linear_backward, "dy_NO.T", "dy_NO.roll(1, 0).T"),
    "dw a mean over the batch, as the loss is": mutate(linear_backward, "@ x_NI", "@ x_NI / len(dy)"),
    "db of the last axis but one only": mutate(
        linear_backward, "dy_NO.sum(0", "dy.reshape(-1, *dy.shape[-2:])[0].sum(0"
    ),
    "db a mean over the batch": mutate(linear_backward, "dy_NO.sum(0", "dy_NO.mean(0"),
}

RELU: Table = {
    "y >= 0 for y > 0: never closed": mutate(relu_backward, "y <= 0", "y < 0"),
    "gradient passes at exactly 0": (
        mutate(relu_forward, "return y, y", "return y, x"),
        mutate(relu_backward, "y <= 0", "y < 0"),
    ),
    "only positive gradients pass": mutate(relu_backward, "dy.masked_fill", "dy.clamp(min=0).masked_fill"),
    "a leak in the backward only": mutate(
        relu_backward, "dy.masked_fill(y <= 0, 0)", "dy.where(y > 0, 0.01 * dy)"
    ),
}

TANH: Table = {
    "1 - y for 1 - y^2": mutate(tanh_backward, "y_wide * y_wide", "y_wide"),
    "tanh taken again of y": mutate(tanh_backward, "wide(y.dtype))", "wide(y.dtype)).tanh()"),
}

DROPOUT: Table = {
    "scale forgotten in the backward": mutate(dropout_backward, "dy * scale", "dy"),
    "another mask in the backward": mutate(dropout_backward, "* keep", "* keep.roll(1, -1)"),
    "no mask in the backward": mutate(dropout_backward, "dy * scale * keep", "dy * scale"),
    "p taken as the share kept": mutate(dropout_forward, "= dropout_mask", "= ~dropout_mask"),
    "every slice has the first rows' mask": mutate(dropout_forward, "key, first_row, x", "key, 0, x"),
    "scaled by p where 1/(1-p) was meant": mutate(
        dropout_forward, "x * scale", "x * (1 if scale == 1 else 1 / p)"
    ),
}

MAX_POOL2D: Table = {
    "= for += where windows overlap": mutate(max_pool2d_backward, "+=", "="),
    "padding cut off on the wrong side": mutate(
        max_pool2d_backward, "top : top + H, left : left + W", "bottom : bottom + H, right : right + W"
    ),
    "gradient shared among tied maxima": mutate(
        max_pool2d_backward, "(won, dy, 0)", "(won, dy / sum(_winners(place, x, y, windows, sides)), 0)"
    ),
    "winner's row and column exchanged": mutate(
        max_pool2d_forward, "isnan(), k)", "isnan(), k % kernel[1] * kernel[0] + k // kernel[1])"
    ),
    "the last of the tied maxima wins": mutate(max_pool2d_forward, "candidate > y", "candidate >= y"),
    "every tied maximum paid under 'first'": mutate(
        max_pool2d_forward, '(y, place, None, None) if ties == "first" else (y, None, x, y)', "y, None, x, y"
    ),
    "one tied maximum paid under 'all'": mutate(
        max_pool2d_forward,
        *('if ties == "first":', "if True:"),
        *('(y, place, None, None) if ties == "first" else (y, None, x, y)', "y, place, None, None"),
    ),
    "padding of 0 for minus infinity": mutate(max_pool2d_forward, 'value=float("-inf")', "value=0.0"),
    "last row of windows gets no gradient": mutate(
        max_pool2d_backward,
        "dx[window] += torch.where(won, dy, 0)",
        "dx[window][..., :-1, :] += torch.where(won, dy, 0)[..., :-1, :]",
    ),
}

_second_term_dropped = mutate(
    local_response_norm_backward, "t - 2 * alpha * beta / size * x_wide * competition", "t"
)
_towers_ignored = mutate(local_response_norm_backward, "size // 2, groups", "size // 2, 1")
LOCAL_RESPONSE_NORM: Table = {
    "second term dropped": _second_term_dropped,
    "first term dropped": mutate(local_response_norm_backward, "t - 2", "-2"),
    "factor 2 of the square forgotten": mutate(local_response_norm_backward, "2 * alpha", "alpha"),
    "second term added, not subtracted": mutate(local_response_norm_backward, "t - 2", "t + 2"),
    "s^-b where s^(-b-1) belongs": mutate(local_response_norm_backward, "x_wide / s,", "x_wide,"),
    "alpha not divided in the backward": mutate(local_response_norm_backward, "beta / size", "beta"),
    "tower boundary ignored in the backward": _towers_ignored,
    "even window not reflected": mutate(
        local_response_norm_backward, "(size - 1) // 2, size // 2", "size // 2, (size - 1) // 2"
    ),
    "y for x before the sum": mutate(
        local_response_norm_backward, "x_wide * competition", "x_wide * inverse_power(s, beta) * competition"
    ),
    "x before the sum forgotten": mutate(local_response_norm_backward, "x_wide * competition", "competition"),
    "alpha not divided, forward and backward": (
        mutate(local_response_norm_forward, "alpha / size", "alpha"),
        mutate(local_response_norm_backward, "beta / size", "beta"),
    ),
    "towers ignored, forward and backward": (
        mutate(local_response_norm_forward, "// 2, groups", "// 2, 1"),
        _towers_ignored,
    ),
    "k = 1 whatever is asked": mutate(local_response_norm_forward, "s = k", "s = 1"),
}

SAME_MAP_NORM: Table = {
    "divided by the width, not the area": mutate(same_map_norm_backward, "size**2", "size"),
    "second term dropped": mutate(
        same_map_norm_backward, "t - 2 * alpha * beta / size**2 * x_wide * competition", "t"
    ),
    "sum over a row for the square": mutate(
        same_map_norm_backward,
        "square_sum(t * x_wide / s, size)",
        "window_sum(t * x_wide / s, -1, size // 2, size // 2)",
    ),
    "border divided by what is there": mutate(
        same_map_norm_forward, "size**2", "square_sum(0 * x_wide + 1, size)"
    ),
}

CONV2D: Table = {
    "= for += where windows overlap": mutate(fold, "+=", "="),
    "stride forgotten in fold": mutate(
        fold, "r : r + stride[0] * P : stride[0], s : s + stride[1] * Q : stride[1]", "r : r + P, s : s + Q"
    ),
    "padding cut off on the wrong side": mutate(
        fold, "top : top + H, left : left + W", "bottom : bottom + H, right : right + W"
    ),
    "last row of the kernel not folded": mutate(fold, "range(R)", "range(max(R - 1, 1))"),
    "the other tower's weights in dx": mutate(conv2d_backward, "(w, groups)", "(w, groups).roll(1, 0)"),
    "the other tower's columns in dw": mutate(
        conv2d_backward, "stride, padding, groups)", "stride, padding, groups).roll(1, 0)"
    ),
    "kernel turned where it must not be": mutate(conv2d_backward, "(w, groups)", "(w.flip(2, 3), groups)"),
    "left and right padding exchanged in dw": mutate(
        conv2d_backward, "padding, groups)", "(padding[1], padding[0], *padding[2:]), groups)"
    ),
    "taps of dw in the order (c, r, s)": mutate(
        _weight_from_rows, "w.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)", "w.shape)"
    ),
    "dw of the last piece of the batch only": (
        mutate(images_at_once, "max(1, COLUMN_BYTES // column_bytes_per_image)", "1"),
        mutate(conv2d_backward, "dw_GOK +=", "dw_GOK ="),
    ),
    "dw with images out of step": mutate(
        conv2d_backward, "dy_GMO.transpose", "dy_GMO.roll(dy[0, 0].numel(), 1).transpose"
    ),
    "dw a mean over the batch, as the loss is": mutate(conv2d_backward, "dw_GOK, w)", "dw_GOK / len(dy), w)"),
    "db summed over one axis too few": mutate(conv2d_backward, "dy.sum((0, 2, 3)", "dy[..., 0].sum((0, 2)"),
}

CROSS_ENTROPY: Table = {
    "mean over the batch missing": mutate(cross_entropy_backward, "/ (images", "/ (1"),
    "mean over classes instead of images": mutate(cross_entropy_backward, "/ (images", "/ (classes"),
    "smoothing forgotten in the backward": mutate(
        cross_entropy_backward,
        "images, classes = x.shape",
        "(images, classes), label_smoothing = x.shape, 0.0",
    ),
    "logarithm added to the largest logit": (
        mutate(cross_entropy_forward, "(x_wide - top) - log_sum", "x_wide - (top + log_sum)"),
        mutate(
            cross_entropy_backward,
            "(cast(x, top.dtype) - top) - log_sum",
            "cast(x, top.dtype) - (top + log_sum)",
        ),
    ),
    "target forgotten: p for p - q": mutate(cross_entropy_backward, "(p - q)", "p"),
    "uphill: q - p, as in the 2012 code": mutate(cross_entropy_backward, "p - q", "q - p"),
    "softmax over the images": mutate(
        cross_entropy_backward,
        "((cast(x, top.dtype) - top) - log_sum).exp()",
        "cast(x, top.dtype).softmax(0)",
    ),
}

RELU_LRN_POOL: Table = {
    "the ReLU's mask forgotten, paper's order": mutate(relu_lrn_pool_backward, "relu_backward(da, a)", "da"),
    "the ReLU's mask forgotten, 2012 order": mutate(relu_lrn_pool_backward, "relu_backward(dy, y)", "dy"),
    "norm's second term dropped": _second_term_dropped,
    "towers ignored in the backward": _towers_ignored,
    "= for += in its pool": mutate(max_pool2d_backward, "+=", "="),
    "closed units get nothing in the 2012 order": mutate(
        relu_lrn_pool_backward,
        "return local_response_norm_backward(db, x, s, *norm)",
        "return local_response_norm_backward(db, x, s, *norm) * (x > 0)",
    ),
    "the 2012 order computed as the paper's": (
        mutate(
            relu_lrn_pool_forward,
            'x)[0] if order == "relu_lrn_pool"',
            "x)[0] if True",
            "y = m if order",
            "y = m if True or order",
        ),
        mutate(relu_lrn_pool_backward, 'order == "relu_lrn_pool"', "True"),
    ),
}

MUTANTS = (
    *mutants("linear", LINEAR),
    *mutants("relu", RELU),
    *mutants("tanh", TANH),
    *mutants("dropout", DROPOUT),
    *mutants("max_pool2d", MAX_POOL2D),
    *mutants("local_response_norm", LOCAL_RESPONSE_NORM),
    *mutants("same_map_norm", SAME_MAP_NORM),
    *mutants("conv2d", CONV2D),
    *mutants("cross_entropy", CROSS_ENTROPY),
    *mutants("relu_lrn_pool", RELU_LRN_POOL),
    *MUTANTS_OF_RULES,
)
