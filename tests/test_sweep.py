import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_polydis import ChannelDisentanglement, PolysemanticityReport, find_polysemantic_channels
from lightning_polydis.figures import sweep_figure
from lightning_polydis.sweep import LayerSweep, suggest_settings, sweep_markdown
from tests.networks import BottleneckNet, Classifier, conv_relu_net, loader, make_batches, train_briefly

SETTINGS = {"relevance_threshold": 0.02, "class_fraction": 0.4, "calibration_samples": 0, "progress": False}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


def find(net, **settings):
    return find_polysemantic_channels(net, make_batches(), "2", **{**SETTINGS, **settings})


@pytest.mark.parametrize(("method", "threshold"), [("paper", 0.6), ("optimized", 0.6), ("optimized", "auto")])
def test_every_cell_is_what_an_analysis_at_those_settings_finds(net, method, threshold):
    (sweep,) = find(net, method=method, similarity_threshold=threshold).sweeps
    assert sweep.relevance_thresholds == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08])
    assert sweep.class_fractions == [0.25, 0.4, 0.5, 0.75, 0.9]
    assert threshold in sweep.similarity_thresholds
    for row, relevance in enumerate(sweep.relevance_thresholds):
        for column, fraction in enumerate(sweep.class_fractions):
            for level in (0.3, 0.9, threshold) if threshold != "auto" else (0.3, 0.9):
                where = {"relevance_threshold": relevance, "class_fraction": fraction, "similarity_threshold": level}
                summary = find(net, method=method, **where).layers[0]
                place = sweep.similarity_thresholds.index(level)
                assert sweep.n_candidates[row][column] == summary.n_candidates
                assert sweep.n_candidate_pairs[row][column] == summary.n_candidate_pairs
                assert sweep.n_polysemantic[row][column][place] == summary.n_polysemantic
                assert sweep.n_pairs[row][column][place] == summary.n_pairs


def test_the_cell_in_force_is_the_report(net):
    report = find(net)
    sweep, summary = report.sweeps[0], report.layers[0]
    assert summary.n_candidates > 3
    assert sweep.n_candidates[2][1] == summary.n_candidates
    assert sweep.n_polysemantic[2][1][-1] == summary.n_polysemantic
    assert sweep.n_pairs[2][1][-1] == summary.n_pairs


def grid(candidates, flagged, n_channels=20):
    """A sweep of two relevance thresholds and two class fractions at one similarity threshold."""
    pairs = [[10 * value for value in row] for row in candidates]
    flags = [[[value] for value in row] for row in flagged]
    return LayerSweep("x", n_channels, [0.01, 0.03], [0.5, 0.75], [0.5], candidates, pairs, flags, flags)


IN_FORCE = {"method": "optimized", "relevance_threshold": 0.03, "class_fraction": 0.75, "similarity_threshold": 0.5}


def test_settings_that_leave_enough_are_kept():
    suggested = suggest_settings([grid([[9, 8], [7, 3]], [[2, 2], [1, 1]])], IN_FORCE)
    assert suggested.arguments() == IN_FORCE
    assert "3 of 20 channels are candidates, 1 of them flagged: enough" in suggested.reason


def test_a_suggestion_as_text_begins_with_the_settings():
    suggested = suggest_settings([grid([[9, 1], [5, 1]], [[2, 0], [1, 0]], n_channels=1)], IN_FORCE)
    first, *rest = str(suggested).splitlines()
    assert first == "relevance_threshold=0.03, class_fraction=0.5, similarity_threshold=0.5, method='optimized'"
    assert rest == [suggested.reason]
    assert eval(f"dict({first})") == suggested.arguments()


def test_one_candidate_is_told_in_the_singular():
    few = suggest_settings([grid([[9, 8], [1, 0]], [[0, 0], [0, 0]], n_channels=1)], IN_FORCE)
    assert "no setting leaves 3 candidate channels" in few.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_polydis.sweep.ENOUGH_AT_LEAST", 1)
        suggested = suggest_settings([grid([[0, 0], [1, 0]], [[0, 0], [1, 0]], n_channels=1)], IN_FORCE)
    assert "1 of 1 channel is a candidate, 1 of them flagged" in suggested.reason


def test_the_strictest_settings_with_candidates_and_flags_are_suggested():
    suggested = suggest_settings([grid([[9, 8], [5, 1]], [[2, 2], [0, 0]])], IN_FORCE)
    assert suggested.arguments() == {**IN_FORCE, "relevance_threshold": 0.01}
    assert "8 of 20 channels are candidates, 2 of them flagged" in suggested.reason
    assert "it is 1 and 0" in suggested.reason


def test_layers_are_counted_together_and_a_wide_layer_needs_more_candidates():
    two = [grid([[9, 8], [2, 0]], [[2, 2], [1, 0]]), grid([[9, 8], [1, 0]], [[2, 2], [0, 0]])]
    assert suggest_settings(two, IN_FORCE).arguments() == {**IN_FORCE, "class_fraction": 0.5}
    wide = grid([[90, 30], [7, 3]], [[2, 2], [1, 1]], n_channels=500)
    assert suggest_settings([wide], IN_FORCE).arguments() == {**IN_FORCE, "relevance_threshold": 0.01}


def test_a_higher_similarity_threshold_is_suggested_where_nothing_else_helps():
    flags = [[[0, 2], [0, 1]], [[0, 1], [0, 0]]]
    sweep = LayerSweep("x", 20, [0.01, 0.03], [0.5, 0.75], [0.5, 0.9], [[9, 8], [5, 1]], [[9, 8], [5, 1]], flags, flags)
    assert suggest_settings([sweep], IN_FORCE).arguments() == {
        "method": "optimized",
        "relevance_threshold": 0.03,
        "class_fraction": 0.5,
        "similarity_threshold": 0.9,
    }


def test_where_nothing_helps_the_settings_stay_and_the_reason_says_so():
    suggested = suggest_settings([grid([[9, 8], [5, 1]], [[0, 0], [0, 0]])], IN_FORCE)
    assert suggested.arguments() == IN_FORCE
    assert "no setting leaves 3 candidate channels and a flag among them" in suggested.reason


def test_sweeps_are_saved_once_they_were_asked_for(net, tmp_path):
    report = find(net)
    report.save(tmp_path / "before.json")
    with pytest.raises(ValueError, match="loaded from a file that holds no sweep"):
        _ = PolysemanticityReport.load(tmp_path / "before.json").sweeps
    suggested = report.suggest_settings()
    report.save(tmp_path / "after.json")
    loaded = PolysemanticityReport.load(tmp_path / "after.json")
    assert loaded.sweeps == report.sweeps
    assert loaded.suggest_settings() == suggested


def test_the_table_has_a_row_for_each_cell_and_shows_its_numbers(net):
    sweep = find(net).sweeps[0]
    lines = sweep_markdown(sweep).splitlines()
    assert lines[0].split(" | ")[-1] == "flagged at auto |"
    assert len(lines) == 2 + 5 * 5
    cells = [cell.strip() for cell in lines[2 + 2 * 5 + 1].strip("|").split("|")]
    expected = [0.02, 0.4, sweep.n_candidates[2][1], sweep.n_candidate_pairs[2][1], *sweep.n_polysemantic[2][1]]
    assert cells == [f"{value:g}" for value in expected]


def test_the_figure_shows_every_cell_and_frames_the_one_in_force(net):
    report = find(net)
    sweep = report.sweeps[0]
    cells, lines = sweep_figure(sweep, report.settings).axes
    texts = {text.get_position(): text.get_text() for text in cells.texts}
    assert len(texts) == 25
    assert texts[2, 1] == f"{sweep.n_polysemantic[2][1][-1]} / {sweep.n_candidates[2][1]}"
    (frame,) = cells.patches
    assert (round(frame.get_x() + 0.48, 6), round(frame.get_y() + 0.48, 6)) == (2, 1)
    curves = [line for line in lines.lines if line.get_linestyle() == "-"]
    assert list(curves[1].get_ydata()) == sweep.n_polysemantic[2][1][:-1]


def test_tensorboard_gets_table_and_picture_when_the_run_ends(tmp_path):
    torch.manual_seed(0)
    callback = ChannelDisentanglement("net.blocks.1.conv3", relevance_threshold=0.01, class_fraction=0.3)
    logger = TensorBoardLogger(tmp_path)
    trainer = Trainer(
        callbacks=[callback], logger=logger, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.validate(Classifier(train_briefly(BottleneckNet())), loader(), verbose=False)
    events = EventAccumulator(logger.log_dir).Reload()
    tag = "polydis/net.blocks.1.conv3/settings"
    assert tag in events.Tags()["images"]
    text = events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
    suggested = callback.report.suggest_settings()
    settings, reason = str(suggested).splitlines()
    assert f"Suggested: `{settings}`. {reason}" in text
    assert sweep_markdown(callback.report.sweeps[0]) in text
