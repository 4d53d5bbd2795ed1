"""Blocks left out, their influence, and the search, each against models that are built without them."""

import copy

import pytest
import torch
from helpers.models import model_of, tiny_llama

from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.models.pruning.importance import block_influence
from kava_trainer.models.pruning.search import next_token_loss, predicted_tokens, search_layers
from kava_trainer.models.pruning.skipping import skipped
from kava_trainer.utils.errors import BadRequest

FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma3_text": {"head_dim": 8},
    "falcon": {},
    "gpt_neox": {},
}


def batch_of(*lengths, seed=0):
    torch.manual_seed(seed)
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    ids = torch.randint(1, 500, mask.shape) * mask
    answers = torch.tensor([row * width + length - 2 for row, length in enumerate(lengths)])
    return {
        "input_ids": ids, "attention_mask": mask, "answer_index": answers,
        "next_tokens": ids.flatten()[answers + 1],
    }  # fmt: skip


def without(model, blocks):
    """The model built without some blocks."""
    config = copy.deepcopy(model.config)
    kept = [n for n in range(config.num_hidden_layers) if n not in blocks]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[n] for n in kept]
    built = type(model)(config).eval()
    built.load_state_dict(model.state_dict(), strict=False)
    for place, block in enumerate(kept):
        built.model.layers[place].load_state_dict(model.model.layers[block].state_dict())
    return built


@torch.no_grad()
def naive_loss(model, batches):
    total, count = 0.0, 0
    for batch in batches:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        for row in range(len(logits)):
            length = int(batch["attention_mask"][row].sum())
            for place in range(length - 1):
                target = batch["input_ids"][row, place + 1]
                total -= logits[row, place].log_softmax(-1)[target].item()
                count += 1
    return total / count


@pytest.mark.parametrize("blocks", [[1], [0, 3], [2, 3], [0, 1, 2, 3]])
def test_a_model_without_blocks_is_the_one_that_is_built_without_them(blocks):
    model, ids = model_of("llama"), torch.tensor([[3, 7, 11, 2, 9]])
    with torch.no_grad():
        before = model(ids).logits
        with skipped(model, blocks):
            left = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        if len(blocks) < 4:
            torch.testing.assert_close(left, without(model, blocks)(ids).logits)
        else:
            torch.testing.assert_close(left, model.lm_head(model.model.norm(model.model.embed_tokens(ids))))
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_a_forward_that_somebody_put_there_is_put_back():
    model = model_of("llama")
    block, own = model.model.layers[1], model.model.layers[1].forward
    block.forward = own
    with skipped(model, [1]):
        assert vars(block)["forward"] is not own
    assert vars(block)["forward"] is own


@pytest.mark.parametrize("kind", FAMILIES)
def test_blocks_can_be_left_out_of_every_family(kind):
    model, ids = model_of(kind, **FAMILIES[kind]), torch.tensor([[3, 7, 11, 2, 9]])
    with torch.no_grad():
        whole = run_decoder(model, ids)
        with skipped(model, [1, 2]):
            part = run_decoder(model, ids)
    assert part.shape == whole.shape
    assert not torch.allclose(part, whole)


def test_block_influence_is_that_of_the_hidden_states():
    model, batches = tiny_llama(32, 4).train(), [batch_of(7, 4), batch_of(5, seed=1)]
    captured = {}
    model.model.layers[-1].register_forward_hook(lambda block, args, output: captured.update(last=output))
    sums, count = torch.zeros(4), 0
    with torch.no_grad():
        model.eval()
        for batch in batches:
            states = model(
                batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            ).hidden_states
            states = [*states[:-1], captured["last"]]  # Hugging Face's last one is that after the final norm
            for row, length in enumerate(batch["attention_mask"].sum(1)):
                count += int(length)
                for block in range(4):
                    for place in range(length):
                        x, y = states[block][row, place], states[block + 1][row, place]
                        sums[block] += 1 - (x @ y) / (x.norm() * y.norm())
    model.train()
    hooks = [len(block._forward_hooks) for block in model.model.layers]
    assert block_influence(model, batches) == pytest.approx((sums / count).tolist(), rel=1e-4)
    assert model.training
    assert [len(block._forward_hooks) for block in model.model.layers] == hooks


def test_padding_has_no_influence():
    model = model_of("llama")
    alone, padded = batch_of(4), batch_of(4)
    padded["input_ids"] = torch.cat([padded["input_ids"], torch.full((1, 5), 9)], dim=1)
    padded["attention_mask"] = torch.cat([padded["attention_mask"], torch.zeros(1, 5).long()], dim=1)
    assert block_influence(model, [padded]) == pytest.approx(block_influence(model, [alone]), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_the_search_removes_what_brute_force_removes(kind):
    changes = {} if kind == "llama" else {"head_dim": 8}
    model, batches = model_of(kind, **changes), [batch_of(7, 4, 9), batch_of(5, 6, seed=1)]
    expected, removed = [], []
    for _ in range(3):
        left = [block for block in range(4) if block not in removed]
        losses = {block: naive_loss(without(model, [*removed, block]), batches) for block in left}
        best = min(losses, key=losses.get)
        removed.append(best)
        expected.append((best, losses[best]))
    found = search_layers(model, batches, 1, shortlist=False)
    assert [one.block for one in found] == [block for block, _ in expected]
    assert [one.loss for one in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)


def test_the_short_list_tries_all_blocks_on_some_and_the_best_on_all_batches():
    model = tiny_llama(32, 8)
    batches = [batch_of(6, 4, seed=seed) for seed in range(8)]
    counts = []
    model.model.embed_tokens.register_forward_hook(lambda *_: counts.append(1))
    (removal,) = search_layers(model, batches, 7)
    # made-up tokens once, each batch once for its states, 8 blocks on one batch, the best 3 on the other 7
    assert len(counts) == 1 + 8 + 8 * 1 + 3 * 7
    assert removal.loss == pytest.approx(naive_loss(without(model, [removal.block]), batches), rel=1e-4)
    firsts = {block: naive_loss(without(model, [block]), batches[:1]) for block in range(8)}
    best = sorted(firsts, key=firsts.get)[:3]
    assert removal.block == min(best, key=lambda block: naive_loss(without(model, [block]), batches))


def test_the_loss_is_that_of_all_real_tokens():
    model, batch = model_of("llama"), batch_of(7, 4, 9)
    index, tokens = predicted_tokens(batch)
    assert len(tokens) == 6 + 3 + 8
    with torch.no_grad():
        states = run_decoder(model, batch["input_ids"], batch["attention_mask"]).flatten(0, 1)
    loss = next_token_loss(model, states[index], tokens) / len(tokens)
    assert loss == pytest.approx(naive_loss(model, [batch]), rel=1e-5)


def test_a_family_with_several_streams_of_states_is_refused():
    model = model_of(
        "gemma3n_text", head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=512, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
    )  # fmt: skip
    with pytest.raises(BadRequest, match=r"do not turn hidden states .* none of them can be left out"):
        block_influence(model, [batch_of(5)])


def test_a_loss_that_is_no_number_is_told():
    model = model_of("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(BadRequest, match="next-token loss on the training examples is no number"):
        search_layers(model, [batch_of(5)], 2)
