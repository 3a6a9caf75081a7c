"""What several test files share: a browser."""

import shutil

import pytest

FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update""".split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser with an empty profile."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: no page was tried in a browser.")
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: make install."
    )
    with api.sync_playwright() as play:
        profile = tmp_path_factory.mktemp("profile")
        started = play.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=FLAGS
        )
        yield started
        started.close()
