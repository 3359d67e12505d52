"""Tables for people, rendered from the data."""

from __future__ import annotations

from llama_common.presets import HostConfig, Preset, Speed

_HEADINGS = (
    "preset",
    "aliases",
    "description",
    "build",
    "model",
    "context",
    "KV cache",
    "generation",
    "prefill",
)


def preset_table(config: HostConfig) -> str:
    """The presets of one host as a Markdown table, in the order of the data, with a newline at its end."""
    rows = [
        _HEADINGS,
        ("---",) * len(_HEADINGS),
        *(_row(name, preset) for name, preset in config.llama_presets.items()),
    ]
    return "".join(f"| {' | '.join(_cell(text) for text in row)} |\n" for row in rows)


def _row(name: str, preset: Preset) -> tuple[str, ...]:
    slots = f" in {preset.parallel} slots" if preset.parallel > 1 else ""
    return (
        f"`{name}`",
        ", ".join(f"`{alias}`" for alias in preset.aliases),
        preset.description,
        preset.build,
        preset.model + (f" + draft {preset.draft}" if preset.draft != "none" else ""),
        f"{preset.context} tokens{slots}",
        preset.kv_cache_type,
        _speed(preset.expect.generation_tok_s),
        _speed(preset.expect.prefill_tok_s),
    )


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return ""
    floor = f", at least {speed.floor:g}" if speed.floor is not None else ""
    return f"{speed.target:g} tok/s{floor}"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|") if not set(text) <= {"-"} else text
