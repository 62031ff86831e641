"""The procedure of arXiv:2504.12939, step by step as its published scripts go about it, to compare with.

Written anew from the description of the method. Where the scripts and this file differ, this file is the cheaper or
the more exact one: images come from memory instead of from image files, relevances are stored in single instead of half
precision, and the objective of the splits is computed in double precision. No ties are left to rounding that way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

RATIOS = [step / 20 for step in range(1, 21)]


@dataclass(frozen=True)
class FoundPair:
    """Two classes that a channel is relevant for."""

    channel: int
    class_a: int
    class_b: int
    cosine_similarity: float


@dataclass(frozen=True)
class FoundSplit:
    """The dominance ratio of a pair, and which sources ``[2, I]`` each of its classes keeps."""

    rho: float
    membership: Tensor


class PaperPipeline:
    """Runs the procedure on images in memory.

    Args:
        model: The network, in evaluation mode.
        layer: Name of its layer of interest, a 1x1 convolution without bias.
        images: ``[N, 3, H, W]``.
        targets: ``[N]``.
        folder: Where the files of each image go.
        batch_size: Images per forward pass.
    """

    def __init__(
        self, model: nn.Module, layer: str, images: Tensor, targets: Tensor, folder: Path, batch_size: int = 64
    ) -> None:
        self._model = model
        self._name = layer
        self._layer = model.get_submodule(layer)
        self._images = images
        self._targets = targets
        self._folder = folder
        self._batch_size = batch_size

    def write_relevances(self) -> int:
        """Gradients down to the image, batch by batch; three files for each image. Returns the bytes written."""
        for rows in torch.arange(len(self._images)).split(self._batch_size):
            relevance, guesses = self._relevances(self._images[rows], self._targets[rows])
            for row, values, guess in zip(rows.tolist(), relevance, guesses, strict=True):
                torch.save(values.clone(), self._folder / f"{row}_relevance.pt")
                torch.save(self._targets[row].clone(), self._folder / f"{row}_target.pt")
                torch.save(guess.clone(), self._folder / f"{row}_guess.pt")
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def _relevances(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        seen = {}

        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            seen["activation"] = output.detach()
            output.register_hook(lambda gradient: seen.update(gradient=gradient))

        images = images.clone().requires_grad_()
        handle = self._layer.register_forward_hook(keep)
        logits = self._model(images)
        handle.remove()
        torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), images)
        return (seen["activation"] * seen["gradient"]).sum((2, 3)), logits.detach().argmax(1)

    def relevant_classes(self, relevance_threshold: float, class_fraction: float) -> dict[int, list[int]]:
        """Read all files again; for each channel the classes that it is relevant for, if there are at least two."""
        num_classes = int(self._targets.max()) + 1
        counts = torch.zeros(num_classes, len(self._layer.weight))
        n_images = torch.zeros(num_classes)
        for row in range(len(self._images)):
            values = torch.load(self._folder / f"{row}_relevance.pt")
            target = int(torch.load(self._folder / f"{row}_target.pt"))
            torch.load(self._folder / f"{row}_guess.pt")
            counts[target] += ((values > 0) & (values >= relevance_threshold * values.clamp(min=0).sum())).cpu()
            n_images[target] += 1
        relevant = counts >= class_fraction * n_images[:, None]
        classes = {channel: relevant[:, channel].nonzero()[:, 0].tolist() for channel in range(relevant.shape[1])}
        return {channel: found for channel, found in classes.items() if len(found) >= 2}

    def vector(self, channel: int, target: int) -> np.ndarray:
        """Averaged relevance vector ``[I]`` of a channel for a class: the network runs over all images of the class."""
        layer = copy.deepcopy(self._layer)
        parts = []
        for images in self._of_class(target):
            inputs = self._layer_inputs(self._model, images.clone().requires_grad_()).clone().requires_grad_()
            score = layer(inputs).sum((2, 3))[:, channel]
            gradient = torch.autograd.grad(score.sum(), inputs)[0]
            parts.append((gradient * inputs).sum((2, 3)).detach())
        return torch.cat(parts).mean(0).cpu().numpy()

    def _of_class(self, target: int) -> tuple[Tensor, ...]:
        return self._images[self._targets == target].split(self._batch_size)

    def _layer_inputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the layer of interest reads while ``model`` runs on ``images``."""
        with _inputs_of(model.get_submodule(self._name)) as seen:
            model(images)
        return seen[0]

    def split(self, channel: int, classes: tuple[int, int], vectors: list[np.ndarray], shared: bool) -> FoundSplit:
        """The best of twenty split networks.

        Args:
            channel: Channel to split.
            classes: The two classes.
            vectors: Their averaged relevance vectors.
            shared: Run the images through the network once and feed all twenty candidates with what their layer reads;
                `False`: run every candidate network over the images.
        """
        memberships = [_membership(vectors, ratio) for ratio in RATIOS]
        candidates = [self._split_model(channel, membership) for membership in memberships]
        scores = torch.zeros(len(RATIOS), dtype=torch.float64)
        for own, target in enumerate(classes):
            parts = [self._separations(candidates, channel, images, own, shared) for images in self._of_class(target)]
            scores += torch.cat(parts, dim=1).mean(1)
        best = int(scores.argmax())
        return FoundSplit(RATIOS[best], memberships[best])

    def _split_model(self, channel: int, membership: Tensor) -> nn.Module:
        """A copy of the network with the channel split, and a dense 1x1 convolution that puts the parts together."""
        n_channels, n_inputs = self._layer.weight.shape[:2]
        expand = nn.Conv2d(n_inputs, n_channels + 2, 1, bias=False)
        merge = nn.Conv2d(n_channels + 2, n_channels, 1, bias=False)
        weight = self._layer.weight.detach()
        keeps = membership.to(weight.device)
        parts = [weight[channel] * keep[:, None, None] for keep in (*keeps, keeps.all(0))]
        with torch.no_grad():
            expand.weight.copy_(torch.cat([weight, torch.stack(parts[1:])]))
            expand.weight[channel] = parts[0].to(expand.weight.device)
            merge.weight.zero_()
            merge.weight[:, :n_channels, 0, 0] = torch.eye(n_channels)
            merge.weight[channel, n_channels:, 0, 0] = torch.tensor([1.0, -1.0])
        model = copy.deepcopy(self._model)
        model.set_submodule(self._name, nn.Sequential(expand, merge).to(weight.device))
        return model

    def _separations(self, candidates: list[nn.Module], channel: int, images: Tensor, own: int, shared: bool) -> Tensor:
        """Own over other activation of each candidate and image, ``[20, B]``."""
        inputs = self._layer_inputs(self._model, images) if shared else None
        ratios = []
        for candidate in candidates:
            expand = candidate.get_submodule(self._name)[0]
            rows = expand.weight[[channel, len(expand.weight) - 2]].detach().double()
            read = self._layer_inputs(candidate, images) if inputs is None else inputs
            activation = torch.conv2d(read.double(), rows).clamp(min=0).sum((2, 3))
            ratios.append(activation[:, own] / (activation[:, 1 - own] + 1e-5))
        return torch.stack(ratios).cpu()


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what ``module`` reads."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def similar_pairs(vectors: dict[tuple[int, int], np.ndarray]) -> list[FoundPair]:
    """Cosine similarity of all pairs of classes of each channel, from vectors by ``(channel, class)``."""
    pairs = []
    for channel, class_a in vectors:
        for class_b in (other for same, other in vectors if same == channel and other > class_a):
            a, b = vectors[channel, class_a], vectors[channel, class_b]
            similarity = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            pairs.append(FoundPair(channel, class_a, class_b, similarity))
    return pairs


def _membership(vectors: list[np.ndarray], ratio: float) -> Tensor:
    """Sources of the two classes: one's alone where it dominates, else shared; ``[2, I]``, boolean."""
    a, b = (torch.from_numpy(vector) for vector in vectors)
    only_a = ratio * a > b
    only_b = (ratio * b > a) & ~only_a
    return torch.stack([~only_b, ~only_a])
