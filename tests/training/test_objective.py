from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import IGNORED, Rows, read_split
from qlora_core.modeling.fusing import fused
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.packing import packed_attention
from qlora_core.training.collation import collate, common_prefix, pack
from qlora_core.training.objective import LossFunction
from tests.tiny import small_model

CPU = torch.device("cpu")


def adapted(folder):
    """A base whose adapter is not zero, so that all gradients are at work."""
    model = attach_adapter(load_base(folder), AdapterConfig(rank=4), seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def transformers_loss(model, rows: Rows, chunk) -> torch.Tensor:
    """Mean loss of padded rows with an attention mask, as transformers computes it."""
    lengths = torch.tensor(rows.lengths[chunk])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids, labels = torch.zeros(mask.shape).long(), torch.full(mask.shape, IGNORED)
    for place, row in enumerate(chunk):
        ids[place, : lengths[place]] = torch.tensor(rows.input_ids(row))
        labels[place, : lengths[place]] = torch.tensor(rows.labels(row))
    return model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("fast", [False, True], ids=["padded", "packed and fused"])
@pytest.mark.parametrize("base", ["nf4_base", "float_base"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(base, fast, dataset, request):
    model = adapted(request.getfixturevalue(base))
    rows, chunk = read_split(dataset, "train"), np.array([0, 3, 5, 7])
    num_supervised = int(rows.num_supervised[chunk].sum())
    loss_function = LossFunction(model)
    with ExitStack() as stack:
        if fast:
            loss_function.try_out(rows, CPU)
            assert loss_function.packs
            stack.enter_context(packed_attention(model))
            assert len(stack.enter_context(fused(model, 10**9)).base_layers) == 14
        loss = loss_function(loss_function.batch(rows, chunk, CPU)) / num_supervised
        loss.backward()
    ours = gradients(model)

    model.zero_grad()
    theirs = transformers_loss(model, rows, chunk)
    theirs.backward()

    assert_close(loss, theirs, rtol=1e-5, atol=0)
    for name, expected in gradients(model).items():
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_loss_is_a_sum_so_splitting_a_batch_changes_nothing(float_base, dataset):
    model, rows = adapted(float_base), read_split(dataset, "train")
    loss = LossFunction(model)

    whole = loss(collate(rows, np.arange(8), CPU))
    parts = sum(loss(collate(rows, chunk, CPU)) for chunk in np.array_split(np.arange(8), 5))

    assert_close(whole, parts, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 8}),
        ("Granite", {"logits_scaling": 7.0, "embedding_multiplier": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_what_a_model_does_to_its_logits_is_kept(kind, settings, frozen, dataset):
    model = small_model(kind, **settings).eval().requires_grad_(not frozen)
    rows = read_split(dataset, "train")
    batch = collate(rows, np.arange(4), CPU)

    loss = LossFunction(model)
    total = loss(batch)

    num_supervised = int(rows.num_supervised[:4].sum())
    theirs = transformers_loss(model, rows, np.arange(4)) * num_supervised
    assert_close(total, theirs, rtol=1e-5, atol=0)
    said = "does more to its logits"
    assert [said in note for note in loss.notes] == [True] * (frozen and kind != "GPT2")


def test_without_logits_the_loss_is_the_same(float_base, dataset):
    model, rows = adapted(float_base), read_split(dataset, "train")
    batch = collate(rows, np.arange(8), CPU)
    by_logits, without = LossFunction(adapted(float_base)), LossFunction(model)
    by_logits._fuses_head = False

    expected, found = by_logits(batch), without(batch)
    expected.backward()
    found.backward()

    assert without._fuses_head
    assert without.notes == []
    assert_close(found, expected, rtol=1e-6, atol=0)
    theirs = gradients(by_logits.model)
    for name, gradient in gradients(model).items():
        assert (gradient - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


def test_a_model_that_does_not_call_its_head_gets_full_logits_and_says_so(float_base, dataset):
    class Tied(torch.nn.Module):
        """Multiplies by the embeddings itself, as some models do."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, use_cache):
            hidden = self.inner.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            logits = hidden @ self.inner.model.embed_tokens.weight.T
            return torch.nn.Module() if logits is None else _Output(logits)

    class _Output:
        def __init__(self, logits):
            self.logits = logits

    inner, rows = load_base(float_base), read_split(dataset, "train")
    loss = LossFunction(Tied(inner))
    batch = collate(rows, np.arange(4), CPU)

    first, second = loss(batch), loss(batch)

    assert_close(first, LossFunction(inner)(batch), rtol=1e-5, atol=0)
    assert_close(first, second)
    assert len(loss.notes) == 1
    assert "does not call its output head" in loss.notes[0]


def test_rows_without_a_supervised_token_cost_nothing(float_base):
    ids, labels = np.arange(3, dtype=np.int32), np.full(3, IGNORED, np.int32)
    rows = Rows(ids, labels, np.array([0, 3]))

    loss = LossFunction(load_base(float_base))(collate(rows, np.array([0]), CPU))

    assert float(loss) == 0.0


def rows_of(*pairs: tuple[list[int], int]) -> Rows:
    """Rows of tokens, each supervised from some place on."""
    ids = [np.array(tokens, np.int32) for tokens, _ in pairs]
    labels = [np.where(np.arange(len(tokens)) < first, IGNORED, tokens) for tokens, first in pairs]
    ends = np.cumsum([0, *(len(row) for row in ids)])
    return Rows(np.concatenate(ids), np.concatenate(labels).astype(np.int32), ends)


COMMON = [11, 12, 13, 14, 15, 16]


def test_a_shared_prefix_ends_before_rows_differ_and_before_anything_is_predicted():
    both = np.arange(2)

    differing = rows_of(([*COMMON, 20, 21], 7), ([*COMMON, 30, 31, 32], 8))
    supervised = rows_of(([*COMMON, 20, 21], 5), ([*COMMON, 20, 31], 7))
    whole = rows_of((COMMON, 9), ([*COMMON, 20], 6))

    assert common_prefix(differing, both) == 6
    assert common_prefix(supervised, both) == 4  # token 5 is predicted at position 4
    assert common_prefix(whole, both) == 5  # each row keeps a token of its own
    assert common_prefix(differing, both[:1]) == 0


@pytest.mark.parametrize("base", ["nf4_base", "float_base"])
def test_computing_a_shared_prefix_once_changes_neither_loss_nor_gradients(base, request):
    random = np.random.default_rng(0)
    rows = rows_of(
        *(([*COMMON, *random.integers(10, 40, n)], len(COMMON) + 2) for n in (5, 9, 4, 12))
    )
    chunk = np.arange(4)
    model = adapted(request.getfixturevalue(base))
    loss_function = LossFunction(model)

    with packed_attention(model), fused(model, 10**9):
        batch = pack(rows, chunk, CPU, shares_prefix=True)
        loss = loss_function(batch)
        loss.backward()
    ours = gradients(model)
    model.zero_grad()
    theirs = transformers_loss(model, rows, chunk) * int(rows.num_supervised.sum())
    theirs.backward()

    assert batch.input_ids_BT.shape == (1, 6 + 5 + 9 + 4 + 12)
    assert_close(loss, theirs, rtol=1e-5, atol=0)
    for name, expected in gradients(model).items():
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 6}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("Qwen3", {"head_dim": 16}),
        ("Gemma2", {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0}),
        ("Gemma3Text", {"head_dim": 16, "sliding_window": 6}),
        ("Phi", {}),
        ("Phi3", {}),
        ("Olmo2", {}),
        ("Granite", {"logits_scaling": 7.0}),
        ("SmolLM3", {}),
    ],
)
def test_rows_of_common_architectures_are_packed_to_the_same_loss(kind, settings, dataset):
    model = small_model(kind, **settings).eval()
    rows = read_split(dataset, "train")
    loss = LossFunction(model)

    loss.try_out(rows, CPU)
    with packed_attention(model):
        total = loss(loss.batch(rows, np.arange(8), CPU))

    theirs = transformers_loss(model, rows, np.arange(8)) * int(rows.num_supervised[:8].sum())
    assert loss.notes == []
    assert_close(total, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mamba", {"state_size": 8, "expand": 2}),
        ("Bloom", {"n_head": 4, "n_layer": 2}),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}),
    ],
)
def test_models_that_look_across_rows_or_attend_otherwise_are_padded_and_it_is_said(
    kind, settings, dataset
):
    model = small_model(kind, **settings).eval()
    rows = read_split(dataset, "train")
    loss = LossFunction(model)

    loss.try_out(rows, CPU)
    total = loss(loss.batch(rows, np.arange(4), CPU))

    theirs = transformers_loss(model, rows, np.arange(4)) * int(rows.num_supervised[:4].sum())
    assert not loss.packs
    assert "padded, not packed" in loss.notes[0]
    assert_close(total, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("Bloom", {"n_head": 4, "n_layer": 2}),
    ],
)
def test_a_leak_between_rows_is_found_in_16_bits_too(kind, settings, dataset):
    model = small_model(kind, **settings).eval().bfloat16()
    loss = LossFunction(model)

    loss.try_out(read_split(dataset, "train"), CPU)

    assert not loss.packs
    assert "padded, not packed" in loss.notes[0]


def test_in_16_bits_rows_that_keep_to_themselves_are_packed(dataset):
    loss = LossFunction(small_model("Llama").eval().bfloat16())

    loss.try_out(read_split(dataset, "train"), CPU)

    assert loss.packs
    assert loss.notes == []


@pytest.mark.parametrize(
    ("kind", "settings", "draws"),
    [
        ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False),
        ("GPT2", {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
        ("OPT", {"dropout": 0.1, "ffn_dim": 96, "word_embed_proj_dim": 64}, True),  # in its code
        ("Llama", {"attention_dropout": 0.1}, True),
        ("Llama", {}, False),
    ],
)
def test_dropout_of_the_models_own_is_noticed(kind, settings, draws, dataset):
    loss = LossFunction(small_model(kind, **settings).eval())
    state = torch.get_rng_state()

    loss.try_out(read_split(dataset, "train"), CPU)

    assert loss.draws is draws
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_tried_counts_as_one_that_draws(dataset, monkeypatch):
    model = small_model("Llama").eval()

    def refuse(**_):
        raise ValueError("not like this")

    monkeypatch.setattr(model, "forward", refuse)
    loss = LossFunction(model)
    loss.try_out(read_split(dataset, "train"), CPU)

    assert loss.draws
    assert not loss.packs
    assert "not like this" in loss.notes[0]


def test_dropout_of_an_adapter_that_adds_nothing_yet_is_noticed(float_base, dataset):
    model = attach_adapter(load_base(float_base), AdapterConfig(rank=4, dropout=0.1), seed=0)
    loss = LossFunction(model)

    loss.try_out(read_split(dataset, "train"), CPU)

    assert loss.draws
    assert "computed for each of them" in loss.notes[0]
