"""Engines: where the jobs of a run are worked off. Each is a function `(work, jobs, workers, on_row)`.

An engine calls `on_row(row)` in the caller's process once for each row; a job of a worker that died is done again by another,
less the rows that came already, and given up as skipped when it has ended `TRIES` workers.
"""

from __future__ import annotations

TRIES = 3
ENGINES = ("local", "ray")
