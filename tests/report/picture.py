"""The picture of a report in the README: python -m tests.report.picture FILE.png, of the demo's job."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import open_page, start_browser
from tests.support.limits import HANG_S

PROGRAM = Path(sys.executable).with_name("batch-inference")
MAX_BYTES = 300_000
# An excerpt: the outcome of the job, and its images.
_EXCERPT = "#counts .aside, #speed, #predictions, #errors, #job, footer { display: none } body { padding-bottom: 20px }"


def take_picture(target: Path) -> None:
    """Run the demo, make its report, and take a picture of it."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([PROGRAM, "demo", "--output", name, "--quiet"], check=True, timeout=HANG_S)
        output = Path(name, "predictions")
        # One row of the most and one of the least confident images.
        subprocess.run([PROGRAM, "report", output, "--thumbnails", "6"], check=True, timeout=HANG_S)
        report = output / "_report/report.html"
        with start_browser() as browser, open_page(browser, report, width=960, height=700) as (page, _):
            page.add_style_tag(content=_EXCERPT)
            page.evaluate("document.querySelector('h1').textContent = 'demo-output/predictions'")
            data = page.screenshot(full_page=True)
    # Photos need few colors at this size, and the README loads faster.
    image = Image.open(io.BytesIO(data)).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT)
    image.save(target, optimize=True)
    size = target.stat().st_size
    print(f"{target}: {image.width} x {image.height} pixels, {size:,} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"more than {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
