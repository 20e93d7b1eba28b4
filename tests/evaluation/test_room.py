"""Where a base lies while it is asked, and whether what is counted for it is enough."""

import pytest
import torch
from torch.profiler import profile

from qlora_core.config import AdapterConfig, QuantizationConfig
from qlora_core.errors import ArtifactError, ResourceError
from qlora_core.evaluation import room
from qlora_core.evaluation.interview import open_interview
from qlora_core.evaluation.questions import read_questions
from qlora_core.evaluation.room import LongestPasses, count_needs, needs_of, place_base
from qlora_core.modeling.hosted import load_hosted
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.shape import published_config, shape_of
from qlora_core.ports import AskJob
from tests.evaluation.asking import adapted

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GB = 10**9


def needs(job: AskJob):
    found = needs_of(job, read_questions(job.evaluation, job.data))
    assert found is not None
    return found


def placed(monkeypatch, job: AskJob, gpu_bytes: int, host_bytes: int = 10**12):
    """Where the base would lie on a GPU, of which only its free memory is asked."""
    monkeypatch.setattr(room, "gpu_bytes", lambda device: gpu_bytes)
    monkeypatch.setattr(room, "free_bytes", lambda: host_bytes)
    return place_base(job, read_questions(job.evaluation, job.data), GPU)


def test_the_gpus_free_memory_decides_whether_the_base_is_whole_there(job, monkeypatch):
    enough = needs(job).enough_gpu_bytes

    assert not placed(monkeypatch, job, enough).is_hosted
    assert placed(monkeypatch, job, enough - 2).is_hosted


def test_the_recipe_may_want_it_with_the_host_where_it_would_fit(job, monkeypatch):
    wanting = job.model_copy(update={"offloads_base": True})

    assert placed(monkeypatch, wanting, 10**12).is_hosted
    assert not placed(monkeypatch, job, 10**12).is_hosted


def test_a_host_without_room_is_found_before_a_weight_is_loaded(job, monkeypatch):
    host_bytes = needs(job).host_bytes

    assert placed(monkeypatch, job, 0, host_bytes).is_hosted
    with pytest.raises(ResourceError, match="host's memory"):
        placed(monkeypatch, job, 0, host_bytes - 1)


def test_on_a_cpu_nothing_is_decided_and_a_merged_model_stays_whole(job, monkeypatch):
    questions = read_questions(job.evaluation, job.data)
    wanting = job.model_copy(update={"offloads_base": True})

    assert not place_base(wanting, questions, CPU).is_hosted
    merged = job.model_copy(update={"is_merged": True})
    assert not placed(monkeypatch, merged, 0).is_hosted


def test_an_adapter_of_dora_needs_its_base_whole_and_that_is_said(job, monkeypatch):
    dora = adapted(job, dora=True)

    with pytest.raises(ResourceError, match="starts from all weights"):
        placed(monkeypatch, dora, 1000)
    assert not placed(monkeypatch, dora, 10**9).is_hosted
    assert placed(monkeypatch, adapted(job), 1000).is_hosted


def test_a_model_that_brings_code_is_whole_as_nobody_can_count_it(job, monkeypatch, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "modeling_mine.py").write_text("raise SystemExit")

    assert not placed(
        monkeypatch, job.model_copy(update={"model": tmp_path / "mine"}), 1000
    ).is_hosted


def test_an_adapter_that_cannot_be_read_is_told_as_that(job, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        needs(job.model_copy(update={"adapter": tmp_path / "nowhere"}))


def test_weights_are_counted_to_the_byte_whole_and_with_the_host(job):
    found = needs(adapted(job))
    _, base = load_hosted(job.model, CPU, [])
    blocks = [block.part_S.nbytes for block in base._blocks]

    assert found.whole.weights + found.whole.constants + found.whole.unquantized == held_bytes(job)
    assert found.hosted.weights == 0
    assert found.hosted.gathered == sum(blocks[:2])
    # torch pins memory by powers of two
    assert found.host_bytes == sum(2 ** (size - 1).bit_length() for size in blocks)
    assert found.whole.adapter == (job.scratch / "adapter/adapter_model.safetensors").stat().st_size


def held_bytes(job: AskJob) -> int:
    """Bytes of the loaded model, as bitsandbytes keeps it."""
    model, held = load_base(job.model), 0
    for parameter in model.parameters():
        held += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + state.code.nbytes + state.offset.nbytes
            held += state.state2.absmax.nbytes + state.state2.code.nbytes
    return held


def peak_bytes(job: AskJob) -> int:
    """The most that tensors took at once while all was asked, beside the model."""
    with open_interview(job, CPU) as interview:
        batches = interview.batches
        with profile(profile_memory=True) as profiled:
            for batch in batches:
                interview.reply(batch)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("has_adapter", [False, True])
def test_what_is_counted_for_passes_is_enough_and_not_many_times_too_much(job, has_adapter):
    asked = adapted(job) if has_adapter else job
    whole = needs(asked).whole

    peak = peak_bytes(asked)

    assert peak <= whole.activations + whole.logits + whole.workspace <= 3 * peak


def test_longer_questions_and_answers_need_more_of_the_gpu_and_not_of_the_host():
    shape = shape_of(published_config("8b"), QuantizationConfig(), AdapterConfig())

    def total(**passes):
        found = count_needs(
            shape, QuantizationConfig(), LongestPasses(16, 1000, **passes), "bfloat16",
            adapter_bytes=0,
        )  # fmt: skip
        return found.hosted.total, found.host_bytes

    short, long = total(), total(prompt=1000, answer=3000)

    cached = 2 * 1024 * 2 * 32 * 16 * 3000  # of 3,000 more tokens: keys and values, 32 layers
    assert long[0] - short[0] > 0.5 * cached
    assert long[1] == short[1]


def test_the_host_of_a_published_size_holds_what_hand_arithmetic_says():
    """A block of Llama 3.1 405B takes 1.64 GB in NF4, so torch pins 2 GiB for each of 126."""
    shape = shape_of(published_config("405b"), QuantizationConfig(), AdapterConfig())

    found = count_needs(
        shape, QuantizationConfig(), LongestPasses(1, 100), "bfloat16", adapter_bytes=0
    )

    assert found.host_bytes == 126 * 2**31
    assert found.hosted.gathered / GB == pytest.approx(2 * 1.6436, abs=1e-3)
    assert found.hosted.total < 80 * GB < found.whole.total
