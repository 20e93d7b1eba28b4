"""Kernels for a GPU, where there are some: liger-kernel's, each used only if it proves itself here.

torch computes a gated activation, a rotary embedding and a softmax's gradient in several passes
over memory; a kernel does it in one or two. They are found by trying: at the model's own sizes, on
the device, in its dtype, forward and backward, against torch in float64. What is not installed,
fails, or is off by more than rounding is left out, and `Kernels.notes` says so; torch does it then.

Two things about liger's kernels would surprise. They write over what they are given, so they get
copies here, unless nobody else can hold it. And the usual door to its cross-entropy asks the GPU
for sums, so the host waits, and keeps the loss of a position in 16 bits; so the kernel is started
from here, with a float32 loss, and writes the gradient over the logits.

Dims: N tokens, F intermediate size, H query heads, G key heads, D head size, K positions, V
vocabulary, O = 2 F.
Source: Hsu et al. 2024, arXiv:2410.10989 (the kernels).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_NUM_TRIED = 5
_LARGEST_BLOCK = 32768
_NUM_WARPS = 32  # of a block that reads a vocabulary; what liger takes on Hopper and before

RotateBoth = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes (B, H, T, D) queries, (B, G, T, D) keys, (B, T, D) cosines and sines."""
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes (K, V) logits, which it may write over, and K labels; returns K losses, and their gradient
for the logits."""


@dataclass(frozen=True)
class GateKernel:
    """SiLU of the gate times up, both side by side in one tensor."""

    multiply: Callable[[Tensor], Tensor]
    """Takes (N, O); returns (N, F)."""
    differentiate: Callable[[Tensor, Tensor], Tensor]
    """Takes (N, O) and the (N, F) gradient of the output; returns the (N, O) gradient."""


@dataclass(frozen=True)
class Kernels:
    """What may be used on a device; none of it is where torch has to do."""

    silu_gate: GateKernel | None = None
    rotate_both: RotateBoth | None = None
    predict: Predict | None = None
    notes: tuple[str, ...] = ()
    """Which are used, and why others are not."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of those that are used."""
        found = (field.name for field in fields(self) if field.name != "notes")
        return tuple(name for name in found if getattr(self, name) is not None)


NO_KERNELS = Kernels()


@dataclass(frozen=True)
class Sizes:
    """Those of a model that a kernel may depend on."""

    intermediate: int
    vocabulary: int
    num_heads: int
    num_key_heads: int
    head: int


def sizes_of(config: Any) -> Sizes:
    """Return the sizes of a model with this transformers configuration."""
    text = config.get_text_config()
    hidden, num_heads = int(text.hidden_size), int(text.num_attention_heads)
    return Sizes(
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        vocabulary=int(text.vocab_size),
        num_heads=num_heads,
        num_key_heads=int(getattr(text, "num_key_value_heads", None) or num_heads),
        head=int(getattr(text, "head_dim", None) or hidden // num_heads),
    )


def find_kernels(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Kernels:
    """Return the kernels to use on ``device``; none on anything but a GPU.

    Args:
        device: Where the model is.
        dtype: What it computes in.
        sizes: The model's.
    """
    if device.type != "cuda":
        return NO_KERNELS
    if device.index not in (None, torch.cuda.current_device()):
        return Kernels(notes=(f"No kernels are used: {device} is not this process's own GPU.",))
    return try_kernels(device, dtype, sizes)


def try_kernels(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Kernels:
    """Return the kernels that give torch's numbers on ``device``."""
    made: dict[str, tuple[Callable[[], Any], Callable[[Any, _Trial], float]]] = {
        "silu_gate": (_silu_gate, _gate_error),
        "rotate_both": (_rotate_both, _rotary_error),
        "predict": (_predict, _prediction_error),
    }
    kept: dict[str, Any] = {}
    notes: list[str] = []
    absent: dict[str, ImportError] = {}
    for name, (make, error_of) in made.items():
        try:
            kernel = make()
        except ImportError as missing:
            absent[name] = missing
            continue
        if why := _why_not(kernel, error_of, _Trial(device, dtype, sizes)):
            notes.append(f"liger-kernel's {name} is left out, torch does it: {why}.")
        else:
            kept[name] = kernel
    if kept:
        notes.insert(0, f"Kernels of liger-kernel: {', '.join(kept)}.")
    if absent:
        notes.append(
            f"Not installed, so torch does it: liger-kernel's {', '.join(absent)} "
            f"({next(iter(absent.values()))}). The extra `gpu` brings it."
        )
    return Kernels(**kept, notes=tuple(notes))


def _why_not(kernel: Any, error_of: "Callable[[Any, _Trial], float]", trial: "_Trial") -> str:
    """Return what is wrong with a kernel; nothing if it gives torch's numbers."""
    try:
        error = error_of(kernel, trial)
    except Exception as failure:  # whatever a compiler or a driver objects to, torch can do it
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    allowed = _TOLERANCE.get(trial.dtype, 0.0)
    return "" if error <= allowed else f"{error:.1e} off, {allowed:.0e} allowed"  # NaN too


def _silu_gate() -> GateKernel:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward

    def multiply(y_NO: Tensor) -> Tensor:
        h_NF: Tensor = swiglu_fused_gate_up_forward(y_NO.contiguous())[1]
        return h_NF

    def differentiate(y_NO: Tensor, dh_NF: Tensor) -> Tensor:
        dy_NO: Tensor = swiglu_fused_gate_up_backward(y_NO.contiguous(), dh_NF.contiguous())
        return dy_NO

    return GateKernel(multiply, differentiate)


def _rotate_both() -> RotateBoth:
    from liger_kernel.ops.rope import rope_backward, rope_forward

    class Rotate(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
        ) -> tuple[Tensor, Tensor]:
            cos, sin = cos.contiguous(), sin.contiguous()
            ctx.save_for_backward(cos, sin)
            turned: Any = rope_forward(_copied(q), _copied(k), cos, sin)
            return turned[0], turned[1]

        @staticmethod
        def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
            turned: Any = rope_backward(_copied(dq), _copied(dk), *ctx.saved_tensors)
            return turned[0], turned[1], None, None

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = Rotate.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
        return outputs

    return rotate_both


def _copied(states_BHTD: Tensor) -> Tensor:
    """Return a copy that lies as the kernel takes it, (B, T, H, D) in memory."""
    lying_BTHD = states_BHTD.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return lying_BTHD.transpose(1, 2)


def _predict() -> Predict:
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from triton import next_power_of_2

    def predict(logits_KV: Tensor, labels_K: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, size = logits_KV.shape
        losses_K = torch.empty(num_rows, dtype=torch.float32, device=logits_KV.device)
        liger_cross_entropy_kernel[(num_rows,)](
            X_ptr=logits_KV,
            X_stride=logits_KV.stride(0),
            Y_ptr=labels_K,
            Y_stride=labels_K.stride(0),
            weight_ptr=None,
            loss_ptr=losses_K,
            z_loss_ptr=None,
            loss_stride=1,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=size,
            n_non_ignore=1,  # a sum needs neither, and a number that varies is compiled for anew
            sum_non_ignore_weight=1,
            weight_sum=0.0,
            ignore_index=-100,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="sum",
            softcap=None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(_LARGEST_BLOCK, next_power_of_2(size)),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=True,
            num_warps=_NUM_WARPS,
        )
        return losses_K, logits_KV

    return predict


@dataclass(frozen=True)
class _Trial:
    """Random input of the model's sizes."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    def draw(self, *shapes: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield random tensors, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        for shape in shapes:
            yield torch.randn(shape, generator=generator).to(self.device, self.dtype)


def _gate_error(kernel: GateKernel, trial: _Trial) -> float:
    size = trial.sizes.intermediate
    y_NO, dh_NF = trial.draw((_NUM_TRIED, 2 * size), (_NUM_TRIED, size))
    exact_NO = y_NO.double().requires_grad_()
    gate_NF, up_NF = exact_NO.chunk(2, 1)
    h_NF = F.silu(gate_NF) * up_NF
    (expected_NO,) = torch.autograd.grad(h_NF, exact_NO, dh_NF.double())
    found = (kernel.multiply(y_NO), kernel.differentiate(y_NO, dh_NF))
    return _error(found, (h_NF, expected_NO))


def _rotary_error(rotate_both: RotateBoth, trial: _Trial) -> float:
    sizes, num = trial.sizes, _NUM_TRIED
    *states, angles = trial.draw(
        (1, sizes.num_heads, num, sizes.head),
        (1, sizes.num_key_heads, num, sizes.head),
        (1, sizes.num_heads, num, sizes.head),
        (1, sizes.num_key_heads, num, sizes.head),
        (1, num, sizes.head // 2),
    )
    angles = torch.cat([angles, angles], -1)
    before = [state.clone() for state in states]
    found = _both_ways(rotate_both, states, angles.cos(), angles.sin())
    exact = [state.double() for state in states]
    expected = _both_ways(_rotated, exact, angles.cos().double(), angles.sin().double())
    if not all(map(torch.equal, states, before)):
        return torch.nan  # it wrote over what is not its own
    return _error(found, expected)


def _both_ways(rotate_both: RotateBoth, states: list[Tensor], cos: Tensor, sin: Tensor) -> Any:
    q, k = (state.detach().requires_grad_() for state in states[:2])
    turned = rotate_both(q, k, cos, sin)
    return (*turned, *torch.autograd.grad(turned, (q, k), states[2:]))


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return turned(q), turned(k)


def _prediction_error(predict: Predict, trial: _Trial) -> float:
    size = trial.sizes.vocabulary
    (logits_KV,) = trial.draw((_NUM_TRIED, size))
    labels_K = torch.arange(_NUM_TRIED, device=trial.device) * 7919 % size
    exact_KV = (4 * logits_KV).double().requires_grad_()
    losses_K = F.cross_entropy(exact_KV, labels_K, reduction="none")
    (expected_KV,) = torch.autograd.grad(losses_K.sum(), exact_KV)
    return _error(predict(4 * logits_KV, labels_K), (losses_K, expected_KV))


@torch.no_grad()
def _error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference of a pair, NaN if there is one."""
    pairs = zip(found, expected, strict=True)
    errors = [(ours.double() - exact).norm() / exact.norm() for ours, exact in pairs]
    return float(torch.stack(errors).max())
