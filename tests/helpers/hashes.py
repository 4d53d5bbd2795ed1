"""Weights in one word, to be compared bit for bit."""

import hashlib

import torch

from kava_trainer.distillation.projector_files import load_projectors


def weight_hash(module):
    return state_hash(module.state_dict())


def state_hash(state):
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def final_hash(folder):
    """Of the student's and the projector's weights."""
    digest = hashlib.sha256((folder / "out" / "final_student" / "model.safetensors").read_bytes())
    for tensor in load_projectors(folder / "out" / "final_projector.pth").state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
