"""What a run leaves behind: history, cards and the page, also after it was interrupted."""

import gc
import inspect
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_polydis import ChannelDisentanglement, PolysemanticityReport
from lightning_polydis.cards import EpochEntry, thinned
from tests.networks import BottleneckNet, Classifier, loader, train_briefly

LAYER = "net.blocks.1.conv3"
SETTINGS = {"relevance_threshold": 0.001, "class_fraction": 0.1, "similarity_threshold": 0.9}


def trained(tmp_path, epochs, **kwargs):
    """A callback after so many epochs, and the trainer."""
    torch.manual_seed(0)
    callback = ChannelDisentanglement(LAYER, dirpath=tmp_path / "out", **SETTINGS)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(BottleneckNet()), loader(), loader(seed=1), **kwargs)
    return callback, trainer


def test_each_analysed_epoch_is_remembered(tmp_path):
    callback, _ = trained(tmp_path, 3)
    history = callback.report.history
    assert [(entry.epoch, entry.layer) for entry in history] == [(0, LAYER), (1, LAYER), (2, LAYER)]
    assert [entry.step for entry in history] == sorted({entry.step for entry in history})
    last, summary = history[-1], callback.report.layers[0]
    assert (last.n_polysemantic, last.mean_cosine) == (summary.n_polysemantic, summary.mean_cosine)
    assert last.channels == {found.channel: found.cosine_similarity for found in callback.report.channels}


def test_a_resumed_run_goes_on_with_the_history(tmp_path):
    _, trainer = trained(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    knows = "weights_only" in inspect.signature(pl.Trainer.fit).parameters
    callback, _ = trained(tmp_path, 4, ckpt_path=tmp_path / "last.ckpt", **{"weights_only": True} if knows else {})
    assert [entry.epoch for entry in callback.report.history] == [0, 1, 2, 3]


def test_another_run_starts_another_history(tmp_path):
    callback, trainer = trained(tmp_path, 2)
    trainer.validate(trainer.lightning_module, loader(seed=1), verbose=False)
    assert len(callback.report.history) == 1


def test_files_hold_cards_overviews_and_history(tmp_path):
    callback, _ = trained(tmp_path, 2)
    loaded = PolysemanticityReport.load(tmp_path / "out" / "report.json")
    assert [card.channel for card in loaded.cards] == [card.channel for card in callback.report.cards]
    assert loaded.cards[0].rows[0].images
    assert loaded.overviews == callback.report.overviews
    assert loaded.history == callback.report.history
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Channel {loaded.cards[0].channel}" in page


def test_without_logger_and_folder_nothing_of_this_is_worked_out(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_polydis.report.build_card", lambda *_: pytest.fail("nobody asked for cards"))
    callback = ChannelDisentanglement(LAYER, **SETTINGS)
    trainer = pl.Trainer(
        callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.validate(Classifier(train_briefly(BottleneckNet())), loader(), verbose=False)
    assert callback.report.channels


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    with pytest.warns(UserWarning, match="`report.html` could not be written to"):
        callback, _ = trained(tmp_path, 1)
    assert (tmp_path / "out" / "split_plan.json").exists()
    assert callback.report is not None


@pytest.mark.parametrize("method", ["optimized", "paper"])
def test_relevance_vectors_go_to_the_projector(method, tmp_path):
    torch.manual_seed(0)
    net = train_briefly(BottleneckNet())
    callback = ChannelDisentanglement(LAYER, embeddings=True, method=method, **SETTINGS)
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(callbacks=[callback], logger=logger, accelerator="cpu", enable_progress_bar=False)
    trainer.validate(Classifier(net), loader(), verbose=False)
    folder = next(Path(logger.log_dir).rglob("tensors.tsv")).parent
    vectors = [list(map(float, line.split("\t"))) for line in (folder / "tensors.tsv").read_text().splitlines()]
    header, *rows = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert header == ["channel and class", "channel", "class", "concept"]
    table = callback.report.relevance_vectors(LAYER)
    assert len(vectors) == len(rows) == sum(len(found.classes) for found in callback.report.channels) > 2
    assert torch.tensor(vectors).allclose(table.vectors, rtol=1e-4, atol=1e-6)
    first = callback.report.channels[0]
    assert rows[0] == [f"{first.channel}: {first.concepts[0][0]}", str(first.channel), str(first.concepts[0][0]), "1"]
    similarity = torch.nn.functional.cosine_similarity(*table.vectors[: len(first.classes)][[0, -1]], dim=0)
    assert float(similarity) >= first.cosine_similarity - 1e-4


def test_vectors_of_a_file_or_an_unknown_layer(tmp_path):
    callback, _ = trained(tmp_path, 1)
    with pytest.raises(ValueError, match=f"whose vectors are known .{LAYER}., but got 'net.fc'"):
        callback.report.relevance_vectors("net.fc")
    loaded = PolysemanticityReport.load(tmp_path / "out" / "report.json")
    with pytest.raises(ValueError, match="none, as this report was loaded from a file"):
        loaded.relevance_vectors(LAYER)


def test_what_a_fit_has_left_stays(tmp_path):
    _, trainer = trained(tmp_path, 2)
    before = (tmp_path / "out" / "report.json").read_text()
    trainer.test(trainer.lightning_module, loader(seed=2), verbose=False)
    assert (tmp_path / "out" / "report.json").read_text() == before
    assert len(PolysemanticityReport.load(tmp_path / "out" / "test.report.json").history) == 1
    assert (tmp_path / "out" / "test.report.html").exists()


def test_our_own_failures_leave_the_rest(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no card today")

    monkeypatch.setattr("lightning_polydis.report.build_card", fails)
    with pytest.warns(UserWarning, match="no card today"):
        trained(tmp_path, 1)
    assert (tmp_path / "out" / "split_plan.json").exists()


def test_histories_do_not_grow_without_end():
    entries = [EpochEntry(epoch, epoch, layer, 0, 1.0) for epoch in range(3000) for layer in ("a", "b")]
    history = []
    for entry in entries:
        history = thinned([*history, entry])
    assert len(history) <= 2 * 200
    assert [history[0].epoch, history[-1].epoch] == [0, 2999]
    assert {entry.layer for entry in history} == {"a", "b"}


def n_networks():
    return sum(type(one) is BottleneckNet for one in gc.get_objects())


def test_no_batch_and_no_copy_outlive_an_epoch(tmp_path):
    """Whether or not Python's garbage collector comes by."""
    alive = []

    class Watched(Classifier):
        def validation_step(self, batch, batch_idx):
            alive.append(weakref.ref(batch[0]))
            super().validation_step(batch, batch_idx)

    module = Watched(train_briefly(BottleneckNet()))
    gc.collect()
    before = n_networks()
    gc.disable()
    try:
        callback = ChannelDisentanglement(LAYER, attribution="epsilon_plus", **SETTINGS)
        trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False)
        trainer.validate(module, loader(), verbose=False)
        assert callback.report.channels
        del trainer
        assert [reference() for reference in alive].count(None) == len(alive) == 3
        assert n_networks() <= before
    finally:
        gc.enable()
