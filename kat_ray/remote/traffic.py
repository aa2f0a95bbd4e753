"""What goes to a teacher's server and comes back, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Counts since the start. Bytes are of bodies; heads are not in them."""

    requests: int = 0  # attempts
    retries: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
