"""Stage 3: the fields against what the detector saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ocr_pipeline.reading import Reason
from ocr_pipeline.stages import Plate, PlateClass, PoleIdContext


class PlateAuditor:
    """A manufacturer stands on a nameplate: one that was read where no nameplate was seen is for a person."""

    def audit(self, values: dict[str, Any], plates: Sequence[Plate], context: PoleIdContext) -> list[str]:
        """Reasons for review."""
        seen = {plate.kind for plate in plates}
        if context is PoleIdContext.NAMEPLATE or PlateClass.IDENTIFICATION in seen:
            return []
        return [Reason.MANUFACTURER_WITHOUT_PLATE] if values.get("fabricante") is not None else []
