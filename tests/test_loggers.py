"""What the loggers of a run get: the real packages where they work offline, small fakes of the others."""

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch.utilities.rank_zero as rank_zero
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_polydis import ChannelDisentanglement, loggers
from lightning_polydis.logger_adapters import adapter_of
from lightning_polydis.loggers import final_scalars, log_report, log_results
from tests.networks import BottleneckNet, Classifier, loader, train_briefly
from tests.sample_reports import sample_report

LAYER = "net.layer4.2.conv3"
PREFIX = f"polydis/{LAYER}"
OVERVIEWS = ["history", "quality", "relevance", "settings", "similarities"]
FINAL = ["final_auroc", "final_distortion", "final_leak", "final_n_polysemantic"]
COLUMNS = ["channel", "concepts", "cosine", "reliability", "clear", "distortion", "leak", "spurious", "auroc"]


@pytest.fixture(scope="module")
def report():
    return sample_report(1)


class Fake(Logger):
    """Keeps what it is given; the tests name classes that inherit from it like Lightning's."""

    def __init__(self):
        self.metrics, self.experiment = [], None

    name, version = "fake", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.append((metrics, step))


class NeverDrawn(Fake):
    """A logger that takes numbers only."""


def events_of(logger):
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()


def texts_of(events, tag):
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


# ------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_everything_under_fixed_tags(tmp_path):
    pytest.importorskip("matplotlib")
    logger, report = TensorBoardLogger(tmp_path), sample_report(8)
    log_results([logger], report, 30)
    events = events_of(logger)
    tags = [f"{PREFIX}/{name}" for name in [*(f"card_{rank}" for rank in range(1, 7)), *OVERVIEWS]]
    assert sorted(events.Tags()["images"]) == tags, "six cards, however many there are"
    assert [event.step for event in events.Images(tags[0])] == [30]
    assert sorted(tag for tag in events.Tags()["tensors"]) == [
        f"{PREFIX}/overview/text_summary",
        f"{PREFIX}/settings/text_summary",
    ]
    assert sorted(events.Tags()["scalars"]) == [f"{PREFIX}/{name}" for name in FINAL]
    widths = [event.width for tag in tags for event in events.Images(tag)]
    assert max(widths) <= 990, "or TensorBoard cuts them off"


def test_the_table_after_an_epoch_has_no_quality_and_no_picture(report, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_report([logger], report, 10)
    events = events_of(logger)
    assert events.Tags()["images"] == []
    (text,) = texts_of(events, f"{PREFIX}/overview")
    assert "| channel | concepts | cosine | reliability | clear |" in text


def test_the_table_of_other_settings_holds_the_sweeps_own_numbers():
    report = sample_report(1)
    sweep = replace(report.sweeps[0], relevance_thresholds=[0.0123456789, 0.03, 0.06])
    table = loggers._sweep_table(report, sweep)
    assert table.columns[-2:] == ["flagged at 0.5", "flagged at auto"]
    assert table.rows[0] == [0.0123456789, 0.5, 3, 9, 1, 2]
    assert all(isinstance(value, int) for row in table.rows for value in row[2:])
    assert "| 0.0123457 | 0.5 | 3 | 9 | 1 | 2 |" in table.markdown


def test_the_table_breaks_concepts_into_lines_and_cuts_names(tmp_path):
    names = ["a|b <i>", *(f"a very long name of a class of sailing boats {index}" for index in range(1, 10))]
    logger, report = TensorBoardLogger(tmp_path), sample_report(25, class_names=names)
    log_report([logger], report, 10)
    (text,) = texts_of(events_of(logger), f"{PREFIX}/overview")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 20
    assert "5 more in the report." in text
    cells = [row.replace("\\|", "").split("|")[2].strip().split("<br>") for row in rows]
    assert {len(lines) for lines in cells} == {2}
    assert max(len(line) for lines in cells for line in lines) <= 36 + len("&lt;&gt;")
    assert "a\\|b &lt;i&gt;" in text
    assert "<i>" not in text
    assert "\n\n- 2 of 10 classes had no images" in text, "markdown wants an empty line before a list"


def test_each_layer_has_tags_of_its_own(tmp_path):
    logger, report = TensorBoardLogger(tmp_path), sample_report(2, layers=("a.conv", "b.conv"))
    log_report([logger], report, 10)
    events = events_of(logger)
    for layer, other in (("a.conv", "b.conv"), ("b.conv", "a.conv")):
        (text,) = texts_of(events, f"polydis/{layer}/overview")
        assert f"{layer}: 2 of 64 channels polysemantic" in text
        assert other not in text


def test_without_matplotlib_tables_have_to_do(report, monkeypatch, tmp_path, recwarn):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    logger = TensorBoardLogger(tmp_path)
    log_results([logger], report, 30)
    events = events_of(logger)
    assert events.Tags()["images"] == []
    assert len(events.Tags()["tensors"]) == 2
    assert not [warning for warning in recwarn if "could not be written" in str(warning.message)]


def test_a_report_without_cards_overviews_and_history_is_logged_as_far_as_it_goes(tmp_path):
    pytest.importorskip("matplotlib")
    bare = sample_report(0, epochs=0)
    object.__setattr__(bare, "_saved_overviews", [])
    logger = TensorBoardLogger(tmp_path)
    log_results([logger], bare, 30)
    assert events_of(logger).Tags()["images"] == [f"{PREFIX}/settings"]


def test_a_run_logs_tables_each_epoch_and_pictures_at_its_end(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    callback = ChannelDisentanglement("net.blocks.1.conv3", relevance_threshold=0.01, class_fraction=0.3)
    board, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="csv", version=0)
    trainer = Trainer(
        callbacks=[callback],
        logger=[board, table],
        max_epochs=2,
        limit_train_batches=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Classifier(train_briefly(BottleneckNet())), loader(), loader())
    prefix, events = "polydis/net.blocks.1.conv3", events_of(board)
    assert len(callback.report.channels) > 0
    first, second, last = texts_of(events, f"{prefix}/overview")
    assert "distortion" not in first + second
    assert "| distortion | leak |" in last
    steps = {event.step for tag in events.Tags()["images"] for event in events.Images(tag)}
    assert steps == {trainer.global_step}
    assert {f"{prefix}/quality", f"{prefix}/settings"} <= set(events.Tags()["images"])
    with open(tmp_path / "csv/version_0/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = final_scalars(callback.report)
    for name in FINAL:
        (value,) = [float(row[f"{prefix}/{name}"]) for row in rows if row[f"{prefix}/{name}"]]
        assert value == pytest.approx(expected[f"{prefix}/{name}"])


# ---------------------------------------------------------------------------------------- other real loggers


def test_csv_gets_the_final_figures(report, tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version=0)
    log_results([logger], report, 30)
    logger.finalize("success")
    with open(tmp_path / "csv/version_0/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert {name: float(row[name]) for name in row if name != "step"} == pytest.approx(final_scalars(report))
    assert row["step"] == "30"


def test_mlflow_gets_tables_as_csv_and_pictures(report, monkeypatch, tmp_path):
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants a database, which takes more packages
    logger = MLFlowLogger("polydis", tracking_uri=f"file:{tmp_path}/mlruns")
    for step in (10, 20):
        log_report([logger], report, step)
    log_results([logger], report, 30)
    (folder,) = (tmp_path / "mlruns").glob(f"*/{logger.run_id}/artifacts/{PREFIX}")
    pictures = ["card_1.png", *(f"{name}.png" for name in OVERVIEWS)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*pictures, "overview.csv", "settings.csv"])
    header, *rows = csv.reader((folder / "overview.csv").read_text().splitlines())
    assert (header, len(rows)) == (COLUMNS, 1), "one table, not one below the other"
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == pytest.approx(final_scalars(report))


def test_wandb_gets_tables_and_pictures(report, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="W&B is not installed")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="polydis")
    try:
        log_report([logger], report, 10)
        log_results([logger], report, 30)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    media = tmp_path / "wandb"
    pictures = {path.name.split("_")[0] for path in media.glob(f"offline-run-*/files/media/images/{PREFIX}/*.png")}
    assert pictures == {"card", *OVERVIEWS}
    tables = sorted(media.glob(f"offline-run-*/files/media/table/{PREFIX}/overview_table_*.table.json"))
    contents = [json.loads(path.read_text()) for path in tables]
    assert [content["columns"] for content in contents] == [COLUMNS[:5], COLUMNS]
    assert contents[1]["data"][0][2] == report.channels[0].cosine_similarity, "a number, not a text"
    assert summary[f"{PREFIX}/final_leak"] == pytest.approx(final_scalars(report)[f"{PREFIX}/final_leak"])


# ------------------------------------------------------------------------------------------------------- fakes


def test_comet_gets_tables_at_the_end_and_pictures(report):
    pytest.importorskip("matplotlib")

    class CometLogger(Fake):
        pass

    calls = []
    logger = CometLogger()
    logger.experiment = SimpleNamespace(
        log_table=lambda filename, tabular_data, headers: calls.append((filename, headers, tabular_data)),
        log_figure=lambda figure_name, figure, step: calls.append((figure_name, type(figure).__name__, step)),
    )
    log_report([logger], report, 10)
    assert calls == [], "each table would be one more file"
    log_results([logger], report, 30)
    tables = {name: rest for name, *rest in calls if name.endswith(".csv")}
    assert list(tables) == [f"{PREFIX}/overview.csv", f"{PREFIX}/settings.csv"]
    assert tables[f"{PREFIX}/overview.csv"][0] == COLUMNS
    assert tables[f"{PREFIX}/overview.csv"][1][0][0] == report.channels[0].channel
    figures = [call for call in calls if not call[0].endswith(".csv")]
    assert sorted(figures) == [(f"{PREFIX}/{name}", "Figure", 30) for name in ["card_1", *OVERVIEWS]]


def test_neptune_gets_uploads(report, monkeypatch):
    pytest.importorskip("matplotlib")

    class NeptuneLogger(Fake):
        pass

    uploads = {}

    class Run:
        def __getitem__(self, path):
            return SimpleNamespace(upload=lambda content: uploads.update({path: content}))

    file = SimpleNamespace(from_content=lambda content, extension: (extension, content))
    monkeypatch.setitem(sys.modules, "neptune", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "neptune.types", SimpleNamespace(File=file))
    logger = NeptuneLogger()
    logger.experiment = Run()
    log_results([logger], report, 30)
    extension, content = uploads.pop(f"{PREFIX}/overview_table")
    assert (extension, content.splitlines()[0]) == ("csv", ",".join(COLUMNS))
    del uploads[f"{PREFIX}/settings_table"]
    assert sorted(uploads) == [f"{PREFIX}/{name}" for name in ["card_1", *OVERVIEWS]]
    assert {type(figure).__name__ for figure in uploads.values()} == {"Figure"}


def test_a_class_that_inherits_from_a_known_one_is_treated_like_it(tmp_path):
    class Mine(TensorBoardLogger):
        pass

    assert adapter_of(Mine(tmp_path)) is adapter_of(TensorBoardLogger(tmp_path)) is not None


def test_nothing_is_drawn_or_counted_that_no_logger_takes(report, monkeypatch):
    monkeypatch.setattr(loggers, "_items", lambda report: pytest.fail("made for nobody"))
    logger = NeverDrawn()
    log_report([logger], report, 10)
    log_results([logger], report, 30)
    assert logger.metrics == [(final_scalars(report), 30)]
    log_results([], report, 30)


def test_only_one_process_writes(report, monkeypatch):
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 1)
    logger = NeverDrawn()
    log_results([logger], report, 30)
    assert logger.metrics == []


def test_a_logger_that_fails_is_one_warning_and_the_others_go_on(report, tmp_path):
    class CometLogger(Fake):
        @property
        def experiment(self):
            calls.append(1)
            raise ConnectionResetError("no route to host")

        @experiment.setter
        def experiment(self, value):
            pass

    calls = []
    other = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="to the loggers: CometLogger: ConnectionResetError: no route to host"):
        log_results([CometLogger(), other], report, 30)
    assert len(calls) == 1, "it is not asked again for each of the items"
    assert f"{PREFIX}/overview/text_summary" in events_of(other).Tags()["tensors"]


def test_a_logger_that_refuses_numbers_is_a_warning(report, monkeypatch):
    def refuse(self, metrics, step=None):
        raise ValueError("not these")

    monkeypatch.setattr(NeverDrawn, "log_metrics", refuse)
    with pytest.warns(UserWarning, match="NeverDrawn: ValueError: not these"):
        log_results([NeverDrawn()], report, 30)


def test_a_mistake_of_ours_is_not_blamed_on_the_logger(report, monkeypatch, tmp_path):
    def broken(*args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(loggers, "_overview_table", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        log_report([TensorBoardLogger(tmp_path)], report, 10)


def test_final_figures_are_means_over_the_splits_of_a_layer():
    report = sample_report(3, layers=("a.conv", "b.conv"))
    own = [quality for quality in report.quality if quality.layer == "b.conv"]
    scalars = final_scalars(report)
    assert scalars["polydis/b.conv/final_n_polysemantic"] == 3
    assert scalars["polydis/b.conv/final_leak"] == pytest.approx(sum(part.mean("leak") for part in own) / 3)
