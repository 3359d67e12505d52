"""Field photos of transformer nameplates in, 11 validated fields out. docs/ocr.md explains it."""
