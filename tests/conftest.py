import copy
import os
import shutil

import pytest
import torch
from hypothesis import Phase, settings

from lightning_polydis import html_figures
from tests.networks import Classifier, conv_relu_net, train_briefly
from tests.sample_reports import sample_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

quick = [Phase.explicit, Phase.generate]  # to make a failing example smaller takes minutes: nightly
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, phases=quick)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The tests' networks are so small that more threads only wait for each other, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net():
    """A small network, trained; whoever changes it takes a copy."""
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


@pytest.fixture(scope="module")
def state(net):
    return copy.deepcopy(net.state_dict())


@pytest.fixture
def module(state):
    module = Classifier()
    module.net.load_state_dict(state)
    return module


# ------------------------------------------------------------------------------------------------ the HTML page


@pytest.fixture(scope="module")
def two_layers():
    return sample_report(n_flagged=4, layers=("net.layer3.5.conv2", "net.layer4.2.conv3"))


@pytest.fixture
def real_figures():
    """Asked for by tests that want matplotlib to draw; the others need not wait for it."""


@pytest.fixture
def no_figures(request, monkeypatch):
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr(html_figures, "_picture", lambda draw: ("data:image/png;base64,", 300, 200))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with playwright.sync_playwright() as drive:
        context = drive.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=[*flags.split(), "--disable-component-update", "--disable-sync"],
        )
        yield context
        context.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a report's page (`None`: the one that is there); whatever it logs, asks for or says makes the test fail."""
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: complaints.append(request.url) if "://" in request.url[:8] else None)
    page.on("requestfailed", lambda request: complaints.append(request.url[:100]))

    def opened(report, width=1280, height=900, **media):
        if report is not None:
            report.to_html(tmp_path / "report.html")
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(**media)
        page.goto(f"file://{tmp_path / 'report.html'}")
        return page

    yield opened
    page.close()
    assert [one for one in complaints if not one.startswith("file://")] == []
