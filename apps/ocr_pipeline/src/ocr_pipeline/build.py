"""A pipeline from settings: each stage's backend by its name."""

from __future__ import annotations

from importlib import resources

from ocr_pipeline import templates
from ocr_pipeline.audit import PlateAuditor
from ocr_pipeline.detect import SHIPPED, OnnxDetector, TextDetector
from ocr_pipeline.parser import Parser
from ocr_pipeline.pipeline import Pipeline
from ocr_pipeline.rapid import RapidVision, TextFinder
from ocr_pipeline.settings import Settings
from ocr_pipeline.stages import Detector, Reasoner, Vision


def pipeline(settings: Settings | None = None) -> Pipeline:
    """The pipeline. Raises SettingsError for weights or templates that cannot be used; starts no server."""
    settings = settings or Settings()
    rapid = RapidVision(settings.vision.threads)
    return Pipeline(
        _detectors(settings, rapid),
        _vision(settings, rapid),
        _reasoner(settings),
        PlateAuditor(),
        limits=settings.limits,
        seconds_per_image=settings.seconds_per_image,
    )


def _detectors(settings: Settings, rapid: RapidVision) -> list[Detector]:
    chosen = settings.detector
    found: list[Detector] = []
    if chosen.backend == "onnx" and (
        chosen.weights or (resources.files("ocr_pipeline") / "data" / SHIPPED).is_file()
    ):
        found.append(OnnxDetector(chosen.weights, chosen.classes, chosen.score, settings.vision.threads))
    if chosen.backend == "text" or (chosen.backend == "onnx" and chosen.fallback_text):
        found.append(TextDetector(TextFinder(rapid)))
    return found


def _vision(settings: Settings, rapid: RapidVision) -> Vision:
    if settings.vision.backend == "rapidocr":
        return rapid
    from ocr_pipeline.servers import ServerVision

    return ServerVision(settings.vision, settings.gpu_lock)


def _reasoner(settings: Settings) -> Reasoner:
    known = templates.load(settings.templates)
    if settings.reasoning.backend == "parser":
        return Parser(known)
    from ocr_pipeline.servers import ServerReasoner

    return ServerReasoner(settings.reasoning, known, settings.gpu_lock)
