import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qlora_core.config import AdapterConfig
from qlora_core.data.prepared import IGNORED, Rows, read_split
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.training.objective import LossFunction, collate

CPU = torch.device("cpu")


def adapted(folder):
    """A base whose adapter is not zero, so that all gradients are at work."""
    model = attach_adapter(load_base(folder), AdapterConfig(rank=4), seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("base", ["nf4_base", "float_base"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(base, dataset, request):
    model = adapted(request.getfixturevalue(base))
    rows, chunk = read_split(dataset, "train"), np.array([0, 3, 5, 7])
    batch = collate(rows, chunk, CPU)
    num_supervised = int(rows.num_supervised[chunk].sum())

    loss = LossFunction(model)(batch) / num_supervised
    loss.backward()
    ours = gradients(model)

    model.zero_grad()
    mask = torch.arange(batch.input_ids_BT.shape[1]) < torch.tensor(rows.lengths[chunk])[:, None]
    theirs = model(
        input_ids=batch.input_ids_BT, attention_mask=mask.long(), labels=batch.labels_BT
    ).loss
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


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 8}),
        ("Granite", {"logits_scaling": 7.0, "embedding_multiplier": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_what_a_model_does_to_its_logits_is_kept(kind, settings, dataset):
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    settings = settings | ({"vocab_size": 64} if kind == "GPT2" else sizes)
    config = getattr(transformers, f"{kind}Config")(**settings, pad_token_id=0)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    batch = collate(read_split(dataset, "train"), np.arange(4), CPU)

    loss = LossFunction(model)
    total = loss(batch)

    num_supervised = (batch.labels_BT[:, 1:] != IGNORED).sum()
    theirs = model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss * num_supervised
    assert_close(total, theirs, rtol=1e-5, atol=0)
    assert loss.notes == []


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
