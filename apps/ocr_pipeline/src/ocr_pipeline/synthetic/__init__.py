"""Synthetic field photos with known answers, deterministic by seed: `python -m ocr_pipeline.synthetic`.

`plates` draws a nameplate from its values, `scene` puts it into a field photo and spoils that, `dataset`
writes a folder
of labelled photos. The figures in docs/benchmarks/ocr.md are of such photos; the detector is trained on them.
"""
