"""Says which notebooks are left out because the models that they need are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / "checkpoints" / "gpt2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "ioi.ipynb" and (reason := missing()):
            item.add_marker(pytest.mark.skip(reason=reason))


def missing() -> str | None:
    """Why the notebook on GPT-2 cannot run; None if it can."""
    from ln_removal.errors import UserError
    from ln_removal.evaluation.scoring import models_of_run
    from ln_removal.models.loading import load_config

    if not (RUN / "results.json").is_file():
        return "it needs a finished run of GPT-2: ln-remove --model gpt2 --control --out checkpoints/gpt2"
    try:
        load_config(models_of_run(RUN)["original"])  # which comes from the Hub
    except UserError as error:
        return str(error)
    return None
