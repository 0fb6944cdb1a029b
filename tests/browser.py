"""A headless Chromium that clicks, drags and types, driven by its own debugging pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
EXECUTABLE = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--hide-scrollbars --disable-extensions --disable-background-networking about:blank"
).split()
KEYS = {
    "Tab": 9,
    "Enter": 13,
    " ": 32,
    "PageUp": 33,
    "PageDown": 34,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


class Browser:
    """One page of a headless Chromium. profile is an empty folder for its files.

    Chromium reads commands of the DevTools protocol from its file descriptor 3 and answers on 4, as
    JSON that ends in a zero byte.
    """

    def __init__(self, profile: Path):
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        shell = f'exec 3<&{read_commands} 4>&{write_answers}; exec "$@" 2>/dev/null'
        command = ["bash", "-c", shell, "bash", EXECUTABLE, f"--user-data-dir={profile}", *FLAGS]
        self.process = subprocess.Popen(command, pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_answers)
        self.number, self.received, self.session, self.errors = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def receive(self, seconds: float = 60) -> dict:
        deadline = time.monotonic() + seconds
        while b"\0" not in self.received:
            if not select.select([self.answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self.answers, 1 << 20)
            if not chunk:
                raise EOFError("the browser has ended")
            self.received += chunk
        line, self.received = self.received.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"]["exception"]["description"])
        return message

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def evaluate(self, script: str):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, motion: bool = False) -> None:
        """The page at a size in CSS pixels; narrower than 600 it is a phone's, with touch."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "no-preference" if motion else "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def centre(self, selector: str) -> tuple[float, float]:
        """The middle of an element on the screen. It is an error if another one covers it."""
        place = self.evaluate(f"""(() => {{
          const element = document.querySelector({json.dumps(selector)})
          element.scrollIntoView({{ block: "nearest" }})
          const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2
          const top = document.elementFromPoint(x, y)
          return {{ x, y, free: element.contains(top) || top?.contains(element) || top?.control === element }}
        }})()""")
        assert place["free"], f"{selector} is covered at {place}"
        return place["x"], place["y"]

    def mouse(self, kind: str, x: float, y: float) -> None:
        held = dict(button="left", clickCount=1, buttons=int(kind != "mouseReleased"))
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def click(self, selector: str) -> None:
        x, y = self.centre(selector)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def tap(self, selector: str) -> None:
        x, y = self.centre(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def drag(self, places: list[tuple[float, float]], touch: bool = False) -> None:
        """From the first place over the others, with the mouse or a finger."""
        names = ("touchStart", "touchMove", "touchEnd") if touch else ("mousePressed", "mouseMoved", "mouseReleased")
        for name, (x, y) in zip([names[0]] + [names[1]] * (len(places) - 1) + [names[2]], [*places, places[-1]]):
            if touch:
                points = [] if name == "touchEnd" else [{"x": x, "y": y}]
                self.call("Input.dispatchTouchEvent", type=name, touchPoints=points)
            else:
                self.mouse(name, x, y)

    def press(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                code = "Space" if key == " " else key
                text = {"text": "\r"} if key == "Enter" and kind == "rawKeyDown" else {}
                kind_of = "keyDown" if text else kind
                self.call(
                    "Input.dispatchKeyEvent", type=kind_of, key=key, code=code, windowsVirtualKeyCode=KEYS[key], **text
                )

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def screenshot(self, file: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **self.clip(whole))["data"]
        file.write_bytes(base64.b64decode(data))

    def clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def close(self) -> None:
        os.close(self.commands)
        os.close(self.answers)
        self.process.terminate()
        self.process.wait(10)
