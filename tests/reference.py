"""The paper's rules once more: slow, plain, in float64, one image, one channel and one class at a time."""

import copy
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def captured(net: nn.Module, layer: str, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input, output and logits of one image, in float64, the output with a graph to the logits."""
    net = copy.deepcopy(net).double().eval()
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    seen = {}

    def hook(module, args, output):
        seen["x"] = args[0].detach()
        seen["z"] = output
        output.retain_grad()

    net.get_submodule(layer).register_forward_hook(hook)
    logits = net(image[None].double())
    return seen["x"], seen["z"], logits


def summed(layer: nn.Module, values: Tensor) -> Tensor:
    """Sum over positions of one image's values, channels first for convolutions, last for linear layers."""
    return values.flatten(1).sum(1) if isinstance(layer, nn.Conv2d) else values.reshape(-1, values.shape[-1]).sum(0)


def relevance(net: nn.Module, layer: str, image: Tensor, target: int) -> Tensor:
    """Rule 1: [C]."""
    _, z, logits = captured(net, layer, image)
    logits[0, target].backward()
    return summed(net.get_submodule(layer), (z * z.grad)[0].detach())


def is_relevant(values: Tensor, tau: float) -> list[bool]:
    """Rule 2."""
    total = sum(max(float(value), 0.0) for value in values)
    return [float(value) > 0 and float(value) >= tau * total for value in values]


def relevant_classes(net, layer, images, targets, tau, p) -> dict[int, list[int]]:
    """Rules 2 and 3: channel -> classes."""
    n_channels = len(relevance(net, layer, images[0], int(targets[0])))
    found = {channel: [] for channel in range(n_channels)}
    for label in sorted(set(targets.tolist())):
        flags = [is_relevant(relevance(net, layer, image, label), tau) for image in images[targets == label]]
        for channel in range(n_channels):
            if sum(flag[channel] for flag in flags) / len(flags) >= p:
                found[channel].append(label)
    return found


def arv(net, layer, images, targets, label, channel) -> Tensor:
    """Rule 4: one more pass over a class's images for one channel, [I]."""
    module = copy.deepcopy(net.get_submodule(layer)).double()
    total = 0
    own = images[targets == label]
    for image in own:
        x = captured(net, layer, image)[0].requires_grad_()
        z = module(x)
        z = z[:, channel].sum() if isinstance(module, nn.Conv2d) else z[..., channel].sum()
        (gradient,) = torch.autograd.grad(z, x)
        total = total + summed(module, (x * gradient)[0].detach())
    return total / len(own)


def flagged_pairs(net, layer, images, targets, tau, p, gamma) -> dict[tuple[int, int, int], float]:
    """Rule 5: (channel, A, B) -> cosine."""
    pairs = {}
    for channel, classes in relevant_classes(net, layer, images, targets, tau, p).items():
        for a, b in combinations(classes, 2):
            vectors = [arv(net, layer, images, targets, label, channel) for label in (a, b)]
            cosine = float(F.cosine_similarity(*vectors, dim=0))
            if cosine < gamma:
                pairs[channel, a, b] = cosine
    return pairs


def two_concept_sources(a_A: Tensor, a_B: Tensor, rho: float) -> list[str]:  # noqa: N803
    """Rule 6, in its own words: "A", "B" or "both" for every source."""
    kinds = []
    for value_a, value_b in zip(a_A.tolist(), a_B.tolist(), strict=True):
        if rho * value_a > value_b:
            kinds.append("A")
        elif rho * value_b > value_a:
            kinds.append("B")
        else:
            kinds.append("both")
    return kinds


def two_concept_rows(weight: Tensor, kinds: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Rule 7: weights of d_A, d_B and the residual, each of the shape of ``weight`` [I, ...]."""
    rows = [torch.zeros_like(weight) for _ in range(3)]
    for source, kind in enumerate(kinds):
        if kind in ("A", "both"):
            rows[0][source] = weight[source]
        if kind in ("B", "both"):
            rows[1][source] = weight[source]
        if kind == "both":
            rows[2][source] = weight[source]
    return tuple(rows)


def masked_output(layer: nn.Module, channel: int, row: Tensor, x: Tensor) -> Tensor:
    """Output of one channel with other weights, positions flattened: [n, P], by the layer's own forward."""
    copied = copy.deepcopy(layer).double()
    with torch.no_grad():
        copied.weight[channel] = row.double()
        z = copied(x.double())
    return z[:, channel].flatten(1) if isinstance(layer, nn.Conv2d) else z[..., channel].flatten(1)


def best_rho(layer, channel, vectors, inputs) -> float:
    """Rule 8 for any number of concepts, ratio by ratio."""
    weight = layer.weight[channel].detach()
    scores = {}
    for step in range(1, 21):
        rho = step / 20
        rows = []
        for i in range(len(vectors)):
            row = weight.clone()
            for k in range(len(weight)):
                if k not in sources(vectors, rho)[i]:
                    row[k] = 0
            rows.append(row)
        score = 0
        for i, x in enumerate(inputs):
            activations = [masked_output(layer, channel, row, x).clamp(min=0).sum(1) for row in rows]
            others = torch.stack([value for j, value in enumerate(activations) if j != i]).amax(0)
            score += float((activations[i] / (others + 1e-5)).mean())
        scores[rho] = score
    best = max(scores.values())
    return min(rho for rho, score in scores.items() if score == best)


def sources(vectors: list[Tensor], rho: float) -> list[set[int]]:
    """Rule 8, last paragraph: the sources that each concept keeps."""
    kept = [set() for _ in vectors]
    for k in range(len(vectors[0])):
        for i, own in enumerate(vectors):
            if not any(rho * other[k] > own[k] for j, other in enumerate(vectors) if j != i):
                kept[i].add(k)
        if not any(k in concept for concept in kept):
            kept[0].add(k)
    return kept


def class_arv(net, layer, images, targets, label, channel) -> Tensor:
    """Relevance of each input for the class's logit through one channel, mean over the class's images: [I]."""
    net = copy.deepcopy(net).double().eval()
    weight = net.get_submodule(layer).weight
    own = images[targets == label]
    total = 0
    for image in own:
        (gradient,) = torch.autograd.grad(net(image[None].double())[0, label], weight)
        product = (weight * gradient)[channel].detach()
        total = total + product.reshape(len(product), -1).sum(1)
    return total / len(own)


def class_pairs(net, layer, images, targets, tau, p, gamma) -> dict[tuple[int, int, int], float]:
    """Pairs by class-conditional vectors: (channel, A, B) -> cosine."""
    pairs = {}
    for channel, classes in relevant_classes(net, layer, images, targets, tau, p).items():
        vectors = {label: class_arv(net, layer, images, targets, label, channel) for label in classes}
        for a, b in combinations(classes, 2):
            cosine = float(F.cosine_similarity(vectors[a], vectors[b], dim=0))
            if cosine < gamma:
                pairs[channel, a, b] = cosine
    return pairs


def direction(net, layer, images, targets, label, channel) -> int:
    """Sign of the class's gradient at the channel, summed over positions and images."""
    total = 0.0
    for image in images[targets == label]:
        _, z, logits = captured(net, layer, image)
        logits[0, label].backward()
        total += float(summed(net.get_submodule(layer), z.grad[0])[channel])
    return -1 if total < 0 else 1


def noiseless_square(sums: list[Tensor], counts: list[float]) -> float:
    """Squared length of a mean, from products of different groups only."""
    above = sum(float(a @ b) for i, a in enumerate(sums) for j, b in enumerate(sums) if i != j)
    return above / sum(a * b for i, a in enumerate(counts) for j, b in enumerate(counts) if i != j)


def corrected_similarity(a, n_a, b, n_b) -> float:
    """Of two means, each given by the sums of its groups and their numbers of images."""
    product = float((sum(a) / sum(n_a)) @ (sum(b) / sum(n_b)))
    return product / (noiseless_square(a, n_a) * noiseless_square(b, n_b)) ** 0.5


def jackknife(a, n_a, b, n_b) -> tuple[float, float]:
    """Corrected similarity without bias, and its standard deviation; groups are left out one by one."""
    full = corrected_similarity(a, n_a, b, n_b)
    bias = variance = 0.0
    for which in ("a", "b"):
        groups, n = (a, n_a) if which == "a" else (b, n_b)
        without = []
        for left_out in range(len(groups)):
            rest = [value for g, value in enumerate(groups) if g != left_out]
            rest_n = [value for g, value in enumerate(n) if g != left_out]
            args = (rest, rest_n, b, n_b) if which == "a" else (a, n_a, rest, rest_n)
            without.append(corrected_similarity(*args))
        mean = sum(without) / len(without)
        bias += (len(without) - 1) * (mean - full)
        variance += (len(without) - 1) / len(without) * sum((value - mean) ** 2 for value in without)
    return full - bias, variance**0.5


def reliability(sums: list[Tensor]) -> float:
    """Spearman and Brown, from the cosine of even and odd groups."""
    even, odd = sum(sums[::2]), sum(sums[1::2])
    cosine = max(float(even @ odd) / float(even.norm() * odd.norm()), 0.0)
    return 2 * cosine / (1 + cosine)


def calibrated_thresholds(sums, counts, relevant, helpful) -> list[float]:
    """The rule of ``similarity_threshold="auto"``, with sums [K, C, G, I] and counts [K, C, G] for all entries."""
    n_classes, n_channels = relevant.shape
    arbitrary = []
    for channel in range(n_channels):
        values = []
        for a, b in combinations(range(n_classes), 2):
            groups = [list(sums[label, channel]) for label in (a, b)]
            numbers = [counts[label, channel].tolist() for label in (a, b)]
            good = all(helpful[label, channel] and reliability(list(sums[label, channel])) >= 0.5 for label in (a, b))
            if good and not (relevant[a, channel] and relevant[b, channel]):
                values.append(corrected_similarity(groups[0], numbers[0], groups[1], numbers[1]))
        arbitrary.append(values)
    everything = [value for values in arbitrary for value in values]
    if not everything:
        return [0.5] * n_channels
    low = float(np.quantile(everything, 0.1))
    own = [float(np.median(values if len(values) >= 10 else everything)) for values in arbitrary]
    return [min(max(min(median, low), 0.5), 0.9) for median in own]


def membership_loss(layer, channel, concepts, directions, inputs, targets, concept, membership, leak_weight) -> Tensor:
    """The loss of one concept's membership [I], term by term and image by image, each position by itself."""
    weight, bias = layer.weight[channel].detach().double(), 0.0
    if layer.bias is not None:
        bias = float(layer.bias[channel].detach())
    share = membership.double().view(-1, *[1] * (weight.ndim - 1))
    terms = {"own": [], "leak": [], "others": []}
    squares = {"own": [], "leak": []}
    for x, target in zip(inputs.double(), targets.tolist(), strict=True):
        z, d = (_channel_output(layer, row, bias, x) for row in (weight, weight * share))
        owner = next((i for i, labels in enumerate(concepts) if target in labels), None)
        s = directions[concept if owner is None else owner]
        for z_p, d_p in zip(z, d, strict=True):
            if owner == concept:
                terms["own"].append((d_p - z_p) ** 2 if s * z_p > 0 else (s * d_p).clamp(min=0) ** 2)
                squares["own"].append(max(s * float(z_p), 0.0) ** 2)
            elif owner is not None:
                terms["leak"].append((s * d_p).clamp(min=0) ** 2)
                squares["leak"].append(max(s * float(z_p), 0.0) ** 2)
            else:
                terms["others"].append((s * d_p - max(s * float(z_p), 0.0)).clamp(min=0) ** 2)
    scale = {name: sum(values) / len(values) if values else 0.0 for name, values in squares.items()}
    total = membership.double().sum() * 0
    for name, weight_of, by in (("own", 1, "own"), ("leak", leak_weight, "leak"), ("others", 1, "own")):
        if terms[name] and scale[by] > 0:
            total = total + weight_of * torch.stack(terms[name]).mean() / scale[by]
    return total


def _channel_output(layer, row: Tensor, bias: float, x: Tensor) -> Tensor:
    """One channel on one image with other weights, [P], with a graph to the weights."""
    if isinstance(layer, nn.Linear):
        return (x.reshape(-1, x.shape[-1]) * row).sum(-1) + bias
    windows = F.unfold(x[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]
    return (windows * row.flatten()[:, None]).sum(0) + bias


def parts_by_hand(layer, x, relevance, membership, rule) -> tuple[Tensor, Tensor]:
    """What each part of channel 0 gets, [K + 1, B], and gives to each source, [K + 1, B, I], number by number."""
    weight, bias = layer.weight[0].tolist(), layer.bias.tolist()[0]
    n_concepts, n_inputs = membership.shape
    rows = [*membership.tolist(), [1 - float(total) for total in membership.sum(0)]]  # the residual counts as negative
    of_bias = [1.0] * n_concepts + [1.0 - n_concepts]
    portions = torch.zeros(n_concepts + 1, len(x), dtype=torch.float64)
    passed = torch.zeros(n_concepts + 1, len(x), n_inputs, dtype=torch.float64)
    for b, image in enumerate(x.tolist()):
        gains = [w * value for w, value in zip(weight, image, strict=True)]
        above, below = ([clip(gain, 0) for gain in [*gains, bias]] for clip in (max, min))
        kinds = {
            "epsilon": [(1, [*gains, bias])],
            "z_plus": [(1, above)],
            "alpha2_beta1": [(2, above), (-1, below)],
        }
        for factor, all_gains in kinds[rule]:
            *own, own_bias = (factor * gain / sum(all_gains) * relevance[b] for gain in all_gains)
            for i, shares in enumerate(rows):
                for k in range(n_inputs):
                    passed[i, b, k] += shares[k] * own[k]
                    portions[i, b] += shares[k] * own[k]
                portions[i, b] += of_bias[i] * own_bias
    return portions, passed


def composite_relevance(net, layer, composite, images, targets, starts_from_one=False) -> Tensor:
    """The composite's modified gradient at a layer's output, started from the logit, summed over positions: [B, C].

    ``starts_from_one``: the backward pass starts from 1 and is multiplied by the logit afterwards.
    """
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    seen = []
    with composite.context(net):
        net.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
        logits = net(images.clone().requires_grad_())
        chosen = F.one_hot(targets, logits.shape[1]) * logits.detach()
        start = F.one_hot(targets, logits.shape[1]).to(logits) if starts_from_one else chosen
        (gradient,) = torch.autograd.grad(logits, seen[0], start)
    if starts_from_one:
        gradient = torch.stack([one * float(logit.sum()) for one, logit in zip(gradient, chosen, strict=True)])
    return torch.stack([summed(net.get_submodule(layer), one.detach()) for one in gradient])
