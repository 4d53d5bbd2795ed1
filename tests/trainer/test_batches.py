import torch
from helpers.trainers import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operations whose result the host needs before it can go on, so that it has to wait for the device."""


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or boolean:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_a_packed_step_never_waits_for_the_device(tmp_path, tokenizer):
    terms = {"mse_weight": 0.2, "kd_weight": 0.5, "kd_beta": 0.5, "kd_tokens": "all", "layer_mapping": "uniform:2"}
    trainer = make_trainer(tmp_path, tokenizer, projector_anchor="reconstruction", max_steps=3, **terms)
    trainer.train()
    loader = iter(trainer.get_train_dataloader())
    with Waits() as waits:
        batches, counts = trainer.get_batch_samples(loader, 1, trainer.args.device)
        waits.found.clear()  # collating happens in the workers
        for batch in batches:
            trainer.training_step(trainer.model, batch, counts)
    assert waits.found == []
