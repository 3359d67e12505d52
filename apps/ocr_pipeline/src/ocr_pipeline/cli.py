"""`ocr-pipeline`: read one photo, without a service.

Exit codes: 0 the reading was printed (`_needs_review` inside it may be true), 1 a backend failed, 2 bad
usage: no such
file, no photo that is read, settings that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """The reading is one flat JSON object: the 11 fields, _needs_review, _reasons, _confidence.

exit codes: 0 the reading was printed, 1 a backend failed, 2 bad usage or no photo that is read"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ocr-pipeline", description="Read transformer nameplates: a photo in, 11 fields as JSON out."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    read = verbs.add_parser(
        "read",
        help="the fields of one photo",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    read.add_argument("photo", type=Path, metavar="PHOTO", help="JPEG, PNG or WebP")
    read.add_argument(
        "--explain", type=Path, metavar="OUT.png", help="also write a picture of how it was read"
    )
    read.add_argument(
        "--context", choices=["nameplate", "transformer_plate"], help="what the photo is known to show"
    )
    text = verbs.add_parser("text", help="the raw text of one photo, with the pole's filters")
    text.add_argument("photo", type=Path, metavar="PHOTO")
    for verb in (read, text):
        verb.add_argument(
            "--settings", metavar="FILE", help="YAML or JSON (default: $OCR_PIPELINE_SETTINGS, else embedded)"
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse(argv)
    from ocr_pipeline.errors import EXIT_USAGE, OcrError

    try:
        return run(args)
    except OcrError as error:
        print(f"ocr-pipeline: {args.photo}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"ocr-pipeline: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("ocr-pipeline: interrupted", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """What the command line says. Raises OcrError, OSError."""
    from ocr_pipeline import build, settings
    from ocr_pipeline.errors import EXIT_DONE, SettingsError
    from ocr_pipeline.stages import PoleIdContext

    chosen = settings.load(args.settings)
    with args.photo.open("rb") as file:
        data = file.read(chosen.max_bytes + 1)
    pipeline = build.pipeline(chosen)
    if args.verb == "text":
        print(pipeline.text(data).text)
        return EXIT_DONE
    if args.explain and args.explain.suffix.lower() != ".png":
        raise SettingsError(f"--explain {args.explain}: its name must end in .png")
    if args.explain and not args.explain.parent.is_dir():
        raise SettingsError(f"--explain {args.explain}: there is no folder {args.explain.parent}")
    found = pipeline.inspect(data, pole_id_context=PoleIdContext(args.context) if args.context else None)
    # Before the picture, which a full disk may refuse: the reading is what took the time.
    print(json.dumps(found.reading.flat(), ensure_ascii=False, indent=2), flush=True)
    if args.explain:
        from ocr_pipeline import explain

        explain.picture(found).save(args.explain)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
