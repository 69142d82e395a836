"""A browser for tests: headless Chromium spoken to through a pipe in the DevTools protocol, standard library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
FLAGS += ["--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--force-color-profile=srgb"]


class Browser:
    """One page. ``errors`` collects exceptions and console errors, ``requests`` every address it asked for."""

    def __init__(self, profile, width=1240, height=900):
        to_child, self.write_end = os.pipe()
        self.read_end, from_child = os.pipe()

        def as_three_and_four():  # where --remote-debugging-pipe reads and writes
            os.dup2(os.dup(to_child), 3)
            os.dup2(os.dup(from_child), 4)

        # Ours may be 3 and 4 already: move them out of the way first.
        to_child, from_child = (self._high(fd) for fd in (to_child, from_child))
        self.write_end, self.read_end = self._high(self.write_end), self._high(self.read_end)
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            preexec_fn=as_three_and_four,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self.buffer, self.number, self.session, self.errors, self.requests = b"", 0, None, [], []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.size(width, height)

    @staticmethod
    def _high(fd):
        import fcntl

        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20)
        os.close(fd)
        return moved

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)

    def send(self, method, **params):
        """The result of one command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self, limit=60.0):
        until = time.monotonic() + limit
        while b"\0" not in self.buffer:
            assert select.select([self.read_end], [], [], max(0, until - time.monotonic()))[0], "the browser is silent"
            piece = os.read(self.read_end, 1 << 20)
            assert piece, "the browser is gone"
            self.buffer += piece
        raw, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, params):
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def size(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, path, ready="document.readyState === 'complete'"):
        self.send("Page.navigate", url=path.as_uri())
        self.wait(f"location.protocol === 'file:' && Boolean({ready})")

    def run(self, script):
        """The value of a JavaScript expression (of a promise: what it resolves to)."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script, limit=30.0):
        until = time.monotonic() + limit
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}; errors {self.errors}"
            time.sleep(0.03)

    def mouse(self, kind, x, y, **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        self.mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def click_on(self, selector):
        """A click in the middle of an element, scrolled into view first."""
        box = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'center'}});"
            "const b = one.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click(*box)

    def key(self, key, text=None):
        code = {"text": text or key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **(code if kind == "keyDown" else {}))

    def type(self, text):
        self.send("Input.insertText", text=text)

    def picture(self, path, whole=False):
        """A PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(data["data"]))

    def _clip(self, whole):
        if not whole:
            return {}
        content = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**content, "x": 0, "y": 0, "scale": 1}}
