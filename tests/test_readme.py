import re
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from tests.networks import BottleneckNet, Classifier, loader, train_briefly

README = Path(__file__).parent.parent / "README.md"


class Resnet(nn.Module):
    """Has a layer of the name that the README uses."""

    def __init__(self):
        super().__init__()
        body = train_briefly(BottleneckNet())
        self.stem, self.fc = body.stem, body.fc
        self.layer4 = nn.Sequential(nn.Identity(), body.blocks[0], body.blocks[1])

    def forward(self, x):
        return self.fc(self.layer4(self.stem(x)).mean((2, 3)))


def test_every_code_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "pl": pl,
        "module": Classifier(Resnet()),
        "model": Resnet(),
        "train_loader": loader(),
        "val_loader": loader(),
        "other_loader": loader(seed=5),
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 6
    for block in blocks:
        # The little network of the test has other thresholds than an ImageNet network.
        block = block.replace(", split=True)", ", split=True, relevance_threshold=0.001, class_fraction=0.1)")
        block = block.replace(
            ", progress=False)\nsplit_model",
            ", progress=False, relevance_threshold=0.001, class_fraction=0.1, similarity_threshold=0.9)\nsplit_model",
        )
        exec(block, names)
    assert len(names["report"].plan) > 0
    torch.testing.assert_close(names["original_layer"].weight, names["model"].layer4[2].conv3.weight, rtol=0, atol=0)


def test_both_commands_are_named():
    assert "make demo" in README.read_text()
    assert "make test" in README.read_text()


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README.read_text())
    assert len(links) > 20
    assert [link for link in links if not (README.parent / link).exists()] == []
