"""The mutants of the update rule, of the initialisation and of the data path."""

from alexnet.data import augment
from alexnet.data.augment import Augment
from alexnet.gradcheck.mutants import mutants, mutate
from alexnet.gradcheck.rules import DATA, START, UPDATE
from alexnet.model import initial_std, initialise
from alexnet.optim import Krizhevsky, krizhevsky_update, parameter_groups

OF_UPDATE = mutants(UPDATE, krizhevsky_update, {
    "rate outside the velocity":
        mutate(Krizhevsky.step, "krizhevsky_update if self.rate_inside else sgd_update", "sgd_update"),
    "decay without the rate": ("-decay * lr", "-decay"),
    "decay outside the velocity": ("add_(v, w, alpha=-decay * lr)", "mul_(w, 1 - lr * decay)"),
    "step by the velocity before":
        ("torch._foreach_mul_(v, momentum)",
         "old = torch._foreach_mul(v, 1); torch._foreach_mul_(v, momentum)",
         "torch._foreach_add_(w, v)", "torch._foreach_add_(w, old)"),
    "Nesterov's look ahead":
        ("torch._foreach_add_(w, v)",
         "[a.add_(momentum * c - lr * (b + decay * a)) for a, b, c in zip(w, g, v)]"),
    "gradient dampened by 1 - momentum": ("alpha=-lr)", "alpha=-lr * (1 - momentum))"),
    "decay on biases": mutate(parameter_groups, "config.bias_decay or not is_bias", "True"),
    "biases at the weights' rate": mutate(parameter_groups, "config.bias_lr_mult if is_bias else 1.0", "1.0"),
    "frozen layers coast on": mutate(Krizhevsky.step, "if lr and params", "if params"),
})  # fmt: skip

OF_START = mutants(START, initial_std, {
    "1 / fan-in for 2 / fan-in: the ReLU forgotten": ("(2.0 / fan_in)", "(1.0 / fan_in)"),
    "variance for deviation under he": ("(2.0 / fan_in) ** 0.5", "2.0 / fan_in"),
    "variance for deviation under fan_in": ("/ fan_in) ** 0.5\n    return", "/ fan_in)\n    return"),
    "fan-ins exchanged": ("PAPER_FAN_IN[i] / fan_in", "fan_in / PAPER_FAN_IN[i]"),
    "fan-in ignored": ("config.init_std[i] * (PAPER_FAN_IN[i] / fan_in) ** 0.5", "config.init_std[i]"),
    "every bias 0": mutate(initialise, "config.init_bias[i]", "0.0"),
})  # fmt: skip

OF_DATA = mutants(DATA, augment.draw_epoch, {
    "crop offset by one": mutate(augment.crop_starts, "+ left) * 3", "+ (left - 1).clamp(min=0)) * 3"),
    "rows and columns of the crop exchanged":
        mutate(augment.crop_starts, "+ top) * width + left", "+ left) * width + top"),
    "BGR for RGB":
        mutate(augment.crops_at, "len(starts), side, side, 3)", "len(starts), side, side, 3).flip(-1)"),
    "mirrored upside down": mutate(augment.mirror, "crops[i].flip(1)", "crops[i].flip(0)"),
    "mean image not from its centre": mutate(Augment._fill, "self.margin // 2, self.margin // 2", "0, 0"),
    "mean subtracted before mirroring":
        mutate(Augment.from_crops, "mirror(crops[slab], draws.flip[slab])", "crops[slab]",
               "return out", "return mirror(out, draws.flip)"),
    "colour along rows of the eigenvectors":
        mutate(augment.principal_colours, "vectors * largest.sign()", "(vectors * largest.sign()).T"),
    "colour along the wrong eigenvector": mutate(augment.principal_colours, "values.flip(0)", "values"),
    "variance for standard deviation": mutate(augment.colour_noise, "eigenvalues.sqrt()", "eigenvalues"),
    "divided by 1.1 before colour is added":
        mutate(augment.to_input, "noise[:, None]", "noise[:, None] * divisor"),
    "offsets stop one short of the margin": ("margin + 1", "margin"),
    "draws by position, not by image": ("by_chunk = order,", "by_chunk = torch.arange(n),"),
    "the same draws in every epoch": mutate(augment.stream, "{epoch}", "0"),
    "a flip for each image, not for 32":
        ("by_image if config.flip == Flip.per_image else by_chunk", "by_image"),
    "ten views mirrored upside down": mutate(Augment.ten_views, "views.flip(3)", "views.flip(2)"),
    "ten views: five of them twice": mutate(Augment.ten_views, "views.flip(3)", "views"),
})  # fmt: skip

MUTANTS_OF_RULES = (*OF_UPDATE, *OF_START, *OF_DATA)
