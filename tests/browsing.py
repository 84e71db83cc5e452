"""Pages in a real browser, in real time: the page says when it is done, and nothing depends on how long that takes."""

import http.server
import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 600.0
"""Seconds after which a page that says nothing is given up."""
_REPORTS = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
async function until(what) {
  for (let i = 0; i < 6000 && !what(); i++) await new Promise((done) => setTimeout(done, 20));
}
addEventListener("load", async () => {
  const found = {};
  try { await (%s)(found); } catch (error) { errors.push(String(error.stack)); }
  found.errors = errors;
  fetch("http://127.0.0.1:%d/", { method: "POST", mode: "no-cors", body: JSON.stringify(found) });
});
</script>
"""


def found_in(browser: str, page: Path, script: str, width: int = 1400) -> dict[str, Any]:
    """What a script finds on a page, and the errors of both.

    Args:
        browser: a Chromium.
        page: an HTML file; what it loads lies beside it.
        script: a function of an object, which it fills. It may wait with ``await until(() => condition)``, which goes on after two minutes.
        width: of the window, in pixels.
    """
    said: list[bytes] = []
    done = threading.Event()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        mine = page.with_name(f"{page.stem}.browsed.html")
        mine.write_text(page.read_text(encoding="utf-8") + _REPORTS % (script, server.server_port), encoding="utf-8")
        listening = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        listening.start()
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={page.parent / 'profile'}"]
        command += ["--no-proxy-server", "--disable-background-networking", f"--window-size={width},900", mine.as_uri()]
        log = page.with_name("browser.log")
        try:
            with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
                try:
                    done.wait(LIMIT)
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        finally:
            server.shutdown()
            listening.join()
    assert said, f"the page said nothing in {LIMIT:g} s\n{log.read_text(errors='replace')[-2000:]}"
    return json.loads(said[0])
