"""Evidence that the console does what it is for, in a real headless Chromium on a real cluster.

    python tests/evidence/console.py [--pictures FOLDER]

With the mouse and with the keyboard alone: enters with the token (a wrong one is refused), looks at what a recipe would
do, submits it, watches it to its end, reads its curve (which must be what the API says), its log, its artifacts and the
report of its data; stops another run; then scales the endpoint from one replica to two, talks to the model, and sees
the service killed. No page may print an error, and none may be wider than a phone. The pictures are kept.

Needs the environment of `make setup` and Debian's `chromium`; playwright is fetched into .cache/tools. About six
minutes. Exits non-zero when a claim fails, and 77 where there is no chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from pipelines.service.client import ServiceClient  # noqa: E402
from tests.evidence.serving_tools import environment  # noqa: E402

PACKAGES = ("playwright==1.65.2",)
TOKEN = "a-token-for-the-console"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
OVERRIDES = "data.max_bytes=600000 tokenizer.vocab_size=512 train.steps=60 train.checkpoint_every=30"
LONG = "data.max_bytes=600000 tokenizer.vocab_size=512 train.steps=100000"
RUN_SECONDS, LOOK_SECONDS = 300, 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=REPOSITORY / ".cache" / "console")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no chromium here: apt-get install chromium", file=sys.stderr)
        return 77
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    programs = environment("playwright", *PACKAGES)
    sys.path.append(str(next((programs.parent / "lib").glob("python3*")) / "site-packages"))
    with tempfile.TemporaryDirectory(prefix="caravan-evidence-") as name, cluster(Path(name)) as (url, run):
        return Console(url, run, arguments.pictures).show(chromium)


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, Any]]:
    """A service with a token; yields its URL and a function that runs `caravan` there."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    variables["CARAVAN_HOME"] = str(folder / "home")
    token = folder / "token"
    token.touch(0o600)
    token.write_text(TOKEN)

    def run(*arguments: object) -> str:
        line = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        return subprocess.run(line, env=variables, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout

    record = json.loads(run("up", "--num-cpus", 2, "--token-file", token, "--allow", folder, "--json"))
    try:
        yield record["service_url"], run
    finally:
        run("down")


class Console:
    def __init__(self, url: str, caravan: Any, pictures: Path) -> None:
        self.url, self.caravan, self.pictures = url, caravan, pictures
        self.api = ServiceClient(url, TOKEN)
        self.claims: list[bool] = []
        self.errors: list[str] = []

    def show(self, chromium: str) -> int:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            self.page = browser.new_page(viewport=WIDE)
            self.page.set_default_timeout(1000 * LOOK_SECONDS)
            self.page.on("console", lambda line: self._hear(line))
            self.page.on("pageerror", lambda error: self.errors.append(str(error)[:300]))
            self.page.on("response", lambda answer: self._see(answer))
            try:
                for part in (
                    self.enter,
                    self.submit,
                    self.read,
                    self.stop,
                    self.scale,
                    self.talk,
                    self.by_keyboard,
                    self.survive,
                ):
                    part()
            except Exception as error:  # what the page looked like says more than a traceback
                self.page.screenshot(path=self.pictures / "failed.png", full_page=True)
                self.check(f"the story goes on to its end; failed.png shows where it did not: {error}", False)
            self.check(f"no page printed an error {self.errors[:3] or ''}", not self.errors)
            browser.close()
        self.api.close()
        return 0 if all(self.claims) else 1

    def check(self, what: str, holds: bool) -> None:
        self.claims.append(holds)
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)

    def _hear(self, line: Any) -> None:
        if line.type == "error" and "401" not in line.text:
            self.errors.append(line.text[:300])

    def _see(self, answer: Any) -> None:
        if not answer.url.startswith(self.url):
            self.errors.append(f"fetched {answer.url}")

    def picture(self, name: str) -> None:
        """Of both widths; on a phone nothing may stick out."""
        for kind, size in (("wide", WIDE), ("phone", PHONE)):
            self.page.set_viewport_size(size)
            self.page.wait_for_timeout(700)
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=self.pictures / f"{name}-{kind}.png", full_page=True)
            wide = self.page.evaluate("document.documentElement.scrollWidth")
            if kind == "phone":
                self.check(f"{name}: {wide} of {size['width']} columns on a phone", wide <= size["width"])
        self.page.set_viewport_size(WIDE)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    # -- the story

    def enter(self) -> None:
        page = self.page
        page.goto(f"{self.url}/")
        self.picture("login")
        for token in ("not-the-token-at-all", TOKEN):
            page.get_by_label("token").fill(token)
            page.get_by_role("button", name="Enter").click()
            if token != TOKEN:
                refused = page.get_by_role("alert").inner_text()
        page.get_by_role("heading", name="Runs").wait_for()
        self.check(f"a wrong token: {refused!r}; the right one opens the runs", "not the token" in refused)

    def submit(self) -> None:
        page = self.page
        page.get_by_role("link", name="New run").click()
        self._fill(OVERRIDES, until="export")
        page.get_by_role("button", name="What would it do?").click()
        page.get_by_role("cell", name="pretrain").first.wait_for()
        self.picture("new")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url("**/console/runs/*")
        self.run_id = page.url.rpartition("/")[2]
        page.get_by_role("cell", name="running").first.wait_for(timeout=1000 * RUN_SECONDS)
        self.check(f"run {self.run_id} is submitted, and seen to run", True)

    def _fill(self, overrides: str, until: str) -> None:
        page = self.page
        page.get_by_label("Begin with").click()
        page.get_by_role("option", name="quickstart.yaml").click()
        page.get_by_label("Overrides").fill(overrides)
        page.get_by_label("Until stage").fill(until)

    def read(self) -> None:
        page = self.page
        self.tab("Training")
        page.locator("[data-chart=loss] canvas").wait_for(timeout=1000 * RUN_SECONDS)
        self.picture("training-live")
        page.get_by_role("status").filter(has_text="done").first.wait_for(timeout=1000 * RUN_SECONDS)
        page.wait_for_timeout(3000)
        self.picture("training")
        drawn = self._points("loss")
        reported = [[row["step"], row["loss"]] for row in self._metrics()]
        self.check(f"the chart shows the loss of all {len(reported)} reports, to {drawn[-1]}", drawn == reported)
        loads = self._points("expert load")
        shares = self._metrics()[-1]["expert_load"]
        expected = sum(len(each) for each in shares.values())
        self.check(f"and the load of {len(loads)} experts", len(loads) == expected > 0)
        self.tab("Stages")
        self.picture("stages")
        self.tab("Log")
        page.get_by_role("log").get_by_text("pretrain").first.wait_for()
        self.picture("log")
        self.tab("Artifacts")
        page.get_by_role("cell", name="committed").first.wait_for()
        self.picture("artifacts")
        self.tab("Data")
        page.get_by_role("img", name="what became of the documents").wait_for()
        self.picture("data")
        self.tab("Recipe")
        page.get_by_text("vocab_size: 512").wait_for()
        self.check("its log, artifacts, report of the data and recipe are shown", True)

    def _points(self, chart: str) -> list[Any]:
        find = f"getElement(document.querySelector('[data-chart=\"{chart}\"]').id.slice(1)).chart"
        return self.page.evaluate(f"{find}.getOption().series[0].data")

    def _metrics(self) -> list[dict[str, Any]]:
        return self.api._json("GET", f"/api/runs/{self.run_id}/metrics")["rows"]

    def stop(self) -> None:
        page = self.page
        page.get_by_role("link", name="New run").click()
        self._fill(LONG, until="pretrain")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url("**/console/runs/*")
        page.get_by_role("status").filter(has_text="running").first.wait_for(timeout=60_000)
        page.get_by_role("row", name="pretrain").get_by_text("running").wait_for(timeout=60_000)
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("status").filter(has_text="stopped").first.wait_for(timeout=90_000)
        state = self.api.run(page.url.rpartition("/")[2])["state"]
        self.check(f"another run is stopped while it trains: {state}", state == "stopped")
        page.get_by_role("link", name="Runs").click()
        page.get_by_role("link", name=self.run_id).wait_for()
        self.picture("runs")

    def scale(self) -> None:
        page = self.page
        page.get_by_role("link", name="Endpoint").click()
        page.get_by_text("Nothing is deployed").wait_for()
        self.caravan("deploy", self.run_id, "--replicas", 1)
        page.get_by_role("cell", name="RUNNING").first.wait_for()
        page.get_by_label("Replicas").first.fill("2")
        page.get_by_role("button", name="Scale").click()
        page.get_by_role("cell", name="RUNNING").nth(1).wait_for(timeout=120_000)
        page.get_by_text("2 replicas running").wait_for(timeout=120_000)
        found = json.loads(self.caravan("status", "--json"))
        running = [each["state"] for each in found["replicas"]]
        self.check(f"scaled from one replica to two: {running}", running == ["RUNNING"] * 2)

    def talk(self) -> None:
        page = self.page
        for number, text in enumerate(("Hello! What is a list in Python?", "And a tuple?"), start=1):
            page.get_by_label("Message").fill(text)
            page.get_by_label("Message").press("Enter")
            page.locator("text=/prompt tokens, .* new/").nth(number - 1).wait_for()
        counts = page.locator("text=/prompt tokens, .* new/").all_inner_texts()
        cached = int(counts[1].split("prompt tokens, ")[1].split()[0])
        self.check(f"it answers twice, and the second time has {cached} prompt tokens in its cache", cached > 0)
        page.wait_for_timeout(3000)
        self.picture("endpoint")

    def by_keyboard(self) -> None:
        """From the list into the run and to its log, with Tab, Enter and the arrows."""
        page = self.page
        page.goto(f"{self.url}/console/")
        page.get_by_role("link", name=self.run_id).wait_for()
        self._tab_to(self.run_id)
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/console/runs/{self.run_id}")
        page.get_by_role("tab", name="Stages").wait_for()
        self._tab_to("Stages")
        for _ in range(2):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.get_by_role("log").get_by_text("pretrain").first.wait_for()
        self.check("a run's log is reached by the keyboard alone", True)

    def survive(self) -> None:
        """The service is killed; Ray starts it again, and the page comes back by itself."""
        page, port = self.page, urlsplit(self.url).port
        page.get_by_role("link", name="Runs").click()
        page.get_by_role("link", name=self.run_id).wait_for()
        page.evaluate("window.isOld = true")
        listening = [c.pid for c in psutil.net_connections("tcp4") if c.status == "LISTEN" and c.laddr.port == port]
        os.kill(listening[0], signal.SIGKILL)
        page.wait_for_function("!window.isOld", timeout=90_000)
        page.get_by_role("link", name=self.run_id).wait_for()
        self.check("the service is killed, and the page comes back by itself", True)
        self.errors = [error for error in self.errors if "WebSocket" not in error and "ERR_" not in error]

    def _tab_to(self, text: str) -> None:
        for _ in range(40):
            self.page.keyboard.press("Tab")
            if text in self.page.evaluate("document.activeElement.innerText || ''"):
                return
        raise AssertionError(f"{text!r} is not reached with Tab")


if __name__ == "__main__":
    sys.exit(main())
