"""What protects the GPU of an OCR box, worked out from its variables: five layers, each with a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUP = "ocr_servers"
PERSISTENCE = "nvidia-persistenced.service"


@dataclass(frozen=True)
class OcrBox:
    """One OCR box as its inventory wants it."""

    user: str
    path: str
    state_dir: str
    workers: int
    competing_units: tuple[str, ...]
    card: bool
    host: str
    port: int

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> OcrBox:
        """The box that templated variables describe."""
        return cls(
            user=str(variables["ocr_service_user"]),
            path=str(variables["ocr_service_path"]),
            state_dir=str(variables["ocr_service_state_dir"]),
            workers=int(variables["ocr_service_workers"]),
            competing_units=tuple(variables["ocr_service_competing_units"]),
            card=bool(variables.get("llama_presets_gpu_memory_mib")),
            host=str(variables["ocr_service_host"]),
            port=int(variables["ocr_service_port"]),
        )

    def request(self) -> dict[str, Any]:
        """What the probe is to look at."""
        return {
            "user": self.user,
            "check": [
                f"{self.path}/bin/python", "-I", "-m", "ocr_pipeline.gpu_check", "/etc/ocr/pipeline.json",
            ],
            "workers": [f"ocr-worker@{number}.service" for number in range(1, self.workers + 1)],
            "persistence": PERSISTENCE,
        }  # fmt: skip
