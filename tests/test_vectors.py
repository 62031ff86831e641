import pytest
import torch

from lightning_polydis.statistics import relevant_channels
from lightning_polydis.vectors import N_GROUPS, ClassVectors, RelevanceVectors

N_CLASSES, N_CHANNELS, N_INPUTS = 6, 5, 3
ENTRY = 4 * N_INPUTS * N_GROUPS  # bytes


def stream(n=240, seed=0, num_classes=N_CLASSES, order="shuffled"):
    """Relevances of the channels, of their sources [n, C, I], and classes; some channels matter to few classes."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(n, N_CHANNELS, N_INPUTS, generator=generator)
    targets = torch.randint(num_classes, (n,), generator=generator)
    if order == "ordered":
        targets = targets.sort().values
    likes = torch.rand(num_classes, N_CHANNELS, generator=generator) - 0.5
    relevance = likes[targets] + 0.3 * torch.randn(n, N_CHANNELS, generator=generator)
    return relevance, sources, targets


def feed(vectors, relevance, sources, targets, batch_size=16, threshold=0.1):
    """Batch by batch, as the analysis does; yields after each batch."""
    for batch in torch.arange(len(targets)).split(batch_size):
        images, channels = vectors.wanted(relevant_channels(relevance[batch], threshold), targets[batch])
        vectors.update(sources[batch][images, channels], images, channels, targets[batch])
        yield images


def run(max_entries, data, num_classes=N_CLASSES, **kwargs):
    vectors = RelevanceVectors(num_classes, N_CHANNELS, N_INPUTS, max_entries * ENTRY)
    for _ in feed(vectors, *data, **kwargs):
        pass
    return vectors


def expected_groups(sources, targets, label, channel):
    """Every eighth image of the class belongs together."""
    own = sources[targets == label, channel].double()
    sums = torch.stack([own[group::N_GROUPS].sum(0) for group in range(N_GROUPS)])
    return sums, [len(own[group::N_GROUPS]) for group in range(N_GROUPS)]


@pytest.mark.parametrize("batch_size", [1, 7, 240])
def test_all_entries_are_means_over_all_images_when_there_is_room(batch_size):
    data = _, sources, targets = stream()
    found = run(N_CLASSES * N_CHANNELS, data, batch_size=batch_size).compute()
    assert found.known(N_CLASSES).all()
    for channel in range(N_CHANNELS):
        assert found.classes(channel) == list(range(N_CLASSES))
        sums, counts = found.groups(channel, [4, 0])
        for row, label in enumerate((4, 0)):
            expected, numbers = expected_groups(sources, targets, label, channel)
            torch.testing.assert_close(sums[row], expected, rtol=1e-5, atol=1e-5)
            assert counts[row].tolist() == numbers
            mean = sources[targets == label, channel].double().mean(0)
            torch.testing.assert_close(found.means(channel, [label])[0], mean, rtol=1e-5, atol=1e-5)


def test_a_class_without_images_has_no_entries():
    relevance, sources, targets = stream()
    seen = targets != 2
    found = run(N_CLASSES * N_CHANNELS, (relevance[seen], sources[seen], targets[seen])).compute()
    known = found.known(N_CLASSES)
    assert not known[2].any()
    assert known[[0, 1, 3, 4, 5]].all()
    assert all(found.classes(channel) == [0, 1, 3, 4, 5] for channel in range(N_CHANNELS))


def test_entries_of_several_processes_are_added_up():
    data = relevance, sources, targets = stream()
    even = torch.arange(len(targets)) % 2 == 0
    parts = [run(100, (relevance[own], sources[own], targets[own])) for own in (even, ~even)]
    states = [[part.keys[0], part.sums[0], part.counts[0]] for part in parts]
    keys, sums, counts = (torch.cat(column) for column in zip(*states, strict=True))
    used = keys >= 0
    merged, whole = ClassVectors(keys[used], sums[used], counts[used], N_CHANNELS), run(100, data).compute()
    assert torch.equal(merged.known(N_CLASSES), whole.known(N_CLASSES))
    for channel in range(N_CHANNELS):
        classes = whole.classes(channel)
        assert merged.classes(channel) == classes
        torch.testing.assert_close(merged.means(channel, classes), whole.means(channel, classes), rtol=1e-5, atol=1e-6)
        totals = [entry.groups(channel, classes)[1].sum(1) for entry in (merged, whole)]
        assert torch.equal(*totals)


def test_entries_that_only_one_process_has_are_kept():
    keys = torch.tensor([7, 2, 7])  # class 1 channel 2, class 0 channel 2
    sums = torch.arange(3.0)[:, None, None].expand(3, 2, 1)
    merged = ClassVectors(keys, sums, torch.ones(3, 2), N_CHANNELS)
    assert merged.classes(2) == [0, 1]
    assert merged.classes(0) == []
    assert merged.groups(2, [1, 0])[0][:, :, 0].tolist() == [[2, 2], [1, 1]]
    assert merged.groups(2, [1, 0])[1].tolist() == [[2, 2], [1, 1]]


@pytest.mark.parametrize("order", ["ordered", "shuffled"])
@pytest.mark.parametrize("max_entries", [1, 4, 11, 17, 29])
def test_memory_is_never_exceeded_and_every_entry_is_a_mean_of_its_class(order, max_entries):
    data = _, sources, targets = stream(order=order)
    vectors = RelevanceVectors(N_CLASSES, N_CHANNELS, N_INPUTS, max_entries * ENTRY + 1)
    assert vectors.max_entries == max_entries
    for _ in feed(vectors, *data):
        assert len(vectors.keys[0]) == len(vectors.sums[0]) == len(vectors.counts[0]) <= max_entries
    found = vectors.compute()
    assert 0 < int(found.known(N_CLASSES).sum()) <= max_entries
    assert max_entries == 29 or not bool(found.known(N_CLASSES).all())
    for channel in range(N_CHANNELS):
        for label in found.classes(channel):
            # An entry may have been opened late, but from then on it holds every image of its class.
            sums, counts = found.groups(channel, [label])
            own = sources[targets == label, channel].double()
            n = int(counts.sum())
            assert n > 0
            torch.testing.assert_close(sums[0].sum(0), own[len(own) - n :].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["ordered", "shuffled"])
def test_entries_that_are_relevant_often_survive(order):
    """Each class has one channel that is relevant for all its images; the others are for one image in ten."""
    n_classes = 40
    _, sources, targets = stream(800, num_classes=n_classes, order=order)
    generator = torch.Generator().manual_seed(1)
    relevance = (torch.rand(800, N_CHANNELS, generator=generator) < 0.1).float()
    relevance[torch.arange(800), targets % N_CHANNELS] = 1
    vectors = run(120, (relevance, sources, targets), num_classes=n_classes)
    found = vectors.compute()
    known = found.known(n_classes)
    assert int(known.sum()) <= 120 < n_classes * N_CHANNELS
    often = torch.zeros_like(known)
    often[torch.arange(n_classes), torch.arange(n_classes) % N_CHANNELS] = True
    assert bool(known[often].all())
    shares = [
        float(found.groups(label % N_CHANNELS, [label])[1].sum()) / int((targets == label).sum())
        for label in range(n_classes)
    ]
    assert min(shares) > 0.5, "an entry may lose a class's first images only"
    assert sum(shares) / n_classes > 0.9


def test_often_means_a_large_share_of_the_class_not_many_images():
    """Small classes have one channel that is relevant for all their images, large ones five for a third of theirs."""
    n_classes = 20
    targets = torch.arange(n_classes).repeat_interleave(torch.tensor([6, 60]).repeat(10))
    generator = torch.Generator().manual_seed(2)
    relevance = (torch.rand(len(targets), N_CHANNELS, generator=generator) < 1 / 3).float()
    small = targets % 2 == 0
    relevance[small] = torch.eye(N_CHANNELS)[targets[small] % N_CHANNELS]
    sources = torch.randn(len(targets), N_CHANNELS, N_INPUTS, generator=generator)
    found = run(60, (relevance, sources, targets), num_classes=n_classes).compute()
    known = found.known(n_classes)
    assert all(known[label, label % N_CHANNELS] for label in range(0, n_classes, 2))


def full_classes(data, max_entries=30, num_classes=8):
    known = run(max_entries, data, num_classes=num_classes).compute().known(num_classes)
    return set(known.all(1).nonzero()[:, 0].tolist())


def test_the_order_of_images_does_not_change_which_classes_are_full():
    relevance, sources, targets = stream(num_classes=8)
    relevance = torch.rand_like(relevance) - 0.97 * (torch.arange(N_CHANNELS) > 0)  # nothing but channel 0, mostly
    found = []
    for order in (targets.sort().indices, targets.sort(descending=True).indices, torch.arange(len(targets))):
        found.append(full_classes((relevance[order], sources[order], targets[order])))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3, "half of thirty entries, five for each class"


def test_full_classes_hold_all_their_images_for_all_channels_though_nothing_is_relevant():
    _, sources, targets = stream()
    found = run(20, (torch.zeros(len(targets), N_CHANNELS), sources, targets)).compute()
    full = found.known(N_CLASSES).all(1)
    assert int(full.sum()) == 2
    assert int(found.known(N_CLASSES).sum()) == 2 * N_CHANNELS
    (label, _) = full.nonzero()[:, 0].tolist()
    mean = sources[targets == label].double().mean(0)
    for channel in range(N_CHANNELS):
        torch.testing.assert_close(found.means(channel, [label])[0], mean[channel], rtol=1e-5, atol=1e-5)


def test_reset_forgets_everything():
    data = stream()
    vectors = run(11, data)
    first = vectors.compute()
    assert not bool(first.known(N_CLASSES).all())
    vectors.reset()
    assert vectors.keys == []
    for _ in feed(vectors, *data):
        pass
    again = vectors.compute()
    assert torch.equal(again.known(N_CLASSES), first.known(N_CLASSES))
    for channel in range(N_CHANNELS):
        classes = first.classes(channel)
        assert torch.equal(again.means(channel, classes), first.means(channel, classes))


@pytest.mark.parametrize("room", [1, 4], ids=["all rows used", "a quarter used"])
def test_rows_that_are_not_used_are_let_go_and_nothing_else(room):
    data = _, sources, targets = stream(num_classes=2)
    vectors = run(2 * N_CHANNELS * room, data, num_classes=2 * room)
    vectors.trim()
    assert [len(state[0]) for state in (vectors.keys, vectors.sums, vectors.counts)] == [2 * N_CHANNELS] * 3
    found = vectors.compute()
    for label in range(2):
        sums, counts = found.groups(3, [label])
        expected, numbers = expected_groups(sources, targets, label, 3)
        torch.testing.assert_close(sums[0], expected, rtol=1e-5, atol=1e-5)
        assert counts[0].tolist() == numbers
