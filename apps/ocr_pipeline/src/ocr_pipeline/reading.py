"""The result of one photo: 11 fields, whether a person must look at it, and why.

`Reading.flat()` is the flat JSON object that the command prints and the API answers with. A field that is not
printed, or cannot be read, is null: never a guess.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Date = Annotated[str, Field(pattern=r"^[0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?$")]
Text = Annotated[str, Field(min_length=1, max_length=64)]
Share = Annotated[float, Field(ge=0, le=1)]


class Reason(StrEnum):
    """Why a person must look. In `_reasons` alone, or with the field that it is about:
    `low_confidence:elo_fusivel`.
    """

    MANUFACTURER_WITHOUT_PLATE = "manufacturer_without_identification_plate"
    NO_PLATE = "no_plate_found"
    NO_TEXT = "no_text_found"
    PARTIAL_PLATE = "partial_plate"
    SEVERAL_PLATES = "several_plates"
    LOW_CONFIDENCE = "low_confidence"
    AMBIGUOUS = "ambiguous"
    UNREAD_LABEL = "label_without_value"
    UNLABELLED_VALUE = "value_without_label"
    OUT_OF_DOMAIN = "out_of_domain"
    FILTERS_DISAGREE = "filters_disagree"
    NOT_GROUNDED = "not_grounded"
    SHARED_SOURCE = "shared_source"
    UNKNOWN_MANUFACTURER = "unknown_manufacturer"
    MODEL_OUTPUT_INVALID = "model_output_invalid"
    INCONSISTENT = "inconsistent"


class Fields(BaseModel):
    """The 11 fields, normalised. This model's JSON Schema is what a reasoning model is constrained with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    potencia_kva: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    fabricante: Text | None = None
    numero_serie: Text | None = None
    data_fabricacao: Date | None = None
    elo_fusivel: Text | None = None
    tensao_primaria: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    tensao_secundaria: Text | None = None
    fases: Literal[1, 2, 3] | None = None
    autoprotegido: bool | None = None
    patrimonio: Text | None = None
    matricula: Text | None = None


FIELDS: tuple[str, ...] = tuple(Fields.model_fields)


class Reading(Fields):
    """The whole answer. `needs_review` is true whenever there is a reason."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    needs_review: bool = Field(default=False, alias="_needs_review")
    reasons: tuple[str, ...] = Field(default=(), alias="_reasons")
    confidence: dict[str, Share] = Field(default={}, alias="_confidence")

    @classmethod
    def of(cls, values: dict[str, Any], reasons: list[str], confidence: dict[str, float]) -> Reading:
        """A reading of validated values; reasons are sorted and each stands once."""
        told = tuple(sorted(set(reasons)))
        shares = {name: round(confidence[name], 3) for name in FIELDS if name in confidence}
        return cls(**values, needs_review=bool(told), reasons=told, confidence=shares)

    @property
    def fields(self) -> dict[str, Any]:
        """The 11 fields alone."""
        return {name: getattr(self, name) for name in FIELDS}

    def flat(self) -> dict[str, Any]:
        """The flat JSON object: the 11 keys, `_needs_review`, `_reasons`, `_confidence`."""
        return self.model_dump(mode="json", by_alias=True)
