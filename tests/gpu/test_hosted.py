"""A base in the host's memory, whose blocks come to a real GPU, beside the same base on it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import AdapterConfig, EvaluationConfig, QuantizationConfig, SnapshotConfig
from qlora_core.evaluation import interview as interview_module
from qlora_core.evaluation import room
from qlora_core.evaluation.interview import open_interview
from qlora_core.evaluation.questions import read_questions
from qlora_core.evaluation.room import LongestPasses, count_needs
from qlora_core.modeling.hosted import BasePlace, load_hosted
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, load_adapter, save_adapter
from qlora_core.modeling.shape import shape_of
from qlora_core.ports import AskJob
from qlora_core.training import placing
from qlora_core.training.snapshot import FOLDER, snapshots_in
from qlora_core.training.validating import open_validator

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
NUM_LAYERS, NUM_ROWS, LENGTH = 16, 4, 64
CONFIG = LlamaConfig(
    vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=NUM_LAYERS,
    num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=2,
)  # fmt: skip
IDS = torch.arange(NUM_ROWS * LENGTH).reshape(NUM_ROWS, LENGTH) % 1000 + 3


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """16 blocks of 6 MB in NF4: large beside what torch rounds to."""
    folder = tmp_path_factory.mktemp("gpu-hosted")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(folder / "plain")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=torch.bfloat16, quantization_config=nf4
    )
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def _cublas_has_its_workspace():
    """It takes one with the first product, and keeps it."""
    for dtype in (torch.bfloat16, torch.float32):
        torch.ones(64, 64, dtype=dtype, device=GPU) @ torch.ones(64, 64, dtype=dtype, device=GPU)


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS.to(GPU), use_cache=False).logits


def answers(model) -> list[list[int]]:
    with torch.inference_mode():
        ids = model.generate(
            input_ids=IDS.to(GPU), attention_mask=torch.ones_like(IDS).to(GPU), max_new_tokens=5,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return ids[:, LENGTH:].tolist()


def peak_bytes(act) -> int:
    """What ``act`` takes of the GPU at most, with all that it leaves there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = act()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("has_adapter", [False, True])
def test_blocks_that_come_from_the_host_give_the_bits_of_those_that_stay(
    base_folder, tmp_path, has_adapter
):
    whole, (hosted, base) = load_base(base_folder, GPU), load_hosted(base_folder, GPU, [])
    if has_adapter:
        adapted = attach_adapter(load_base(base_folder, GPU), AdapterConfig(rank=8), seed=0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(adapted, tmp_path, "base", None)
        whole, hosted = (load_adapter(model, tmp_path) for model in (whole, hosted))

    assert torch.equal(logits(hosted), logits(whole))
    assert answers(hosted) == answers(whole)
    assert base.present_bytes == 0


def test_the_gpu_holds_two_blocks_and_the_host_the_rest_in_pinned_memory(base_folder):
    def forward(load):
        model = load()
        logits(model)
        return model

    whole = peak_bytes(lambda: forward(lambda: load_base(base_folder, GPU)))
    _, base = load_hosted(base_folder, GPU, [])
    hosted = peak_bytes(lambda: forward(lambda: load_hosted(base_folder, GPU, [])[0]))

    block = base.part_bytes // NUM_LAYERS
    assert all(each.part_S.is_pinned() for each in base._blocks)
    assert hosted <= whole - (NUM_LAYERS - 3) * block


def test_what_is_counted_beforehand_is_enough_for_what_the_gpu_then_holds(base_folder):
    shape = shape_of(CONFIG, QuantizationConfig(), AdapterConfig())
    passes = LongestPasses(NUM_ROWS, LENGTH, prompt=LENGTH, answer=5)
    counted = count_needs(shape, QuantizationConfig(), passes, "bfloat16", adapter_bytes=0)

    def ask(model):
        logits(model), answers(model)
        return model

    assert peak_bytes(lambda: ask(load_hosted(base_folder, GPU, [])[0])) <= counted.hosted.total
    assert peak_bytes(lambda: ask(load_base(base_folder, GPU))) <= counted.whole.total


def test_after_a_pass_without_memory_the_next_one_is_as_if_it_were_the_first(base_folder):
    hosted, base = load_hosted(base_folder, GPU, [])
    expected = logits(hosted)

    middle = hosted.model.layers[NUM_LAYERS // 2]
    hook = middle.register_forward_hook(
        lambda *_: torch.empty(1 << 50, dtype=torch.uint8, device=GPU)
    )
    with pytest.raises(torch.OutOfMemoryError):
        logits(hosted)
    hook.remove()

    assert torch.equal(logits(hosted), expected)
    assert base.present_bytes == 0


@pytest.fixture
def ask_job(nf4_base, tiny_llama, dataset, tmp_path) -> AskJob:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(nf4_base / "model")
    settings = EvaluationConfig(batch_size=3, generate=False)
    return AskJob(
        model=nf4_base, is_merged=False, adapter=None, data=dataset, evaluation=settings,
        questions=read_questions(settings, dataset).digest(), scratch=tmp_path,
    )  # fmt: skip


def replies_of(job: AskJob) -> list[tuple[float, ...]]:
    with open_interview(job, GPU) as interview:
        return [interview.reply(batch).nats for batch in interview.batches]


def test_replies_do_not_depend_on_how_much_memory_is_free(ask_job, monkeypatch):
    questions = read_questions(ask_job.evaluation, ask_job.data)
    enough_bytes = room.needs_of(ask_job, questions).enough_gpu_bytes
    found = []
    for free_bytes in (enough_bytes, 100 * enough_bytes):
        monkeypatch.setattr(room, "gpu_bytes", lambda _, free_bytes=free_bytes: free_bytes)
        found.append(replies_of(ask_job))

    assert found[0] == found[1]


def test_an_evaluation_of_a_hosted_base_gives_the_replies_of_the_whole_one(ask_job, monkeypatch):
    def replies(place: BasePlace) -> list[tuple[float, ...]]:
        monkeypatch.setattr(interview_module, "place_base", lambda *_: place)
        return replies_of(ask_job)

    hosted = replies(BasePlace(is_hosted=True))

    for found, expected in zip(hosted, replies(BasePlace()), strict=True):
        assert found == pytest.approx(expected, rel=1e-12), "a GPU adds them up in any order"


def test_a_snapshot_measured_with_a_hosted_base_has_the_loss_of_the_whole_one(
    make_job, monkeypatch
):
    job = make_job()
    InProcessLauncher(SnapshotConfig(every_steps=2, keep=10)).train(job, lambda _: None)
    folders = snapshots_in(job.scratch / FOLDER)

    with open_validator(job, GPU) as validate:
        whole = [validate(folder).heldout_loss for folder in folders]
    monkeypatch.setattr(placing, "memory_for_worker", lambda *_, **__: 10**5)
    with open_validator(job, GPU) as validate:
        hosted = [validate(folder) for folder in folders]

    assert [each.heldout_loss for each in hosted] == pytest.approx(whole, rel=1e-6)
    assert "in the host's memory" in hosted[0].note
