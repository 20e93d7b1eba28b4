"""In which order copies and kernels of a base that lies with the host may run on a GPU.

There is none here, so streams are made up: each counts what it is given, and knows of every other
how much of it has to be over before (a vector clock; Lamport 1978, "Time, Clocks, and the Ordering
of Events in a Distributed System"). The base, its blocks and their hooks are the real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from qlora_core.modeling import beside as beside_module
from qlora_core.modeling.beside import Copying
from qlora_core.modeling.hosted import load_hosted
from qlora_core.modeling.sharding import KeepsAll, blocks_of
from tests.tiny import make_tiny_llama
from tests.training.conftest import write_base

NUM_LAYERS = 5
Moment = dict[str, int]
"""Of each stream, how much of it is over."""


@dataclass
class FakeStream:
    name: str
    known: Moment = field(default_factory=dict)

    def queue(self) -> "Done":
        """Take one more piece of work; return it."""
        self.known[self.name] = self.known.get(self.name, 0) + 1
        return Done(self.name, dict(self.known))

    def record_event(self) -> Moment:
        return dict(self.known)

    def wait_event(self, event: Moment) -> None:
        for name, count in event.items():
            self.known[name] = max(count, self.known.get(name, 0))

    def wait_stream(self, other: "FakeStream") -> None:
        self.wait_event(other.record_event())


@dataclass(frozen=True)
class Done:
    """A piece of work, and all that is over when it begins."""

    stream: str
    known: Moment

    def is_after(self, other: "Done") -> bool:
        return self.known.get(other.stream, 0) >= other.known[other.stream]


class FakeGpu:
    """Two streams, and which of them is given work now."""

    def __init__(self) -> None:
        self.computing, self.copying = FakeStream("computing"), FakeStream("copying")
        self.current = self.computing

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    made = FakeGpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    monkeypatch.setattr(beside_module, "_copying_stream", lambda _: made.copying)
    return made


@dataclass
class OnGpu:
    """A tensor of the host that says it is a GPU's, and when it was copied to."""

    tensor: torch.Tensor
    gpu: FakeGpu
    device = torch.device("cuda", 0)
    copied: Done | None = None

    def copy_(self, part: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.tensor.copy_(part)
        self.copied = self.gpu.current.queue()


@dataclass
class Seen:
    """Work on each block, in the order in which the host queued it."""

    copies: list[tuple[int, Done]] = field(default_factory=list)
    kernels: list[tuple[int, Done]] = field(default_factory=list)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    tiny = make_tiny_llama(folder / "tiny", num_layers=NUM_LAYERS)
    return write_base(folder / "nf4", tiny, is_nf4=True)


@pytest.fixture
def watched(base_folder, gpu):
    """A hosted model, what brings its blocks, and what it will have done."""
    model, base = load_hosted(base_folder, torch.device("cpu"), [])
    seen, places = Seen(), {id(block.part_S): n for n, block in enumerate(base._blocks)}

    class Watched(KeepsAll):
        def gather_parts(self, whole, part):
            dressed = OnGpu(whole, gpu)
            coming = super().gather_parts(dressed, part)
            seen.copies.append((places[id(part)], dressed.copied))
            return coming

    base._comm = Watched()
    for place, block in enumerate(blocks_of(model)):
        _watch(place, block, seen, gpu)
    return model, base, seen


def _watch(place, block, seen, gpu) -> None:
    """Note when the block's first and last kernel are queued, and its first one backward."""

    def note(*_):
        seen.kernels.append((place, gpu.current.queue()))

    def after(_module, _inputs, output):
        note()
        if output.requires_grad:
            output.register_hook(lambda _: note())  # behind the base's own, which is there already

    block.register_forward_pre_hook(note)
    block.register_forward_hook(after)


def check(seen: Seen) -> None:
    """Each block computes after it came, and comes while the one before it computes."""
    visits: list[tuple[int, list[Done]]] = []
    for place, kernel in seen.kernels:
        if not visits or visits[-1][0] != place:
            visits.append((place, []))
        visits[-1][1].append(kernel)
    assert [place for place, _ in visits] == [place for place, _ in seen.copies]
    computed = [kernels for _, kernels in visits]
    for at, (_, copy) in enumerate(seen.copies):
        assert all(kernel.is_after(copy) for kernel in computed[at]), "used before it is here"
        earlier = [kernel for kernels in computed[: max(0, at - 1)] for kernel in kernels]
        assert all(copy.is_after(kernel) for kernel in earlier), "its memory is still in use"
        for kernel in computed[at - 1] if at else []:
            assert not copy.is_after(kernel), "it waits for the block before it"
            assert not kernel.is_after(copy), "the block before it waits for it"


def test_forward_a_block_comes_while_the_one_before_computes_and_never_into_memory_in_use(watched):
    model, _, seen = watched

    with torch.inference_mode():
        for _ in range(2):
            model(input_ids=torch.arange(3, 15)[None], use_cache=False)
            check(seen)
            seen.copies.clear(), seen.kernels.clear()


def test_there_and_back_a_block_comes_while_the_one_before_computes(watched):
    model, base, seen = watched
    embedded = model.get_input_embeddings()(torch.arange(3, 15)[None]).requires_grad_()

    for _ in range(2):
        base.begin_pass(goes_back=True)
        model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
        base.end_pass()
        assert len(seen.copies) == 2 * NUM_LAYERS - 1
        check(seen)
        seen.copies.clear(), seen.kernels.clear()


def test_what_is_queued_after_a_copy_that_nobody_waited_for_waits_for_it_once_it_is_dropped(gpu):
    filled = OnGpu(torch.zeros(3), gpu)

    coming: Copying | None = beside_module.copy_beside(filled, torch.ones(3))
    assert not gpu.computing.queue().is_after(filled.copied)

    coming = None
    assert coming is None
    assert gpu.computing.queue().is_after(filled.copied)


def test_on_a_cpu_a_copy_is_over_when_it_has_begun():
    whole = torch.zeros(3)

    coming = beside_module.copy_beside(whole, torch.ones(3))

    assert torch.equal(whole, torch.ones(3))
    coming.wait()
