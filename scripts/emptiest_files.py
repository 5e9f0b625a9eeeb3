"""Print what share of lines and branches the suite runs, and the ten files of which it runs least.

usage: emptiest_files.py COVERAGE_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COUNT = 10


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    print(f"{report['totals']['percent_covered']:.1f} % of lines and branches")
    shares = []
    for path, file in report["files"].items():
        if file["summary"]["num_statements"] > 0:
            shares.append((file["summary"]["percent_covered"], path))
    for share, path in sorted(shares)[:COUNT]:
        print(f"{share:5.1f} %  {path}")


if __name__ == "__main__":
    main()
