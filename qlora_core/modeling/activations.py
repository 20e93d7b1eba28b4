"""What autograd keeps of one layer and token until the backward pass has used it.

A model of it, term by term as in Korthikanti et al., for a gated Transformer (Llama's kind). Three
ways to compute a layer keep different things:

- our functions (`modeling.fusing`): norms keep their input and are their product's input (4 H).
  Query, key and value come out of one product side by side, and the value, which attention keeps,
  holds all three (A + 2 C); turned queries and keys are new (A + C), so is attention's output (A).
  The gated block keeps gate and up (2 F) and makes their product again. Adapters keep R numbers
  each. On a CPU attention keeps its weights, too (`attention_bytes`);
- transformers and PEFT with a frozen base: norms keep their input in float32 (2 H), attention its
  queries, keys, values and output (2 A + 2 C), the block gate, its activation and up (3 F).
  Adapters keep their inputs in float32: in float32 those of q, k and v are one tensor, and so are
  those of gate and up; in 16 bits each makes its own copy, as with dropout;
- transformers, all weights trained: normalised states too, for the gradients of norms (2 H), and
  the inputs of products (2 H and F; the output projection's input is attention's output).

Tests hold all three against what autograd really keeps.

Dims: H hidden, F intermediate, A attention width (heads * head size), C key/value width, R rank.
Source: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.1.
"""

from qlora_core.config import AdapterConfig
from qlora_core.modeling.attention import BLOCK
from qlora_core.modeling.shape import Shape

_FLOAT = 4
_NUM_NORMS = 2  # of a layer; each keeps a float32 number a token


def fused_layer_bytes(shape: Shape, adapter: AdapterConfig, compute_bytes: int) -> float:
    """Return what our own functions keep of one layer and token [bytes]."""
    width, kv_width, hidden = shape.attention_width, shape.kv_width, shape.hidden
    adapted = [group for group in shape.linears if group.has_adapter]
    ranks = adapter.rank * sum(group.count for group in adapted) / shape.num_layers
    attention = 2 * (width + kv_width)
    if len(adapted) == len(shape.linears):
        attention += width + kv_width
        block, inputs = 2 * shape.intermediate, 2.0 * hidden
    else:  # the gated block is the model's own, and the output projection's input may go
        block, inputs = 3 * shape.intermediate, _inputs(shape, width + 2 * hidden)
    numbers = 2 * hidden + inputs + attention + block + ranks
    return compute_bytes * numbers + _FLOAT * (shape.num_heads + _NUM_NORMS)


def adapted_layer_bytes(shape: Shape, adapter: AdapterConfig, compute_bytes: int) -> float:
    """Return what transformers and PEFT keep of one layer and token, the base frozen [bytes]."""
    num_adapted = sum(g.count for g in shape.linears if g.has_adapter) / shape.num_layers
    is_shared = compute_bytes == _FLOAT and not adapter.dropout
    inputs = _inputs(shape)
    copies = _inputs(shape, 2 * shape.hidden) if is_shared else inputs
    masks = inputs if adapter.dropout else 0  # a byte for each number (`modeling.dropout`)
    ranks = adapter.rank * num_adapted
    return (
        _FLOAT * (2 * shape.hidden + copies + ranks + shape.num_heads + _NUM_NORMS)
        + masks
        + compute_bytes * (_attention(shape) + 3 * shape.intermediate)
    )


def full_layer_bytes(shape: Shape, compute_bytes: int) -> float:
    """Return what transformers keeps of a layer and token when all weights are trained [bytes]."""
    in_float32 = _FLOAT * (2 * shape.hidden + shape.num_heads + _NUM_NORMS)
    kept = 4 * shape.hidden + _attention(shape) + 4 * shape.intermediate
    return in_float32 + compute_bytes * kept


def attention_bytes(shape: Shape, num_pairs: int) -> int:
    """Return what `modeling.attention` keeps of its float32 weights, all layers together [bytes].

    Args:
        shape: The model's.
        num_pairs: Query and key pairs, from `num_pairs_of`.
    """
    return _FLOAT * shape.num_layers * shape.num_heads * num_pairs


def num_pairs_of(length: int) -> int:
    """Return how many pairs of query and key are computed for a row: half a square, in blocks."""
    return length * (length + BLOCK) // 2


def _inputs(shape: Shape, at_most: int | None = None) -> float:
    """Return the widths of all adapters' inputs; ``at_most`` so much beside the widest's (F)."""
    inputs = sum(g.count * g.num_in for g in shape.linears if g.has_adapter) / shape.num_layers
    return inputs if at_most is None else min(inputs, at_most + shape.intermediate)


def _attention(shape: Shape) -> int:
    return 2 * shape.attention_width + 2 * shape.kv_width
