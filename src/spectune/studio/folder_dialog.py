"""The system's dialog to choose a folder, in a process of its own: on the screen of the server's computer."""

from __future__ import annotations

import subprocess
import sys

from spectune.errors import SpectuneError

_SECONDS = 600
_CODE = """
import sys, tkinter, tkinter.filedialog
root = tkinter.Tk()
root.withdraw()
root.attributes("-topmost", True)
folder = tkinter.filedialog.askdirectory(parent=root, title=sys.argv[1], mustexist=True)
sys.stdout.buffer.write(str(folder or "").encode())
"""


def choose_folder(title: str) -> str:
    """Return the folder that the user chooses, or "" if none.

    Raises SpectuneError if this computer cannot show the dialog.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CODE, title], capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    if done.returncode:
        raise SpectuneError("this computer cannot show a dialog", hint="type or paste the path of the folder")
    return done.stdout.decode("utf-8", "replace")
