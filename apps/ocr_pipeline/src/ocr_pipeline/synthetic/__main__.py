"""`python -m ocr_pipeline.synthetic FOLDER --seed N --count N`: labelled photos. Exit codes: 0 written, 2
bad usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ocr_pipeline.synthetic import dataset


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m ocr_pipeline.synthetic", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="of the first photo")
    parser.add_argument("--count", type=int, default=30)
    args = parser.parse_args()
    try:
        dataset.write(args.folder, args.seed, args.count)
    except OSError as error:
        print(f"synthetic: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
