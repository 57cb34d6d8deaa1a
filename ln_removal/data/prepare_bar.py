"""The progress bar of a preparation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ln_removal.data.prepare import PrepareProgress


@contextmanager
def prepare_bar(label: str, *, total: int | None, enabled: bool) -> Iterator[Callable[[PrepareProgress], None]]:
    """A bar on standard error; what it yields is the `progress` of `prepare`.

    Args:
        label: shown before the bar.
        total: tokens at which the preparation stops; None when only the end of the corpus will tell.
        enabled: False shows nothing.
    """
    from tqdm import tqdm

    with tqdm(desc=label, unit="tok", unit_scale=True, total=total, file=sys.stderr, disable=not enabled) as bar:

        def show(progress: PrepareProgress) -> None:
            bar.set_postfix_str(f"{progress.documents:,} documents, {progress.bytes / 1e6:,.0f} MB", refresh=False)
            bar.update(progress.tokens - bar.n)

        yield show
