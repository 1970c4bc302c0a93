"""The mutants of the reference pairs, operation by operation."""

from alexnet.gradcheck.mutants import mutants, mutate
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

LINEAR = mutants("linear", linear_backward, {
    "dx by W' where W is square": ("dy @ w", "dy @ (w.T if len(w) == len(w.T) else w)"),
    "dw with images out of step": ("dy_NO.T", "dy_NO.roll(1, 0).T"),
    "dw a mean over the batch, as the loss is": ("@ x_NI", "@ x_NI / len(dy)"),
    "db of the last axis but one only": ("dy_NO.sum(0", "dy.reshape(-1, *dy.shape[-2:])[0].sum(0"),
    "db a mean over the batch": ("dy_NO.sum(0", "dy_NO.mean(0"),
})  # fmt: skip

RELU = mutants("relu", relu_backward, {
    "y >= 0 for y > 0: never closed": ("y <= 0", "y < 0"),
    "gradient passes at exactly 0":
        [mutate(relu_forward, "return y, y", "return y, x"), mutate(relu_backward, "y <= 0", "y < 0")],
    "only positive gradients pass": ("dy.masked_fill", "dy.clamp(min=0).masked_fill"),
    "a leak in the backward only": ("dy.masked_fill(y <= 0, 0)", "dy.where(y > 0, 0.01 * dy)"),
})  # fmt: skip

TANH = mutants("tanh", tanh_backward, {
    "1 - y for 1 - y^2": ("y_wide * y_wide", "y_wide"),
    "tanh taken again of y": ("wide(y.dtype))", "wide(y.dtype)).tanh()"),
})  # fmt: skip

DROPOUT = mutants("dropout", dropout_backward, {
    "scale forgotten in the backward": ("dy * scale", "dy"),
    "another mask in the backward": ("* keep", "* keep.roll(1, -1)"),
    "no mask in the backward": ("dy * scale * keep", "dy * scale"),
    "p taken as the share kept": mutate(dropout_forward, "= dropout_mask", "= ~dropout_mask"),
    "every slice has the first rows' mask": mutate(dropout_forward, "key, first_row, x", "key, 0, x"),
    "scaled by p where 1/(1-p) was meant":
        mutate(dropout_forward, "x * scale", "x * (1 if scale == 1 else 1 / p)"),
})  # fmt: skip

MAX_POOL2D = mutants("max_pool2d", max_pool2d_backward, {
    "= for += where windows overlap": ("+=", "="),
    "padding cut off on the wrong side":
        ("top : top + H, left : left + W", "bottom : bottom + H, right : right + W"),
    "gradient shared among tied maxima":
        ("(won, dy, 0)", "(won, dy / sum(_winners(place, x, y, windows, sides)), 0)"),
    "winner's row and column exchanged":
        mutate(max_pool2d_forward, "isnan(), k)", "isnan(), k % kernel[1] * kernel[0] + k // kernel[1])"),
    "the last of the tied maxima wins": mutate(max_pool2d_forward, "candidate > y", "candidate >= y"),
    "every tied maximum paid under 'first'":
        mutate(max_pool2d_forward, '(y, place, None, None) if ties == "first" else (y, None, x, y)',
               "y, None, x, y"),
    "one tied maximum paid under 'all'":
        mutate(max_pool2d_forward, 'if ties == "first":', "if True:",
               '(y, place, None, None) if ties == "first" else (y, None, x, y)', "y, place, None, None"),
    "padding of 0 for minus infinity": mutate(max_pool2d_forward, 'value=float("-inf")', "value=0.0"),
    "last row of windows gets no gradient":
        ("dx[window] += torch.where(won, dy, 0)",
         "dx[window][..., :-1, :] += torch.where(won, dy, 0)[..., :-1, :]"),
})  # fmt: skip

_second_term_dropped = mutate(
    local_response_norm_backward, "t - 2 * alpha * beta / size * x_wide * competition", "t"
)
_towers_ignored = mutate(local_response_norm_backward, "size // 2, groups", "size // 2, 1")
LOCAL_RESPONSE_NORM = mutants("local_response_norm", local_response_norm_backward, {
    "second term dropped": _second_term_dropped,
    "first term dropped": ("t - 2", "-2"),
    "factor 2 of the square forgotten": ("2 * alpha", "alpha"),
    "second term added, not subtracted": ("t - 2", "t + 2"),
    "s^-b where s^(-b-1) belongs": ("x_wide / s,", "x_wide,"),
    "alpha not divided in the backward": ("beta / size", "beta"),
    "tower boundary ignored in the backward": _towers_ignored,
    "even window not reflected": ("(size - 1) // 2, size // 2", "size // 2, (size - 1) // 2"),
    "y for x before the sum": ("x_wide * competition", "x_wide * inverse_power(s, beta) * competition"),
    "x before the sum forgotten": ("x_wide * competition", "competition"),
    "alpha not divided, forward and backward":
        [mutate(local_response_norm_forward, "alpha / size", "alpha"),
         mutate(local_response_norm_backward, "beta / size", "beta")],
    "towers ignored, forward and backward":
        [mutate(local_response_norm_forward, "// 2, groups", "// 2, 1"), _towers_ignored],
    "k = 1 whatever is asked": mutate(local_response_norm_forward, "s = k", "s = 1"),
})  # fmt: skip

SAME_MAP_NORM = mutants("same_map_norm", same_map_norm_backward, {
    "divided by the width, not the area": ("size**2", "size"),
    "second term dropped": ("t - 2 * alpha * beta / size**2 * x_wide * competition", "t"),
    "sum over a row for the square":
        ("square_sum(t * x_wide / s, size)", "window_sum(t * x_wide / s, -1, size // 2, size // 2)"),
    "border divided by what is there":
        mutate(same_map_norm_forward, "size**2", "square_sum(0 * x_wide + 1, size)"),
})  # fmt: skip

CONV2D = mutants("conv2d", conv2d_backward, {
    "= for += where windows overlap": mutate(fold, "+=", "="),
    "stride forgotten in fold":
        mutate(fold, "r : r + stride[0] * P : stride[0], s : s + stride[1] * Q : stride[1]",
               "r : r + P, s : s + Q"),
    "padding cut off on the wrong side":
        mutate(fold, "top : top + H, left : left + W", "bottom : bottom + H, right : right + W"),
    "last row of the kernel not folded": mutate(fold, "range(R)", "range(max(R - 1, 1))"),
    "the other tower's weights in dx": ("(w, groups)", "(w, groups).roll(1, 0)"),
    "the other tower's columns in dw": ("stride, padding, groups)", "stride, padding, groups).roll(1, 0)"),
    "kernel turned where it must not be": ("(w, groups)", "(w.flip(2, 3), groups)"),
    "left and right padding exchanged in dw":
        ("padding, groups)", "(padding[1], padding[0], *padding[2:]), groups)"),
    "taps of dw in the order (c, r, s)":
        mutate(_weight_from_rows, "w.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)", "w.shape)"),
    "dw of the last piece of the batch only":
        [mutate(images_at_once, "max(1, COLUMN_BYTES // column_bytes_per_image)", "1"),
         mutate(conv2d_backward, "dw_GOK +=", "dw_GOK =")],
    "dw with images out of step": ("dy_GMO.transpose", "dy_GMO.roll(dy[0, 0].numel(), 1).transpose"),
    "dw a mean over the batch, as the loss is": ("dw_GOK, w)", "dw_GOK / len(dy), w)"),
    "db summed over one axis too few": ("dy.sum((0, 2, 3)", "dy[..., 0].sum((0, 2)"),
})  # fmt: skip

CROSS_ENTROPY = mutants("cross_entropy", cross_entropy_backward, {
    "mean over the batch missing": ("/ (images", "/ (1"),
    "mean over classes instead of images": ("/ (images", "/ (classes"),
    "smoothing forgotten in the backward":
        ("images, classes = x.shape", "(images, classes), label_smoothing = x.shape, 0.0"),
    "logarithm added to the largest logit":
        [mutate(cross_entropy_forward, "(x_wide - top) - log_sum", "x_wide - (top + log_sum)"),
         mutate(cross_entropy_backward, "(cast(x, top.dtype) - top) - log_sum",
                "cast(x, top.dtype) - (top + log_sum)")],
    "target forgotten: p for p - q": ("(p - q)", "p"),
    "uphill: q - p, as in the 2012 code": ("p - q", "q - p"),
    "softmax over the images":
        ("((cast(x, top.dtype) - top) - log_sum).exp()", "cast(x, top.dtype).softmax(0)"),
})  # fmt: skip

RELU_LRN_POOL = mutants("relu_lrn_pool", relu_lrn_pool_backward, {
    "the ReLU's mask forgotten, paper's order": ("relu_backward(da, a)", "da"),
    "the ReLU's mask forgotten, 2012 order": ("relu_backward(dy, y)", "dy"),
    "norm's second term dropped": _second_term_dropped,
    "towers ignored in the backward": _towers_ignored,
    "= for += in its pool": mutate(max_pool2d_backward, "+=", "="),
    "closed units get nothing in the 2012 order":
        ("return local_response_norm_backward(db, x, s, *norm)",
         "return local_response_norm_backward(db, x, s, *norm) * (x > 0)"),
    "the 2012 order computed as the paper's":
        [mutate(relu_lrn_pool_forward, 'x)[0] if order == "relu_lrn_pool"', "x)[0] if True",
                "y = m if order", "y = m if True or order"),
         mutate(relu_lrn_pool_backward, 'order == "relu_lrn_pool"', "True")],
})  # fmt: skip

MUTANTS = (
    *LINEAR, *RELU, *TANH, *DROPOUT, *MAX_POOL2D, *LOCAL_RESPONSE_NORM, *SAME_MAP_NORM, *CONV2D,
    *CROSS_ENTROPY, *RELU_LRN_POOL, *MUTANTS_OF_RULES,
)  # fmt: skip
