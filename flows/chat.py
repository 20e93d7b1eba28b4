"""Talk to what a run made: the merged model, the adapter on its 4-bit base, or the base alone.

The conversation goes through the model's own chat template with the recipe's system message, as in
training: a model asked in another form than it was taught answers worse, and nothing says why.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.records import RunRecord
from qlora_core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Subject = Literal["merged", "tuned", "base"]
_NEEDS: dict[Subject, set[str]] = {
    "merged": {"merged"},
    "tuned": {"base", "adapter"},
    "base": {"base"},
}
"""The artefacts that a model is loaded from, by role."""


class Conversation:
    """Turns so far, and a model to answer the next one."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None,
        max_new_tokens: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens = max_new_tokens
        self._start = [{"role": "system", "content": system}] if system else []
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._turns = list(self._start)

    def answer(self, text: str, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer piece by piece; temperature 0 always takes the likeliest token.

        Raises:
            UserError: The conversation leaves no room for an answer; ``text`` is not part of it.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        inputs = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        room = self._room(inputs["input_ids"].shape[1])
        said = ""
        for piece in self._stream(inputs, min(room, self._max_new_tokens), temperature):
            said += piece
            yield piece
        self._turns = [*turns, {"role": "assistant", "content": said}]

    def _room(self, num_tokens: int) -> int:
        """Return how many tokens the model can read beyond these."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if most is None:
            return self._max_new_tokens  # it has no positions to run out of
        if num_tokens >= most:
            raise UserError(
                f"the conversation has {num_tokens} tokens, but this model reads at most {most}.",
                why="There is no room for an answer.",
                fix="Say it in fewer words, or forget what was said before with /new.",
            )
        return int(most) - num_tokens

    def _stream(self, inputs: Any, max_new_tokens: int, temperature: float) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(
            self._tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=None
        )
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature}
            if temperature > 0
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                self._model.generate(
                    **inputs,
                    **sampling,
                    streamer=streamer,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            except BaseException as error:
                failures.append(error)  # raised where a person sees it, below
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]


def can_talk(record: RunRecord, subject: Subject | None) -> bool:
    """Say whether a run has made what is to be talked to; none: merged or tuned."""
    there = {role for role, ref in record.artifacts.items() if ref.path.is_dir()}
    chosen: tuple[Subject, ...] = (subject,) if subject else ("merged", "tuned")
    return any(_NEEDS[one] <= there for one in chosen)


def open_conversation(
    record: RunRecord, subject: Subject | None, max_new_tokens: int, say: Callable[[str], None]
) -> Conversation:
    """Load what is to be talked to.

    Raises:
        UserError: The run has no such model (yet).
    """
    from transformers.utils import logging as transformers_logging

    from qlora_core.modeling.loading import load_saved_tokenizer

    chosen: Subject = subject or ("merged" if can_talk(record, "merged") else "tuned")
    say(f"loading the {chosen} model of {record.run_id}")
    transformers_logging.set_verbosity_error()
    model, folder = _load(record, chosen)
    tokenizer = load_saved_tokenizer(folder)
    return Conversation(model, tokenizer, record.config.dataset.system, max_new_tokens)


def _load(record: RunRecord, subject: Subject) -> tuple["PreTrainedModel", Path]:
    import torch

    from qlora_core.modeling.loading import load_base, load_merged
    from qlora_core.modeling.lora import load_adapter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if subject == "merged":
        folder = _path(record, "merged", subject)
        return load_merged(folder, device), folder
    folder = _path(record, "base", subject)
    model = load_base(folder, device)
    if subject == "tuned":
        model = load_adapter(model, _path(record, "adapter", subject))
    return model, folder


def _path(record: RunRecord, role: str, subject: str) -> Path:
    ref = record.artifacts.get(role)
    if ref is None or not ref.path.is_dir():
        there = [name for name, ref in record.artifacts.items() if ref.path.is_dir()]
        raise UserError(
            f"run {record.run_id} has no {role} to load for subject {subject!r}.",
            why=f"It is {record.state}, and has {', '.join(there) or 'nothing yet'}.",
            fix="Finish it with `qlora run FILE`, or choose --subject tuned, merged or base.",
        )
    return ref.path
