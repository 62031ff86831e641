import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from zennit.composites import EpsilonPlusFlat

from lightning_polydis import ChannelDisentanglement, find_polysemantic_channels
from lightning_polydis.settings import AnalysisSettings

BAD = [
    ({"layers": 3}, "`layers` to be a module name, a sequence of module names or None, but got 3"),
    ({"layers": []}, r"but got \[\]"),
    ({"layers": ["a", 1]}, r"but got \['a', 1\]"),
    ({"layers": ["a", "a"]}, "to name each module once"),
    ({"relevance_threshold": 3.0}, r"`relevance_threshold` to be a number in \(0, 1\], but got 3.0"),
    ({"relevance_threshold": 0}, r"`relevance_threshold` .* but got 0"),
    ({"relevance_threshold": "high"}, "`relevance_threshold` .* but got 'high'"),
    ({"relevance_threshold": True}, "`relevance_threshold` .* but got True"),
    ({"relevance_threshold": float("nan")}, "`relevance_threshold` .* but got nan"),
    ({"class_fraction": 0}, r"`class_fraction` to be a number in \(0, 1\], but got 0"),
    ({"class_fraction": 75}, "`class_fraction` .* but got 75"),
    ({"similarity_threshold": -1}, r"`similarity_threshold` to be a number in \(-1, 1\], but got -1"),
    ({"similarity_threshold": "low"}, "`similarity_threshold` .* but got 'low'"),
    ({"similarity_threshold": "low", "method": "paper"}, "`similarity_threshold` .* but got 'low'"),
    (
        {"similarity_threshold": "auto", "method": "paper"},
        "`similarity_threshold='auto'` needs the relevance vectors of `method='optimized'`",
    ),
    ({"method": "best"}, "`method` to be one of 'paper', 'optimized', but got 'best'"),
    ({"concepts": "words"}, "`concepts` to be one of 'classes', 'clusters', but got 'words'"),
    ({"concepts": "clusters", "method": "paper"}, "`method='paper'` knows concepts by their classes"),
    ({"concepts": "clusters", "attribution": "epsilon_plus"}, "`attribution` decides which channels are relevant"),
    ({"describe_fn": str}, "`describe_fn` names clusters: it needs `concepts='clusters'`"),
    ({"concepts": "clusters", "describe_fn": 3}, "`describe_fn` to be a function or None, but got 3"),
    ({"attribution": "epsilon_plus_falt"}, "Closest names: `epsilon_plus_flat`"),
    ({"attribution": 3}, "Expected argument `attribution` to be a zennit composite or one of 'gradient_x_input'"),
    ({"attribution": "epsilon_gamma_box"}, r"needs arguments .* `attribution=zennit.*EpsilonGammaBox\(...\)`"),
    ({"leak_weight": 0}, "`leak_weight` .* but got 0"),
    ({"num_classes": 1}, "`num_classes` to be an integer of at least 2, but got 1"),
    ({"num_classes": 2.5}, "`num_classes` .* but got 2.5"),
    ({"calibration_samples": -1}, "`calibration_samples` to be an integer of at least 0, but got -1"),
    ({"calibration_samples": True}, "`calibration_samples` .* but got True"),
    ({"calibration_memory": 0}, "`calibration_memory` .* but got 0"),
    ({"target_fn": "label"}, "`target_fn` to be a function or None, but got 'label'"),
    ({"logits_fn": 0}, "`logits_fn` to be a function or None, but got 0"),
    ({"class_names": [0, 1]}, "`class_names` to be a sequence of names"),
    ({"class_names": "cat"}, "`class_names` to be a sequence of names, but got 'cat'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_bad_settings_are_refused_in_words_everywhere(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnalysisSettings(**arguments)
    with pytest.raises(MisconfigurationException, match=message):
        ChannelDisentanglement(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataloader": 1.5}, "`dataloader` to be a place, a key or None, but got 1.5"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer of at least 1, but got 0"),
        ({"split": "yes"}, "`split` to be True or False, but got 'yes'"),
        ({"strict": None}, "`strict` to be True or False, but got None"),
        ({"embeddings": 1}, "`embeddings` to be True or False, but got 1"),
        (
            {"split": True, "calibration_samples": 0},
            "`split=True` needs calibration samples, but got `calibration_samples=0`",
        ),
    ],
)
def test_the_callbacks_own_arguments_are_checked_too(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        ChannelDisentanglement(**arguments)


def species(batch):
    return batch["species"]


class Quiet(ChannelDisentanglement):
    def __init__(self, layer):
        super().__init__(layer, strict=True)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (ChannelDisentanglement, "ChannelDisentanglement()"),
        (
            lambda: ChannelDisentanglement("net.conv", split=True, relevance_threshold=0.03, class_fraction=0.5),
            "ChannelDisentanglement(layers='net.conv', class_fraction=0.5, split=True)",
        ),
        (
            lambda: ChannelDisentanglement(["a", "b"], target_fn=species, every_n_epochs=2, dataloader="b"),
            "ChannelDisentanglement(layers=['a', 'b'], every_n_epochs=2, target_fn=species, dataloader='b')",
        ),
        (
            lambda: ChannelDisentanglement(attribution=EpsilonPlusFlat(), denormalize=((0.5,), (0.2,))),
            "ChannelDisentanglement(attribution=EpsilonPlusFlat, denormalize=((0.5,), (0.2,)))",
        ),
        (lambda: Quiet("net.conv"), "Quiet(layers='net.conv', strict=True)"),
    ],
)
def test_a_callback_as_text_is_the_call_that_made_it(make, text):
    assert repr(make()) == text


def test_a_callback_as_text_is_short_whatever_it_was_given():
    names = [f"class {index}" for index in range(1000)]
    text = repr(ChannelDisentanglement("net.conv", class_names=names))
    assert text.startswith("ChannelDisentanglement(layers='net.conv', class_names=['class 0', 'class 1',")
    assert len(text) < 150


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relevance_treshold", "settings of the analysis, but got `relevance_treshold`. Closest names: `relevance_thr"),
        ("zzz", "but got `zzz`. Closest names: `layers`, `relevance_threshold`, .*, `describe_fn`"),
    ],
)
def test_a_setting_that_there_is_not_is_refused_with_the_closest_names(name, message):
    with pytest.raises(TypeError, match=message):
        find_polysemantic_channels(nn.Linear(8, 8), [], progress=False, **{name: 0.1})


def test_limits_are_allowed():
    settings = AnalysisSettings(
        relevance_threshold=1, class_fraction=1.0, similarity_threshold=1, calibration_samples=0
    )
    assert settings.threshold == 1
    assert AnalysisSettings().threshold == AnalysisSettings(similarity_threshold="auto").threshold == "auto"
    assert AnalysisSettings(method="paper").threshold == 0.5
    assert AnalysisSettings(method="paper", similarity_threshold=0.25).threshold == 0.25
    assert AnalysisSettings(relevance_threshold=0.4).relevance_thresholds == [0.4, 0.1, 0.2, 0.8]
    assert AnalysisSettings(layers=("a", "b")).layer_names == ["a", "b"]
    assert AnalysisSettings(layers="a").layer_names == ["a"]
