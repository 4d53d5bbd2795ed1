from pathlib import Path

import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.library import arguments
from helpers.models import tiny_llama
from torch import nn

from kava_trainer.data.collators import DistillationCollator
from kava_trainer.distillation.projector_files import save_projectors
from kava_trainer.runs.pair.layers import with_chosen_layers
from kava_trainer.runs.pair.models import Models


def test_a_new_run_chooses_and_a_resumed_one_keeps(tmp_path, tokenizer, capsys):
    models = Models(tiny_llama(64, 4, seed=1), tiny_llama(32, 2, seed=2), tokenizer)
    data, collator = Dataset.from_list(random_examples(8)), DistillationCollator(tokenizer)

    def chosen(checkpoint: Path | None = None, **changes):
        args = arguments(tmp_path, **{"layer_mapping": "cka", **changes})
        return with_chosen_layers(args, models, data, collator, checkpoint)

    found = chosen().inherited_layers
    assert found == sorted(found)
    assert "layer_mapping cka" in capsys.readouterr().out
    save_projectors(nn.ModuleList(), tmp_path / "projector.pth", {"direction": "none", "pairs": [[1, 2], [2, 2]]})
    with torch.random.fork_rng([]):
        assert chosen(tmp_path).inherited_layers == [2, 2]
    assert "layer_mapping cka" not in capsys.readouterr().out
    assert chosen(layer_mapping="all") is models
    assert chosen(mercator_weight=0.0) is models
