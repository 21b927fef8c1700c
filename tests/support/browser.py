"""Pages in a real browser without a window: Chromium, told what to do by a script that is added to the page."""

import html
import json
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The browser's program; the test is skipped where there is none."""
    for name in NAMES:
        if program := shutil.which(name):
            return program
    pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is on the path (Debian: apt install chromium)")


def run(page, script, folder, size=(1400, 900)):
    """Open the text of a page, run `script` in it, and return what its function ``test()`` returns.

    Errors of the page's own script are raised here, and no name of a host can be resolved.
    """
    program = find()
    added = """<script>
    const problems = [];
    window.addEventListener("error", event => problems.push(String(event.message)));
    </script>"""
    after = f"""<script>
    {script}
    const done = value => document.documentElement.setAttribute("data-result", JSON.stringify([problems, value]));
    Promise.resolve().then(test).then(done, error => done(String(error)));
    </script>"""
    text = page.replace("<head>", "<head>" + added, 1).replace("</body>", after + "</body>", 1)
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}",
        "--host-resolver-rules=MAP * ~NOTFOUND", path.as_uri(),
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-result="([^"]*)"', answer.stdout)
    assert found, answer.stdout[-2000:] + answer.stderr[-2000:]
    problems, value = json.loads(html.unescape(found.group(1)))
    assert not problems
    return value
