"""Tests: unit (no root, no network), lab (real hosts), deploy (also against production)."""
