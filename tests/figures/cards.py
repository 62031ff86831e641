"""Made-up cards and overviews, for tests of how they are drawn."""

import numpy as np
import torch

from lightning_polydis.cards import CardImage, CardRow, ChannelCard, LayerOverview, SourceShare

LONG_NAMES = [f"a very long name of a class of dogs or of sailing boats {index:04}" for index in range(1000)]
LONG_LAYER = "backbone.features.denseblock4.denselayer16.conv2.parametrizations.weight"


def make_card(n_concepts=2, n_images=8, sizes=((48, 48),), stranger=False):
    """A card of concepts of one and two classes; of its images the last class is ``stranger``'s, if there is one."""
    rng = np.random.default_rng(0)
    concepts = [[3 * index, 3 * index + 1][: 1 + index % 2] for index in range(n_concepts)]
    classes = [label for concept in concepts for label in concept]
    targets = [*classes, 999] if stranger else classes
    matrix = rng.uniform(-0.2, 1, (len(classes),) * 2)
    matrix = np.triu(matrix, 1) + np.triu(matrix, 1).T + np.eye(len(classes))

    def images(row):
        return [
            CardImage(
                torch.full((3, *sizes[place % len(sizes)]), (10 * row + place) % 256, dtype=torch.uint8),
                targets[(row + place) % len(targets)],
                9.0 - place,
            )
            for place in range(n_images)
        ]

    return ChannelCard(
        "net.conv",
        7,
        concepts,
        0.1234,
        (-0.05, 0.3),
        0.5,
        0.87,
        [
            CardRow(classes, images(row), [[4.0 + 4 * (row == 1 + place)] * 9 for place in range(n_concepts)])
            for row, classes in enumerate([[], *concepts])
        ],
        [
            [SourceShare(100 * index + place, 6.0 - place - index, 1 - 0.1 * place) for place in range(6)]
            for index in range(n_concepts)
        ],
        classes,
        matrix.tolist(),
    )


def make_overview(**changes):
    known = {
        "layer": "net.conv",
        "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
        "n_candidate_pairs": [1, 2, 7, 4],
        "n_flagged_pairs": [1, 1, 0, 0],
        "thresholds": (0.4, 0.4),
        "channels": [5, 9],
        "classes": [2, 4, 6],
        "relevance": [[0.9, 0.1, 0.8], [0.0, 1.0, 0.3]],
        "near_misses": [],
    }
    return LayerOverview(**{**known, **changes})
