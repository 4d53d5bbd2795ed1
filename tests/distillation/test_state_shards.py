import pickle

import pytest
import torch

from kava_trainer.distillation.state_shards import (
    Shards,
    ShardWriter,
    bytes_per_token,
    decode,
    encode,
    example_key,
    write_shard,
)
from kava_trainer.utils.errors import BadRequest

EXAMPLES = [[1, 2, 3], [7], [4, 5, 6, 7, 8]]


def states_of(examples, width=48, layers=(2, 5), seed=0):
    torch.manual_seed(seed)
    return [{layer: torch.randn(len(ids), width).bfloat16() for layer in layers} for ids in examples]


def write(folder, examples=EXAMPLES, dtype="bfloat16", limit=10**9, **kwargs):
    states = states_of(examples, **kwargs)
    writer = ShardWriter(folder, dtype, "mine", limit)
    for ids, own in zip(examples, states, strict=True):
        writer.add(ids, own)
    writer.flush()
    return states


def outliers(tokens, width):
    """States as language models have them: a few channels are hundreds of times larger than the rest."""
    torch.manual_seed(1)
    states = torch.randn(tokens, width)
    states[:, 7] *= 300
    states[:, 40] += 1000
    return states


@pytest.mark.parametrize("states", [torch.randn(64, 1536), outliers(64, 1536), outliers(64, 50) * 1e-3])
def test_int8_keeps_the_direction_to_a_cosine_of_0_9999_even_with_outliers(states):
    states = states.bfloat16()
    encoded = encode(states, "int8")
    assert encoded["values"].dtype == torch.int8
    assert encoded["values"].shape == states.shape
    restored = decode(**encoded)
    assert restored.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(states.float(), restored.float(), dim=1)
    assert cosine.min() >= 0.9999
    blocks = states.float()[:, :32]
    step = blocks.abs().amax(dim=1, keepdim=True) / 120  # half a step, plus the rounding to bfloat16
    assert ((restored.float()[:, :32] - blocks).abs() <= step).all()


def test_one_scale_a_token_would_not_keep_it():
    states = outliers(64, 1536)
    step = states.abs().amax(dim=1, keepdim=True) / 127
    coarse = (states / step).round() * step
    assert torch.cosine_similarity(states[:, 41:], coarse[:, 41:], dim=1).max() < 0.5


def test_zeros_stay_zeros_in_int8():
    assert torch.equal(decode(**encode(torch.zeros(3, 40), "int8")), torch.zeros(3, 40).bfloat16())


def test_examples_come_back_by_their_tokens_in_any_order(tmp_path):
    states = write(tmp_path, limit=1)
    shards = Shards(tmp_path, "mine")
    assert len(shards.paths) == 3
    for position in (2, 0, 1):
        found = shards.read(EXAMPLES[position], [5, 2])
        assert {layer: part.dtype for layer, part in found.items()} == {2: torch.bfloat16, 5: torch.bfloat16}
        for layer, part in found.items():
            assert torch.equal(part, states[position][layer])
    assert [7] in shards
    assert [8] not in shards
    with pytest.raises(BadRequest, match="lacks an example of 2 tokens"):
        shards.read([9, 9], [2])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("width", [64, 50])
def test_the_size_is_known_beforehand(tmp_path, dtype, width):
    write(tmp_path, [[n] * 100 for n in range(50)], dtype, width=width)
    (path,) = tmp_path.iterdir()
    announced = 5000 * bytes_per_token(width, 2, dtype)
    assert announced <= path.stat().st_size <= announced + 5000


def test_shards_are_read_in_another_process_too(tmp_path):
    states = write(tmp_path)
    again = pickle.loads(pickle.dumps(Shards(tmp_path, "mine")))
    assert torch.equal(again.read(EXAMPLES[0], [2])[2], states[0][2])


def test_a_key_depends_on_every_token_and_their_order():
    keys = [example_key(ids) for ids in ([1, 2, 3], [1, 3, 2], [1, 2], [1, 2, 3, 0], [257, 2, 3])]
    assert len(set(keys)) == 5
    assert example_key((1, 2, 3)) == example_key(torch.tensor([1, 2, 3])) == keys[0]


def test_a_cut_shard_is_refused_by_name(tmp_path):
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BadRequest, match=f"{path.name} is broken"):
        Shards(tmp_path, "mine")


def test_a_changed_byte_is_found_and_the_file_named(tmp_path):
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    shards = Shards(tmp_path, "mine")
    with pytest.raises(BadRequest, match=rf"{path.name} is broken \(the checksum of \S+ differs\). Delete it"):
        shards.verify(shards.paths)


def test_a_sound_cache_passes_and_another_teachers_shard_does_not(tmp_path):
    write(tmp_path)
    shards = Shards(tmp_path, "mine")
    shards.verify(shards.paths)
    write_shard(tmp_path, [1], states_of([[5]]), "bfloat16", "another")
    with pytest.raises(BadRequest, match="holds the states of another teacher than the rest of its folder"):
        shards.refresh()
