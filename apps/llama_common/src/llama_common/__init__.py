"""The data model of builds, models and presets, and what is derived from it. Pure: no I/O."""
