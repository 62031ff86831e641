"""The benchmarks still run, at sizes that measure nothing, and their tables find their way into the README."""

import re
import shlex
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def run_quick(command, monkeypatch, capsys):
    """What a script prints with these arguments, in this process: starting new ones would take most of the time."""
    script, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *options])
    __import__(script.removesuffix(".py")).main()
    return capsys.readouterr().out


def rows_of(text):
    """Cells of the tables' rows, headers left out."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    heads = [place for place, line in enumerate(lines) if set("".join(line)) <= {"-", ":", " ", "|"}]
    return [line for place, line in enumerate(lines) if place not in heads and place + 1 not in heads]


def quick(name):
    import run

    return run.BENCHMARKS[name].quick[0]


def test_overhead(monkeypatch, capsys):
    import validation_overhead

    monkeypatch.setattr(validation_overhead, "peak_memory", lambda *_: 1.0)
    monkeypatch.setattr(validation_overhead, "keep_freed_memory", lambda: None)  # for this process, once and for all
    rows = rows_of(run_quick(quick("overhead"), monkeypatch, capsys))
    assert [row[2] for row in rows] == ["bare", "optimized", "replay-optimized"]
    bare = float(rows[0][5].split()[0])
    assert float(rows[1][7]) == pytest.approx(max(1.10, bare + 0.03), abs=0.006)  # the target


def test_bare_backward_leaves_results_alone(monkeypatch):
    import torch
    import validation_overhead
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 3))
    module, batches = validation_overhead.Classifier(net), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))] * 2
    seen, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: seen.append(grad(*args)) or seen[-1])
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    results = [
        Trainer(accelerator="cpu", callbacks=own, **quiet).validate(
            module, DataLoader(batches, batch_size=None), verbose=False
        )
        for own in ([], [validation_overhead.BareBackward("net.0")])
    ]
    assert results[0] == results[1]
    assert [gradient.shape for (gradient,) in seen] == [(5, 8), (5, 8)]
    assert not [*net._forward_hooks, *net[0]._forward_hooks]


def test_paper_pipeline(monkeypatch, capsys):
    import against_paper_pipeline

    monkeypatch.setattr(against_paper_pipeline, "growth_of_memory", lambda run: 1.0)
    (row,) = rows_of(run_quick(quick("paper-pipeline"), monkeypatch, capsys))
    assert row[1].startswith("1,")
    assert float(row[2].split()[0]) > 0
    assert row[5].startswith("0.0 : ")  # ours writes nothing


def test_growth_exponents():
    from against_paper_pipeline import _exponent

    assert _exponent([10, 20, 40], [1.0, 2.5, 16.0]) == "2.00"
    assert _exponent([7, 7], [1.0, 2.0]) == "-"


def test_split_layers(monkeypatch, capsys):
    rows = rows_of(run_quick(quick("split-layers"), monkeypatch, capsys))
    assert [row[0] for row in rows[-2:]] == ["inference", "training step"]
    assert [len(row) for row in rows] == [3] * 6


def test_dense_merge_computes_the_same():
    import torch
    from split_layers import LAYER, dense_merge, networks, resnet

    original = resnet(quick=True).eval()
    split = networks(original, [5])["5"].get_submodule(LAYER)
    inputs = torch.randn(2, 512, 2, 2)
    expected = original.get_submodule(LAYER)(inputs)
    torch.testing.assert_close(dense_merge(split)(inputs), expected, rtol=1e-4, atol=1e-5)


def test_memory(monkeypatch, capsys):
    import memory

    monkeypatch.setattr(memory, "in_fresh_process", memory.measure)
    (row,) = rows_of(run_quick(quick("memory"), monkeypatch, capsys))
    assert float(row[6]) > 0


def test_memory_formula_is_what_the_states_hold():
    """Tensor by tensor, where process sizes are too coarse."""
    import memory
    import torch
    from torch import nn

    from lightning_polydis.analysis import ChannelAnalysis
    from lightning_polydis.settings import AnalysisSettings

    classes, samples, side = 6, 4, 40
    net = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 12, 3, groups=2), nn.Flatten(), nn.LazyLinear(classes))
    images, targets = torch.randn(48, 3, side, side), torch.arange(48) % classes
    for method in ("optimized", "paper"):
        analysis = ChannelAnalysis(net.eval(), AnalysisSettings("1", method=method, calibration_samples=samples))
        analysis.start_batch((images, targets))
        with torch.no_grad():
            net(images)
        analysis.finish_batch()
        held = sum(
            tensor.untyped_storage().nbytes()
            for metric in analysis._metrics()
            for name in [*metric._defaults, "_slots", "_hits", "_free"]
            for value in [getattr(metric, name, None)]
            for tensor in ([value] if isinstance(value, torch.Tensor) else value or [])
        )
        sizes = {"samples": samples, "method": method, "groups": 2, "offsets": 9, "image_side": side}
        assert sum(memory.bytes_kept(classes, 12, 16, 25, **sizes).values()) == pytest.approx(held, rel=0.02)


def test_memory_formula_keeps_to_the_budget():
    from memory import bytes_kept

    kept = bytes_kept(1000, 2048, 512, 49)
    for name, part in (("samples", 1), ("relevance vectors", 1.1 / 4), ("thumbnails", 1 / 8)):
        assert kept[name] <= part * 2**30
    assert bytes_kept(10, 64, 8, 1, samples=0)["samples"] == 0


def test_every_benchmark_has_its_place_in_the_readme():
    import run

    text = (BENCHMARKS / "README.md").read_text()
    for name, benchmark in run.BENCHMARKS.items():
        for marker in [name, f"{name} on a GPU"] if benchmark.on_gpu else [name]:
            assert "NEW" in run.replaced(text, marker, "NEW")


def test_results_replace_what_stands_between_the_markers():
    from run import replaced

    text = "before\n<!-- a: begin -->\nold\n<!-- a: end -->\nbetween <!-- b: begin -->x<!-- b: end --> after"
    expected = "before\n<!-- a: begin -->\nnew\n<!-- a: end -->\nbetween <!-- b: begin -->x<!-- b: end --> after"
    assert replaced(text, "a", "new") == expected
    assert replaced(expected, "a", "new") == expected
    with pytest.raises(ValueError, match=re.escape("Expected `<!-- c: begin -->`")):
        replaced(text, "c", "new")


def test_section_says_how_and_where():
    from run import section

    text = section(["memory.py --quick"], ["words\n| a |\n| --- |\n| 1 |\nmore"])
    for part in ("python benchmarks/memory.py --quick\n", "cores", "torch "):
        assert part in text
    assert text.endswith("words\n\n| a |\n| --- |\n| 1 |\n\nmore")


@pytest.fixture
def tiny_world(monkeypatch):
    """In place of trained networks."""
    import torch
    from networks import World
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    batches = [(torch.rand(24, 3, 8, 8), torch.arange(24) % 4) for _ in range(2)]
    world = World("tiny", net.eval(), ["2"], batches[:1], batches[1:], list("abcd"), 0.25)
    for name in ("split_quality", "concept_relevance"):
        monkeypatch.setattr(__import__(name), "worlds", lambda root: [world])


def test_split_quality(tiny_world, monkeypatch, capsys):
    rows = rows_of(run_quick("split_quality.py --pairs 3", monkeypatch, capsys))
    assert [row[1] for row in rows[-3:]] == ["paper", "symmetric dominance", "optimized"]
    assert all("nan" not in cell for cell in rows[-1])


def test_concept_relevance(tiny_world, monkeypatch, capsys):
    import concept_relevance
    import split_quality

    def analyse(world, layer):
        return split_quality.analyse(world, layer, 3.0).optimized  # every pair is flagged

    monkeypatch.setattr(concept_relevance, "analyse", analyse)
    rows = rows_of(run_quick("concept_relevance.py", monkeypatch, capsys))
    kinds = list(concept_relevance.ATTRIBUTIONS)
    assert [row[0] for row in rows[: len(kinds)]] == kinds
    assert {row[1] for row in rows[len(kinds) :]} == {"ours", "Norm on merge"}


def test_rounds_begin_with_another_variant_and_the_first_does_not_count():
    from measuring import in_turns, ratios

    order, clock = [], iter(range(100))
    variants = {name: lambda name=name: order.append(name) or float(next(clock)) for name in "ab"}
    seconds = in_turns(variants, repeats=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [3.0, 4.0], "b": [2.0, 5.0]}
    assert ratios(seconds["b"], seconds["a"]) == [2 / 3, 5 / 4]
