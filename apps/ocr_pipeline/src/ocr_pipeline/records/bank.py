"""The rule of the bank: several transformers on one pole are one entry of the register."""

from __future__ import annotations

from decimal import Decimal

TOLERANCE = Decimal("0.05")  # inclusive
CONFIRMED = 2  # distinct photos of a transformer's plate that confirm a bank


def bank_size(distinct_images: int) -> int:
    """How many transformers a pole has, by its distinct photos of transformer plates."""
    return distinct_images if distinct_images >= CONFIRMED else 1


def power_agrees(read_kva: float, transformers: int, record_kva: float) -> bool:
    """Whether the power that was read, times the transformers, is the record's, ±5 % of it inclusive.

    Exactly, in decimal: 0.95 of 112.5 is 106.875, and 106.875 agrees.
    """
    expected = Decimal(str(record_kva))
    return abs(Decimal(str(read_kva)) * transformers - expected) <= expected * TOLERANCE
