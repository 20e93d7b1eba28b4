"""What launcher and job tell each other, as files in the scratch folder that both of them see.

    job-0002.json        the order: what to train or to ask, where, with what settings
    answer-0002.json     `{}`, or the fields of an error; written last, by the job
    result-0002/         an adapter; not in the store's staging folder, which goes with the flow

A job's submission id is made from the scratch folder, which is named by the stage's key, and the
number of the launch: whoever has the same recipe and store finds the same job.
"""

import json
import re
from pathlib import Path

from qlora_core.artifacts import Frozen
from qlora_core.backends.node_probe import Installation
from qlora_core.backends.ray_work import Spec
from qlora_core.backends.ray_worker import RaySpec
from qlora_core.config import ClusterConfig
from qlora_core.errors import QLoraError, from_json, storing
from qlora_core.fingerprint import fingerprint
from qlora_core.training.durable import replace_durably

_LAST_WORD = "qloraflow ends with: "
_KEY = re.compile(r"[A-Za-z0-9]+")


class JobOrder(Frozen):
    """What one job shall do."""

    cluster: ClusterConfig
    spec: Spec
    flow: Installation
    """What the flow imports: all nodes have to import the same, that of the job's driver, too."""

    @property
    def submission_id(self) -> str:
        """Under which the cluster knows the job."""
        return submission_stem(self.spec.job.scratch) + self.spec.launch

    @property
    def answer_file(self) -> Path:
        """Where the job answers when it has done all it will do."""
        return self.spec.job.scratch / f"answer-{self.spec.launch}.json"

    @property
    def has_result(self) -> bool:
        """Whether what it was to leave is still there, if it has succeeded.

        Raises:
            StoreError: It cannot be looked at.
        """
        with storing(self.spec.job.scratch, "read"):
            if isinstance(self.spec, RaySpec):
                return self.spec.job.out.is_dir()
            return self.spec.replies_file.exists()

    def final_error(self) -> QLoraError | None:
        """Return what a worker has left for whoever is first to see it: the job is to end.

        Raises:
            StoreError: It cannot be looked at.
        """
        return self.spec.final_error() if isinstance(self.spec, RaySpec) else None

    def answer(self) -> dict[str, str] | None:
        """Return what the job answered; None as long as it has not.

        Raises:
            StoreError: It cannot be looked at.
        """
        with storing(self.answer_file, "read"):
            try:
                fields: dict[str, str] = json.loads(self.answer_file.read_bytes())
            except (FileNotFoundError, ValueError):
                return None
        return fields

    def leave_answer(self, error: QLoraError | None) -> None:
        """Answer, for the job.

        Raises:
            StoreError: There is no room, say.
        """
        fields = error.to_json() if error else {}
        replace_durably(self.answer_file, json.dumps(fields).encode())


def submission_stem(scratch: Path) -> str:
    """Return what the ids of all jobs for a scratch folder begin with.

    A person finds the start of the stage's key in it; the hash keeps two stores apart.
    """
    key = _KEY.search(scratch.name)
    return f"qlora-{key[0][:12] if key else 'job'}-{fingerprint(str(scratch))[:12]}-"


def order_file(scratch: Path, launch: str) -> Path:
    """Return where the order of a launch lies."""
    return scratch / f"job-{launch}.json"


def last_word(error: QLoraError) -> str:
    """Return a line for the job's log, which arrives where no file in the store does."""
    return f"{_LAST_WORD}{json.dumps(error.to_json())}\n"


def found_last_word(log: str) -> QLoraError | None:
    """Return the error that `last_word` put into a log."""
    for line in reversed(log.splitlines()):
        _, opening, fields = line.partition(_LAST_WORD)
        if opening:
            try:
                return from_json(json.loads(fields))
            except (ValueError, KeyError, TypeError):  # Ray cuts long logs
                continue
    return None
