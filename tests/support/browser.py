"""A headless Chromium for tests of pages: at a width, in dark or light, with axe-core."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
DRIVER = shutil.which("chromedriver") or ""
MISSING = "" if CHROMIUM and DRIVER else "no chromium with chromedriver on this machine"
"""Why there is no browser; empty where there is one."""

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip
Theme = Literal["light", "dark"]


class Browser(Chrome):
    """Chromium with what the tests ask of a page."""

    def get(self, url: str) -> None:
        """Open a page and wait until it is whole; on a loaded machine the driver returns before."""
        super().get(url)
        whole = "return document.readyState === 'complete' && document.body !== null"
        WebDriverWait(self, 300).until(lambda _: self.execute_script(whole))

    def begin_anew(self) -> None:
        """Leave the page that is open, connected, and forget what it logged."""
        self.offline(False)
        self.get("about:blank")
        self.complaints()

    def offline(self, away: bool) -> None:
        """Take the network away from all pages, or give it back."""
        conditions = {
            "offline": away,
            "latency": 0,
            "downloadThroughput": -1,
            "uploadThroughput": -1,
        }
        self.execute_cdp_cmd("Network.enable", {})
        self.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def show(self, url: str, *, width: int, theme: Theme, height: int = 900) -> None:
        """Open a page at a width in a colour scheme that the reader prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.get(url)

    def picture(self, path: Path, *, height: int = 0) -> Path:
        """The page as a file of the kind that its name ends in (``png``, ``webp``); whole, or from
        the top to a height."""
        import base64

        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".")
        asked: dict[str, Any] = {"format": kind, "captureBeyondViewport": True}
        if kind == "webp":
            asked["quality"] = 70
        # Chrome itself, asked for all of a page that is just laid out anew, may find no width.
        size = "return [innerWidth, document.documentElement.scrollHeight]"
        width, whole = self.execute_script(size)
        asked["clip"] = {"x": 0, "y": 0, "width": width, "height": min(height or whole, whole),
                         "scale": 1}  # fmt: skip
        shot = self.execute_cdp_cmd("Page.captureScreenshot", asked)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def serious_faults(
        self, within: Sequence[str] = ("html",), without: Sequence[str] = ()
    ) -> list[str]:
        """What axe-core finds serious or critical, a line each; both are CSS selectors."""
        self.execute_script((files("axe_core_python") / "axe.min.js").read_text())
        found: dict[str, Any] = self.execute_async_script(
            "const [within, without, done] = arguments;"
            "const each = (selectors) => selectors.map((one) => [one]);"
            "axe.run({include: each(within), exclude: each(without)}).then(done);",
            list(within),
            list(without),
        )
        return [
            f"{rule['id']} ({rule['impact']}): {node['html'][:120]} {node['failureSummary'][:200]}"
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]

    def too_wide(self) -> int:
        """By how many pixels the page is wider than the window."""
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        return int(self.execute_script(script))

    def complaints(self) -> list[str]:
        """What the page logged as errors, refused by the policy or not found."""
        return [entry["message"] for entry in self.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile."""
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Browser(options=options, service=Service(DRIVER))
    browser.set_script_timeout(300)  # axe looks at hundreds of squares; machines are slow
    try:
        yield browser
    finally:
        browser.quit()
