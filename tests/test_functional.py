import copy

import pytest
import torch
from torch import nn

from lightning_polydis import disentangle, evaluate_splits, find_polysemantic_channels, functional
from tests import reference
from tests.networks import BottleneckNet, conv_relu_net, make_batches, make_images, train_briefly

SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9, "progress": False}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


def test_from_network_to_split_network(trained):
    report = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    assert len(report.channels) > 2
    split = disentangle(trained, report.plan)
    assert [(split.layer, split.channel, split.concepts) for split in report.plan] == [
        (channel.layer, channel.channel, channel.concepts) for channel in report.channels
    ]
    images, targets = make_images(seed=1)
    torch.testing.assert_close(split(images), trained(images), rtol=1e-5, atol=1e-5)
    quality = evaluate_splits(split, report.plan, [(images, targets)], progress=False)
    assert len(quality) == len(report.channels)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (conv_relu_net(), "4"),
        (BottleneckNet(), "blocks.1.conv3"),
        (
            nn.Sequential(conv_relu_net()[:6], nn.Conv2d(10, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "0.4",
        ),
    ],
    ids=["conv", "bottleneck", "pooled convolution as head"],
)
def test_the_default_layer_is_the_last_that_is_neither_first_nor_gives_the_logits(net, expected):
    chosen = find_polysemantic_channels(net.eval(), make_batches(), **SETTINGS)
    named = find_polysemantic_channels(net.eval(), make_batches(), expected, **SETTINGS)
    assert [layer.name for layer in chosen.layers] == [expected]
    assert chosen.n_images == named.n_images == 48, "the first batch counts too"
    assert chosen.pairs == named.pairs


def test_running_order_decides_not_the_order_of_names():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(9, 4), nn.Linear(8, 9), nn.Linear(243, 8)

        def forward(self, x):
            return self.last(self.middle(self.first(x.flatten(1)).relu()).relu())

    report = find_polysemantic_channels(Backwards(), make_batches(), **SETTINGS)
    assert [layer.name for layer in report.layers] == ["middle"]


def test_without_a_fit_layer_the_candidates_are_listed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(243, 4))
    with pytest.raises(ValueError, match="No layer could be chosen .* linear layers of this model: `1`"):
        find_polysemantic_channels(net, make_batches(), **SETTINGS)
    assert not any(module._forward_hooks for module in net.modules())


def test_several_layers_are_served_by_one_pass(trained):
    both = find_polysemantic_channels(trained, make_batches(), ["2", "4"], **SETTINGS)
    for name in ("2", "4"):
        alone = find_polysemantic_channels(trained, make_batches(), name, **SETTINGS)
        assert [pair for pair in both.pairs if pair.layer == name] == alone.pairs
        assert [split for split in both.plan if split.layer == name] == alone.plan.splits


def test_batches_of_any_size_give_the_same(trained):
    reports = [find_polysemantic_channels(trained, make_batches(size), "2", **SETTINGS) for size in (48, 7, 1)]
    for report in reports[1:]:
        assert [(p.channel, p.class_a, p.class_b) for p in report.pairs] == [
            (p.channel, p.class_a, p.class_b) for p in reports[0].pairs
        ]
        cosines = [[pair.cosine_similarity for pair in r.pairs] for r in (report, reports[0])]
        assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)


def test_any_iterable_will_do_and_the_progress_bar_hides_nothing(trained, capsys):
    images, targets = make_images()
    expected = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    settings = {**SETTINGS, "progress": True}
    found = find_polysemantic_channels(trained, ([x, y] for x, y in make_batches()), "2", **settings)
    assert found.pairs == expected.pairs
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), 16)
    assert find_polysemantic_channels(trained, loader, "2", **settings).pairs == expected.pairs
    capsys.readouterr()


def test_the_network_is_left_as_it_was(trained):
    net = copy.deepcopy(trained).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    find_polysemantic_channels(net, make_batches(), **SETTINGS)
    assert [module.training for module in net] == [index != 1 for index in range(9)]
    assert not net[0].weight.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_it_works_where_gradients_are_off(trained):
    expected = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS).pairs == expected.pairs


def test_an_exception_in_the_data_leaves_nothing_behind(trained):
    def data():
        yield make_batches()[0]
        raise OSError("the disk is gone")

    net = copy.deepcopy(trained).train()
    with pytest.raises(OSError, match="the disk is gone"):
        find_polysemantic_channels(net, data(), "2", **SETTINGS)
    assert net.training
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in net.modules())


def test_another_device_is_moved_to_and_back(trained, monkeypatch):
    moves = []
    net = copy.deepcopy(trained)
    monkeypatch.setattr(net, "to", moves.append)
    find_polysemantic_channels(net, make_batches(), "2", device="cpu:0", **SETTINGS)  # not the same as "cpu"
    assert moves == [torch.device("cpu:0"), torch.device("cpu")]
    find_polysemantic_channels(net, make_batches(), "2", device="cpu", **SETTINGS)
    assert len(moves) == 2


def test_progress_is_shown_on_a_terminal_and_only_there(trained, monkeypatch):
    shown = []

    def track(batches, description, **kwargs):
        shown.append((description, kwargs["total"]))
        return batches

    monkeypatch.setattr(functional, "track", track)
    for terminal in (False, True):
        monkeypatch.setattr(functional.Console, "is_terminal", terminal)
        find_polysemantic_channels(trained, make_batches(), "2", **{**SETTINGS, "progress": True})
    find_polysemantic_channels(trained, iter(make_batches()), "2", **{**SETTINGS, "progress": True})
    find_polysemantic_channels(trained, iter(make_batches()), "2", **SETTINGS)
    text = "Looking for polysemantic channels"
    assert shown == [(text, 3), (text, None)]


def test_splits_are_chosen_and_judged_as_the_rules_say(trained):
    """Which images choose, which images judge, and what a concept of several classes is."""
    images, targets = make_images()
    settings = {**SETTINGS, "class_fraction": 0.1, "similarity_threshold": 0.8, "method": "paper"}
    report = find_polysemantic_channels(trained, make_batches(), "2", calibration_samples=6, **settings)
    found = [channel for channel in report.channels if max(map(len, channel.concepts)) > 1]
    assert found, "the case would show nothing"
    rows = {label: (targets == label).nonzero()[:6, 0] for label in range(4)}
    layer = trained[2]
    for channel in found:
        vectors = []
        for concept in channel.concepts:
            arvs = [reference.arv(trained, "2", images, targets, label, channel.channel) for label in concept]
            vectors.append(torch.stack(arvs).mean(0))
        choosing = [torch.cat([rows[label][::2] for label in concept]) for concept in channel.concepts]
        with torch.no_grad():
            inputs = [trained[:2](images[part]) for part in choosing]
        split = report.plan.splits[report.channels.index(channel)]
        assert split.rho == reference.best_rho(layer, channel.channel, vectors, inputs)
        judging = torch.cat([rows[label][1::2] for label in range(4)])
        (expected,) = evaluate_splits(
            trained,
            type(report.plan)([split]),
            [(images[judging], targets[judging])],
            progress=False,
            relevance_threshold=0.05,
        )
        quality = report.quality[report.channels.index(channel)]
        for mine, other in zip(quality.concepts, expected.concepts, strict=True):
            assert mine.n_own == other.n_own == 3 * len(mine.classes)
            assert mine.distortion == pytest.approx(other.distortion, rel=1e-4)
            assert mine.kept == (None if other.kept is None else pytest.approx(other.kept, rel=1e-4))


def test_nan_in_one_of_several_layers_leaves_the_batch_out(trained):
    class LateNan(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            features = self.net[:3](x)
            return self.net[3:](torch.where(x[:, :1, :1, :1] > 100, float("nan"), features))

    images, targets = make_images()
    strange = images[:4].clone()
    strange[0, 0, 0, 0] = 101.0
    report = find_polysemantic_channels(
        LateNan(trained), [(images, targets), (strange, targets[:4])], ["net.2", "net.4"], **SETTINGS
    )
    assert (report.n_images, report.n_images_left_out) == (48, 4)


def test_the_memory_of_several_layers_is_added_up(trained):
    per_image = (8 * 9 * 9 + 12 * 5 * 5) * 4 + 12 + 10
    memory = 3.5 * 4 * per_image / 2**20
    with pytest.warns(UserWarning, match="Only 3 of 32 calibration samples"):
        find_polysemantic_channels(trained, make_batches(), ["2", "4"], calibration_memory=memory, **SETTINGS)


def test_inputs_that_the_network_overwrites_later_are_seen_as_they_were(trained):
    class PreActivation(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.relu, self.head = nn.ReLU(inplace), nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x)
            y = self.conv(x)
            x = self.relu(x)  # overwrites what the convolution has read
            return self.head(torch.cat([x, y.relu()], 1).mean((2, 3)))

    reports = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = PreActivation(inplace).eval()
        settings = {**SETTINGS, "class_fraction": 0.1, "similarity_threshold": 1.0}
        reports.append(find_polysemantic_channels(net, make_batches(), "conv", **settings))
    assert len(reports[0].pairs) > 3
    assert reports[0].pairs == reports[1].pairs
    assert reports[0].plan == reports[1].plan


def test_looking_for_the_layer_leaves_no_trace(trained):
    class Moody(nn.Module):
        """Draws random numbers, counts its calls and overwrites its input."""

        def __init__(self, net):
            super().__init__()
            self.net = net
            self.register_buffer("calls", torch.tensor(0))
            self.register_buffer("reassigned", torch.tensor(0))
            self.register_buffer("wide", torch.ones(1).expand(3))

        def forward(self, x):
            self.calls += 1
            self.reassigned = self.reassigned + 1
            noise = torch.randn(len(x), 1, 1, 1)
            return self.net(x.mul_(0.9) + 0 * noise)

    def clones():
        return ((x.clone(), y) for x, y in make_batches())

    net = Moody(trained)
    torch.manual_seed(0)
    named = find_polysemantic_channels(net, clones(), "net.4", **SETTINGS)
    state = torch.get_rng_state()
    assert int(net.calls) == 3
    torch.manual_seed(0)
    chosen = find_polysemantic_channels(net, clones(), **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(net.calls) == int(net.reassigned) == 6
    assert chosen.pairs == named.pairs


def test_the_first_layer_and_the_logits_layer_are_never_chosen():
    with pytest.raises(ValueError, match="No layer could be chosen"):
        find_polysemantic_channels(nn.Sequential(nn.Flatten(), nn.Linear(243, 9), nn.Linear(9, 4)), make_batches())

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(243, 16), nn.Linear(16, 16)
            self.head, self.other = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            features = self.body(self.first(x.flatten(1)).relu()).relu()
            return {"logits": self.head(features), "aux": self.other(features)}

    report = find_polysemantic_channels(TwoHeads(), make_batches(), **SETTINGS)
    assert report.layers[0].name == "body"


@pytest.mark.parametrize("samples", [0, 4, None])
def test_calibration_samples_choose_and_judge(trained, samples):
    report = find_polysemantic_channels(trained, make_batches(), "2", calibration_samples=samples, **SETTINGS)
    if samples == 0:
        assert report.plan is None
        assert report.quality == []
        with pytest.raises(ValueError, match="`calibration_samples` above 0"):
            report.plan_pairs([("2", 3, 0, 1)])
    else:
        assert len(report.plan) == len(report.channels) > 0
        seen = [concept.n_own for quality in report.quality for concept in quality.concepts]
        assert seen == ([] if samples is None else [2 * len(c.classes) for q in report.quality for c in q.concepts])


def test_too_little_memory_lowers_the_samples_and_says_so(trained):
    per_image = 8 * 9 * 9 * 4
    memory = 3.5 * 4 * per_image / 2**20  # room for three images of each of the four classes
    with pytest.warns(UserWarning, match="Only 3 of 32 calibration samples"):
        report = find_polysemantic_channels(trained, make_batches(), "2", calibration_memory=memory, **SETTINGS)
    assert "Only 3 of 32" in report.notes[0]
    assert all(len(images) == 12 for images in report.sample_inputs().values())


def test_chosen_pairs_are_planned_in_the_order_given(trained):
    report = find_polysemantic_channels(trained, make_batches(), ["2", "4"], **SETTINGS)
    plan = report.plan_pairs([("4", 3, 2, 0), ("2", 1, 0, 2), ("4", 3, 0, 2)])
    assert [split.concepts for split in plan] == [[[2], [0]], [[0], [2]], [[0], [2]]]
    assert [split.layer for split in plan] == ["4", "2", "4"]
    assert plan.splits[0].rho == plan.splits[2].rho
    disentangle(trained, type(plan)(plan.splits[:2]))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("3", 0, 0, 1), r"Expected an analysed layer \(2\), but got '3'"),
        (("2", 12, 0, 1), r"channel in \[0, 12\), but got 12"),
        (("2", 0, 1, 1), "two different classes, but got 1 twice"),
        (("2", 0, 1, 4), "a class that has images, but got 4"),
        (("2", 0, -1, 2), "a class that has images, but got -1"),
    ],
)
def test_pairs_that_cannot_be_planned_are_refused(trained, pair, message):
    report = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    with pytest.raises(ValueError, match=message):
        report.plan_pairs([pair])


def test_a_batch_with_nan_is_left_out_counted_and_reported(trained):
    images, targets = make_images(n=8)
    broken = images.clone()
    broken[3, 0, 0, 0] = float("nan")
    clean = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    mixed = find_polysemantic_channels(trained, [*make_batches(), (broken, targets)], "2", **SETTINGS)
    assert mixed.pairs == clean.pairs
    assert (mixed.n_images, mixed.n_images_left_out) == (48, 8)
    assert "8 images were left out because their batch held NaN or infinity." in mixed.notes
    nothing = find_polysemantic_channels(trained, [(broken, targets)], "2", **SETTINGS)
    assert (nothing.n_images, nothing.n_images_left_out, nothing.channels) == (0, 8, [])
    assert len(nothing.plan or []) == 0


def test_classes_without_images_and_a_single_class_are_reported(trained):
    images, targets = make_images()
    settings = {**SETTINGS, "similarity_threshold": 1.0}
    some = find_polysemantic_channels(trained, [(images[targets < 3], targets[targets < 3])], "2", **settings)
    assert some.notes == ["1 of 4 classes had no images and was left out."]
    assert some.pairs
    assert all(pair.class_b < 3 for pair in some.pairs)
    one = find_polysemantic_channels(trained, [(images[targets == 2], targets[targets == 2])], "2", **SETTINGS)
    assert one.notes == ["All images are of one class; a channel is polysemantic for two classes or more."]
    assert one.channels == []
    assert one.scalars()["polydis/2/mean_cosine"] == 1


def test_channels_that_read_a_single_input_are_noted():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    batch = torch.rand(12, 1, 6, 6), torch.arange(12) % 3
    with pytest.warns(UserWarning, match="Each channel of `0` reads a single input"):
        report = find_polysemantic_channels(net, [batch], "0", progress=False)
    assert sum("single input" in note for note in report.notes) == 1
    # ... and where there are several, nothing is said
    wide = nn.Sequential(nn.Conv2d(2, 6, 3), *net[1:])
    batch = torch.rand(12, 2, 6, 6), torch.arange(12) % 3
    assert not any("single input" in note for note in find_polysemantic_channels(wide, [batch], "0").notes)


def test_a_layer_that_folds_positions_into_the_batch_is_refused_in_words():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Linear(27, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            tokens = self.mix(self.embed(x.reshape(-1, 27)).relu()).relu()
            return self.head(tokens.reshape(len(x), 9, 16).mean(1))

    with pytest.raises(
        ValueError, match=r"`mix` to have the batch as its first dimension, of size 16, but got \[144, 16\]"
    ):
        find_polysemantic_channels(Windows(), make_batches(), "mix", **SETTINGS)


@pytest.mark.parametrize("batch_size", [4, 16, 32])
@pytest.mark.parametrize("width", [16, 64])
def test_memory_that_is_used_again_is_not_taken_for_the_logits(width, batch_size):
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(243, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )
    report = find_polysemantic_channels(net, make_batches(batch_size), **SETTINGS)
    assert report.layers[0].name == "3"


def test_own_functions_that_fail_are_named(trained):
    with pytest.raises(ValueError, match="`logits_fn` raised KeyError: 'scores'"):
        find_polysemantic_channels(trained, make_batches(), logits_fn=lambda output: {}["scores"], **SETTINGS)
    with pytest.raises(ValueError, match="`target_fn` raised KeyError: 'kind'"):
        find_polysemantic_channels(trained, make_batches(), "2", target_fn=lambda batch: {}["kind"], **SETTINGS)
    with pytest.raises(ValueError, match="`logits_fn` raised AttributeError"):
        find_polysemantic_channels(trained, make_batches(), "2", logits_fn=lambda output: output.scores, **SETTINGS)


def test_log_probabilities_are_warned_about(trained):
    net = nn.Sequential(trained, nn.LogSoftmax(1))
    with pytest.warns(UserWarning, match="probabilities or log-probabilities, not logits"):
        report = find_polysemantic_channels(net, make_batches(), "0.2", **SETTINGS)
    assert "log-probabilities" in report.notes[0]
    repaired = find_polysemantic_channels(net, make_batches(), "0.2", logits_module="0", **SETTINGS)
    assert repaired.notes == []


@pytest.mark.parametrize("attribution", ["gradient_x_input", "epsilon_plus_flat"])
def test_the_layer_that_makes_the_logits_is_said_to_show_nothing(trained, attribution):
    told = "`8` makes the logits: each of its channels is the logit of one class"
    with pytest.warns(UserWarning, match=f"{told}, .* Name a layer before it"):
        report = find_polysemantic_channels(trained, make_batches(), ["4", "8"], attribution=attribution, **SETTINGS)
    assert [note.startswith(told) for note in report.notes].count(True) == 1
    assert report.layers[0].n_candidates > 0
    assert report.layers[1].n_candidates == 0


def test_a_layer_whose_output_is_returned_beside_the_logits_does_not_make_them(trained):
    class WithFeatures(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = trained[:5], trained[5:]

        def forward(self, images):
            features = self.body(images)
            return {"features": features, "logits": self.head(features.clone())}

    report = find_polysemantic_channels(WithFeatures(), make_batches(), "body.4", **SETTINGS)
    assert report.layers[0].n_candidates > 0
    assert not any("makes the logits" in note for note in report.notes)


def test_names_and_numbers_that_do_not_fit_are_refused(trained):
    with pytest.raises(ValueError, match="`class_names` to hold 4 names, one for each logit, but got 2"):
        find_polysemantic_channels(trained, make_batches(), "2", class_names=["cat", "dog"], **SETTINGS)
    with pytest.raises(ValueError, match=r"logits of shape \[16, 7\], but got \[16, 4\]"):
        find_polysemantic_channels(trained, make_batches(), "2", num_classes=7, **SETTINGS)
    with pytest.raises(ValueError, match="`logits_module` to name a module of the model, but got 'hed'"):
        find_polysemantic_channels(trained, make_batches(), "2", logits_module="hed", **SETTINGS)


def test_own_functions_find_targets_and_logits(trained):
    class Odd(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return [None, self.net(x)]

    batches = [(x, {"deep": y}) for x, y in make_batches()]
    found = find_polysemantic_channels(
        Odd(trained),
        batches,
        "net.2",
        target_fn=lambda batch: batch[1]["deep"],
        logits_fn=lambda output: output[1],
        **SETTINGS,
    )
    expected = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    assert [pair.cosine_similarity for pair in found.pairs] == [pair.cosine_similarity for pair in expected.pairs]


def test_several_calls_in_one_pass_need_a_named_layer(trained):
    class TwoCalls(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = copy.deepcopy(trained)[:8], copy.deepcopy(trained)[8]

        def __call__(self, x):  # not through the module's own call
            return self.head(self.backbone(x))

    with pytest.raises(
        ValueError, match=r"several calls \(`head` ran outside the first one\). Pass `layers`, and `logits_"
    ):
        find_polysemantic_channels(TwoCalls(), make_batches(), **SETTINGS)
    found = find_polysemantic_channels(TwoCalls(), make_batches(), "backbone.2", logits_module="head", **SETTINGS)
    expected = find_polysemantic_channels(trained, make_batches(), "2", **SETTINGS)
    assert [pair.cosine_similarity for pair in found.pairs] == [pair.cosine_similarity for pair in expected.pairs]
