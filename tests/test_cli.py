"""The command line: what it writes, what it says, how it ends."""

import json
import shutil
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_polydis import ChannelSplit, SplitPlan, disentangle, load_from_checkpoint
from lightning_polydis.cli import main
from lightning_polydis.split_state import inferred_groups, split_state_dict
from lightning_polydis.surgery import rebuild_splits
from tests.networks import Classifier, loader, make_images
from tests.sample_reports import sample_report


def some_split(layer, channel, n_inputs, n_concepts=2, seed=0):
    generator = torch.Generator().manual_seed(seed + channel)
    membership = torch.rand(n_concepts, n_inputs, generator=generator)
    return ChannelSplit(layer, channel, [[i, i + 10] for i in range(n_concepts)], membership, directions=[1, -1][:2])


PLAN = SplitPlan([some_split("net.2", 3, 8), some_split("net.2", 0, 8), some_split("net.4", 9, 12)])


@pytest.fixture
def report_file(tmp_path):
    sample_report().save(tmp_path / "report.json")
    return tmp_path / "report.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module after one step, and its checkpoint, which holds an optimizer state."""
    torch.manual_seed(0)
    module, path = Classifier(), tmp_path_factory.mktemp("trained") / "plain.ckpt"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, limit_val_batches=0, **quiet)
    trainer.fit(module, loader())
    trainer.save_checkpoint(path)
    return module.eval(), path


@pytest.fixture
def module(trained):
    return trained[0]


@pytest.fixture
def files(trained, tmp_path):
    """A folder with a checkpoint and a plan."""
    shutil.copy(trained[1], tmp_path / "plain.ckpt")
    PLAN.save(tmp_path / "plan.json")
    return tmp_path


def apply(files, *extra, checkpoint="plain.ckpt", out="split.ckpt"):
    return main(["apply-plan", str(files / checkpoint), str(files / "plan.json"), str(files / out), *extra])


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}  # NaN stands for a split without a ratio
        torch.testing.assert_close(found[key], value, **exact, msg=key)


def test_report_writes_a_page_beside_the_report(report_file, capsys):
    assert main(["report", str(report_file)]) == 0
    page = report_file.with_suffix(".html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "net.layer4.2.conv3" in page
    assert "Wrote" in capsys.readouterr().out


def test_report_writes_where_it_is_told_to(report_file):
    assert main(["report", str(report_file), "-o", str(report_file.parent / "new" / "page.html")]) == 0
    assert (report_file.parent / "new" / "page.html").exists()


def test_report_never_replaces_what_it_reads(report_file, capsys):
    before = report_file.read_bytes()
    assert main(["report", str(report_file), "-o", str(report_file)]) == 1
    assert "a name of its own" in capsys.readouterr().err
    assert report_file.read_bytes() == before


@pytest.mark.parametrize("link", ["symbolic", "hard", "relative"])
def test_report_knows_what_it_reads_through_links(link, report_file, capsys):
    before, output = report_file.read_bytes(), report_file.parent / "page.html"
    if link == "symbolic":
        output.symlink_to(report_file)
    if link == "hard":
        output.hardlink_to(report_file)
    if link == "relative":
        output = report_file.parent / ".." / report_file.parent.name / "report.json"
    assert main(["report", str(report_file), "-o", str(output), "--force"]) == 1
    assert "a name of its own" in capsys.readouterr().err
    assert report_file.read_bytes() == before


def test_report_replaces_pages_but_other_files_only_with_force(report_file, capsys):
    folder = report_file.parent
    (folder / "m.ckpt").write_bytes(b"weights")
    arguments = ["report", str(report_file), "-o", str(folder / "m.ckpt")]
    assert main(arguments) == 1
    assert "`--force`" in capsys.readouterr().err
    assert (folder / "m.ckpt").read_bytes() == b"weights"
    for name in ("old.html", "old.HTM"):
        (folder / name).write_text("old")
        assert main(["report", str(report_file), "-o", str(folder / name)]) == 0
        assert (folder / name).read_text() != "old"
    assert main([*arguments, "--force"]) == 0
    assert (folder / "m.ckpt").read_bytes().startswith(b"<!doctype html>")


def test_show_names_classes_by_number_where_names_are_missing(report_file, capsys):
    content = json.loads(report_file.read_text())
    report_file.write_text(json.dumps({**content, "class_names": content["class_names"][:1]}))
    assert main(["show", str(report_file)]) == 0
    assert "3 polysemantic channels" in capsys.readouterr().out


def test_a_report_with_a_damaged_picture_makes_a_page(report_file):
    content = json.loads(report_file.read_text())
    content["cards"][0]["rows"][0]["images"][0]["jpeg"] = "bm8gcGljdHVyZQ=="
    report_file.write_text(json.dumps(content))
    assert main(["report", str(report_file)]) == 0
    assert "bm8gcGljdHVyZQ==" in report_file.with_suffix(".html").read_text(encoding="utf-8")


def test_show_prints_the_table(report_file, capsys):
    assert main(["show", str(report_file), "--max-rows", "2"]) == 0
    text = capsys.readouterr().out
    assert "3 polysemantic channels" in text
    assert "1 more in the report." in text


def test_show_without_flags_suggests_settings(tmp_path, capsys):
    sample_report(n_flagged=0).save(tmp_path / "report.json")
    assert main(["show", str(tmp_path / "report.json")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 polysemantic channels" in text
    assert "Suggested settings: relevance_threshold=0.03, class_fraction=0." in text


def test_show_makes_do_with_a_file_without_sweep(tmp_path, capsys):
    replace(sample_report(n_flagged=0), _saved_sweeps=None).save(tmp_path / "report.json")
    assert main(["show", str(tmp_path / "report.json")]) == 0
    assert "Run the analysis again" in capsys.readouterr().out


def test_a_lightning_checkpoint_is_split_as_disentangle_splits_the_module(files, module, capsys):
    assert apply(files) == 0
    expected = disentangle(module, PLAN)
    written = torch.load(files / "split.ckpt", weights_only=True)
    assert_same_state(written["state_dict"], expected.state_dict())
    assert "optimizer_states" not in written
    loaded = load_from_checkpoint(Classifier, files / "split.ckpt").eval()
    images, _ = make_images()
    assert torch.equal(loaded(images), expected(images))
    assert loaded.net[2].splits("net.2") == PLAN.of_layer("net.2")
    text = capsys.readouterr().out
    assert "net.2: 2 of 12 channels split; Conv2d, now with 16 rows." in text
    assert "optimizer_states" in text


def test_the_original_checkpoint_stays_as_it_was(files):
    before = (files / "plain.ckpt").read_bytes()
    assert apply(files) == 0
    assert (files / "plain.ckpt").read_bytes() == before


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_plain_state_dicts_are_split_too(files, module, name):
    safetensors = pytest.importorskip("safetensors.torch")
    state = module.state_dict()
    if name.endswith(".pt"):
        torch.save(state, files / name)
    else:
        safetensors.save_file(state, files / name, {"made by": "hand"})
    groups = [] if name.endswith(".pt") else ["--groups", "net.2=1", "--groups", "net.4=1"]
    assert apply(files, *groups, checkpoint=name, out=f"split.{name}") == 0
    path = files / f"split.{name}"
    found = torch.load(path) if name.endswith(".pt") else safetensors.load_file(path)
    expected = disentangle(module, PLAN).state_dict()
    assert_same_state({key: found[key] for key in expected}, expected)  # safetensors orders by itself
    assert len(found) == len(expected)
    if name.endswith(".safetensors"):
        assert b'"made by":"hand"' in path.read_bytes()


def test_groups_are_not_inferred_from_a_file_without_order(files, module, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(module.state_dict(), files / "state.safetensors")
    assert apply(files, checkpoint="state.safetensors", out="split.safetensors") == 1
    assert "--groups net.2=1" in capsys.readouterr().err
    assert not (files / "split.safetensors").exists()


def test_a_prefix_leads_from_the_plans_names_to_the_checkpoints(files, module):
    SplitPlan([some_split("2", 3, 8)]).save(files / "plan.json")
    assert apply(files, "--prefix", "net.") == 0
    expected = disentangle(module, SplitPlan([some_split("net.2", 3, 8)])).state_dict()
    assert_same_state(torch.load(files / "split.ckpt")["state_dict"], expected)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), 6),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), 6),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2), 6),
    "conv3d": (lambda: nn.Conv3d(6, 8, (1, 2, 3), padding=1), 6),
    "half": (lambda: nn.Conv2d(6, 8, 3).half(), 6),
    "double": (lambda: nn.Conv2d(6, 8, 3, dilation=2, bias=False).double(), 6),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_is_split_bit_for_bit(kind):
    torch.manual_seed(0)
    make, n_inputs = LAYERS[kind]
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), make())
    plan = SplitPlan([some_split("2", 5, n_inputs), some_split("2", 1, n_inputs, n_concepts=2)])
    state = split_state_dict(net.state_dict(), plan)
    assert_same_state(state, disentangle(net, plan).state_dict())
    rebuild_splits(net, state)
    net.load_state_dict(state)


def test_more_concepts_in_one_group_than_in_the_other():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 1, groups=3))
    three = ChannelSplit("1", 8, [[0], [1], [2]], torch.rand(3, 4))
    plan = SplitPlan([some_split("1", 0, 4), three, some_split("1", 7, 4)])
    assert_same_state(split_state_dict(net.state_dict(), plan), disentangle(net, plan).state_dict())


def shapes(**sizes):
    return {f"{name.replace('_', '.')}.weight": torch.zeros(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("before", "groups"),
    [
        (shapes(a_conv1=(16, 3, 1, 1)), 1),
        (shapes(a_conv1=(64, 3, 1, 1)), 4),
        (shapes(a_conv1=(64, 3, 1, 1), a_bn=(64,)), 4),
        (shapes(a_conv1=(64, 3, 1, 1), b_conv=(16, 3, 1, 1)), 1),
        (shapes(b_conv=(16, 3, 1, 1), a_conv1=(64, 3, 1, 1)), 4),
    ],
)
def test_groups_are_those_of_the_nearest_layer_before(before, groups):
    assert inferred_groups({**before, "a.conv.weight": torch.zeros(32, 16, 3, 3)}, "a.conv") == groups


@pytest.mark.parametrize(
    "before",
    [
        {},
        shapes(a_conv1=(24, 3, 1, 1)),  # no whole number of groups
        shapes(a_conv1=(48, 3, 1, 1)),  # three groups of 32 channels there cannot be
        shapes(a_squeeze=(16, 8, 1, 1), a_expand1=(64, 16, 1, 1)),  # SqueezeNet: both read the first
    ],
)
def test_groups_that_do_not_show_are_asked_for(before):
    state = {**before, "a.conv.weight": torch.rand(32, 16, 3, 3)}
    plan = SplitPlan([some_split("a.conv", 3, 16)])
    with pytest.raises(ValueError, match=r"How many groups convolution `a.conv` has .* `--groups a.conv=1`"):
        split_state_dict(state, plan)
    assert split_state_dict(state, plan, {"a.conv": 1})["a.conv.expand.weight"].shape[0] == 34


def test_groups_can_be_given(files, module):
    assert apply(files, "--groups", "net.2=1") == 0
    assert_same_state(torch.load(files / "split.ckpt")["state_dict"], disentangle(module, PLAN).state_dict())


def tied(state):
    return {**state, "net.9.weight": state["net.2.weight"]}


@pytest.mark.parametrize(
    ("change", "groups", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "net.2.weight"}, {}, r"got 'net.2'. Closest names: `net.\d`"),
        (lambda s: {**s, "net.2.weight": torch.zeros(12)}, {}, r"`nn.Linear`, but got a weight of shape \[12\]"),
        (lambda s: {**s, "net.2.weight": torch.zeros(12, 8, 3, 3, dtype=torch.int8)}, {}, "torch.int8"),
        (lambda s: {**s, "net.2.weight": torch.zeros(2, 8, 3, 3)}, {}, r"expected a channel in \[0, 2\), but got 3"),
        (lambda s: {**s, "net.2.weight": torch.zeros(12, 4, 3, 3)}, {}, "expected memberships of 4 inputs"),
        (lambda s: {**s, "net.2.weight": torch.zeros(8, 1, 3, 3)}, {}, "is a depthwise convolution"),
        (tied, {}, "weight of layer `net.2` is that of `net.9.weight` too"),
        (dict, {"net.2": 5}, "number of groups that fits layer `net.2` of 12 channels, but got 5"),
        (dict, {"net.3": 2}, "groups of layers in the plan, but got 'net.3'"),
        (lambda s: split_state_dict(s, PLAN), {}, "`net.2` is split already"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused_in_words(change, groups, message, module):
    with pytest.raises(ValueError, match=message):
        split_state_dict(change(module.state_dict()), PLAN, groups)


def test_an_existing_file_is_only_overwritten_with_force(files, capsys):
    (files / "split.ckpt").write_text("precious")
    assert apply(files) == 1
    assert "`--force`" in capsys.readouterr().err
    assert (files / "split.ckpt").read_text() == "precious"
    assert apply(files, "--force") == 0
    assert "state_dict" in torch.load(files / "split.ckpt")


@pytest.mark.parametrize("name", ["plain.ckpt", "plan.json"])
@pytest.mark.parametrize("link", ["none", "symbolic", "hard", "relative"])
def test_what_is_read_is_not_overwritten_even_with_force(name, link, files, monkeypatch, capsys):
    before = (files / name).read_bytes()
    out = name if link == "none" else f"../{files.name}/{name}" if link == "relative" else "out.ckpt"
    if link == "symbolic":
        (files / out).symlink_to(files / name)
    if link == "hard":
        (files / out).hardlink_to(files / name)
    monkeypatch.chdir(files)
    assert main(["apply-plan", "plain.ckpt", "plan.json", out, "--force"]) == 1
    kind = "CHECKPOINT" if name == "plain.ckpt" else "PLAN"
    assert f"Expected OUT to be a file of its own, but got `{out}`, which is {kind}" in capsys.readouterr().err
    assert (files / name).read_bytes() == before


def test_a_failed_write_leaves_what_was_there(files, monkeypatch, capsys):
    (files / "split.ckpt").write_text("precious")

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert apply(files, "--force") == 1
    assert "No space left" in capsys.readouterr().err
    assert (files / "split.ckpt").read_text() == "precious"
    assert sorted(path.name for path in files.iterdir()) == ["plain.ckpt", "plan.json", "split.ckpt"]


class Anything:
    """Not a plain type."""


def test_checkpoints_with_other_objects_need_trust(files, module, capsys):
    torch.save({"state_dict": module.state_dict(), "extra": Anything()}, files / "plain.ckpt")
    assert apply(files) == 1
    error = capsys.readouterr().err
    assert "tests.test_cli.Anything" in error
    assert "`--trust`" in error
    assert apply(files, "--trust") == 0
    assert isinstance(torch.load(files / "split.ckpt", weights_only=False)["extra"], Anything)


BAD = {
    "no report": (["show", "none.json"], "No such file or directory: `none.json`"),
    "no json": (["show", "plain.ckpt"], "but it cannot be read"),
    "another kind": (["report", "plan.json"], r"of kind `lightning_polydis.report`, but got `lightning_polydis.split_"),
    "a directory": (["show", "."], "Is a directory"),
    "no checkpoint": (["apply-plan", "none.ckpt", "plan.json", "out"], "No such file or directory: `none.ckpt`"),
    "no plan": (["apply-plan", "plain.ckpt", "none.json", "out"], "No such file or directory: `none.json`"),
    "report for plan": (["apply-plan", "plain.ckpt", "report.json", "out"], "of kind `lightning_polydis.split_plan`"),
    "text for checkpoint": (["apply-plan", "plan.json", "plan.json", "out"], "cannot be read as a checkpoint"),
    "half a checkpoint": (["apply-plan", "half.ckpt", "plan.json", "out"], "cannot be read as a checkpoint"),
    "a folder": (["apply-plan", ".", "plan.json", "out"], "it is a directory"),
    "no tensors": (["apply-plan", "numbers.pt", "plan.json", "out"], "a state dict, but got a list"),
    "no such layer": (["apply-plan", "plain.ckpt", "other.json", "out"], "got 'net.3'. Closest names: `net."),
    "broken safetensors": (["apply-plan", "bad.safetensors", "plan.json", "out"], "cannot be read as safetensors"),
    "whole as tensors": (["apply-plan", "plain.ckpt", "plan.json", "o.safetensors"], "to be written as .ckpt or .pt"),
    "nothing to split": (["apply-plan", "plain.ckpt", "empty.json", "out"], "splits no channel"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_user_can_mend_is_said_in_one_line(case, files, monkeypatch, capsys):
    arguments, message = BAD[case]
    sample_report().save(files / "report.json")
    SplitPlan([some_split("net.3", 1, 8)]).save(files / "other.json")
    SplitPlan([]).save(files / "empty.json")
    (files / "half.ckpt").write_bytes((files / "plain.ckpt").read_bytes()[:3000])
    (files / "bad.safetensors").write_bytes(b"not tensors")
    torch.save([1, 2], files / "numbers.pt")
    monkeypatch.chdir(files)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("lightning-polydis: error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["show"], "required: IN"),
        (["show", "a", "--max-rows", "0"], "expected a number of at least 1, but got '0'"),
        (["apply-plan", "a", "b", "c", "--groups", "layer"], "expected LAYER=N, but got 'layer'"),
    ],
)
def test_wrong_usage_ends_with_two(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["report", "show", "apply-plan", "exit codes", "split_plan.json"]),
        (["report", "--help"], ["self-contained", "--output"]),
        (["show", "--help"], ["--max-rows"]),
        (["apply-plan", "--help"], ["load_from_checkpoint", "Optimizer states", "--force", "--groups", "--trust"]),
    ],
)
def test_help_explains_itself(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in expected if word not in text] == []


def test_a_damaged_report_is_named(report_file, capsys):
    content = json.loads(report_file.read_text())
    del content["layers"]
    report_file.write_text(json.dumps(content))
    assert main(["report", str(report_file)]) == 1
    assert f"`{report_file}` is damaged" in capsys.readouterr().err
