"""qloraflow's core: everything that turns one recipe into a verified fine-tuned model.

It knows no Prefect, and only `qlora_core.backends` knows Ray and MLflow, so every stage also runs
in a notebook or in a test. Importing this package imports no torch: the door opens at once.
"""

from qlora_core.artifacts import Artifact, Metric
from qlora_core.config import RunConfig
from qlora_core.errors import QLoraError, UserError
from qlora_core.recipe import load_config
from qlora_core.store import Store

__version__ = "0.1.0"
__all__ = ["Artifact", "Metric", "QLoraError", "RunConfig", "Store", "UserError", "load_config"]
