"""Photograph reports in a browser, as wide as a phone and as a desk: the pictures in docs/_static.

    python docs/screenshots.py photons.nc kinetics.nc ...

writes ``report-photons-390.png``, ``report-photons-1280.png`` and so on for every posterior that is given,
as ``scivi.draw`` or ``scivi.predict`` made it, or for every page (``.html``). The posteriors of the pictures
come from the notebooks, ``result.to_netcdf("kinetics.nc", engine="h5netcdf")``, and from the first page of
the documentation. Needs Chromium on the path (``apt-get install chromium``), and speaks to it by a pipe.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import xarray as xr
from PIL import Image

from scivi.analysis import report

WIDTHS = (390, 1280)  # px: a phone held upright, a laptop
COLOURS = 256  # of the palette, the most that a PNG has; with fewer the pale grounds run into one another
SHARP = 2  # pixels of the picture for one of the page, on a phone


class Browser:
    """A headless Chromium with one page.

    Args:
        folder: for what it writes; empty.
    """

    def __init__(self, folder: str) -> None:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if found is None:
            raise SystemExit("there is no Chromium on the path: apt-get install chromium")
        asks, self._ask = os.pipe()
        self._hear, says = os.pipe()

        def place() -> None:  # Chromium reads from 3 and writes to 4
            first, second = os.dup(asks), os.dup(says)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._number, self._rest = itertools.count(1), b""
        command = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            command, close_fds=False, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(asks)
        os.close(says)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    _session: str | None = None

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask for one thing of the DevTools protocol, and wait for the answer."""
        number = next(self._number)
        message = {"id": number, "method": method, "params": values}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            self._rest += os.read(self._hear, 1 << 20)
        first, self._rest = self._rest.split(b"\0", 1)
        return json.loads(first)

    def photograph(
        self, page: Path, width: int, *, dark: bool = False, paper: bool = False, tallest: int | None = None
    ) -> Image.Image:
        """A page from its top.

        Args:
            page: the file.
            width: of the window in px.
            dark: as a reader sees it who asks for dark pages.
            paper: as it is printed.
            tallest: px of the page beyond which the picture ends; None: none.
        """
        sharp = SHARP if width < 600 else 1
        shape = {"width": width, "height": 800, "deviceScaleFactor": sharp, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **shape)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        if size["width"] > width:
            print(f"{page}: {size['width']} px wide in a window of {width}")
        height = min(size["height"], tallest or size["height"])
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        return Image.open(io.BytesIO(base64.b64decode(shot)))

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait(timeout=20)


def main() -> None:
    """Read the command line, and photograph what it names."""
    parser = argparse.ArgumentParser(description="Photograph reports of posteriors.")
    parser.add_argument("files", nargs="+", type=Path, help="posteriors (.nc, .zarr) or pages (.html)")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "_static")
    parser.add_argument("--tallest", type=int, default=2400, help="px of the page; 0: all of it")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--paper", action="store_true", help="as printed")
    asked = parser.parse_args()
    asked.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(f"{folder}/browser")
        for file in asked.files:
            page = file
            if file.suffix != ".html":
                page = Path(folder) / f"{file.stem}.html"
                with xr.open_datatree(file, chunks=None) as tree:
                    report(tree, to=page)
            for width in WIDTHS:
                image = browser.photograph(
                    page, width, dark=asked.dark, paper=asked.paper, tallest=asked.tallest or None
                )
                image = image.convert("RGB").quantize(
                    COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
                )
                image.save(asked.to / f"report-{file.stem}-{width}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
