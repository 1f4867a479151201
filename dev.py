#!/usr/bin/env python3
"""Sets spectune up in .venv and runs it; needs only Python 3.11 or newer, on Linux, macOS and Windows.

    python dev.py demo            installs what is needed, then runs the whole way on the embedded model
    python dev.py setup           everything for working on spectune; more arguments go to `pip install`
    python dev.py test            the tests, without the slow ones; more arguments go to pytest
    python dev.py lint [--fix]    ruff and pyright
    python dev.py bench NAME      benchmarks/NAME.py; more arguments go to it
    python dev.py experiment ...  repeats the experiments of docs/concepts/evidence.md, by name or all

Every command installs by itself what is missing or out of date. A torch that is already in .venv stays, so a
build for another GPU can be put there first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "spectune-stamp.json"
BENCHMARKS = ROOT / "benchmarks"
EXPERIMENTS = ROOT / "experiments" / "run_all.py"
RUN_LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 4)


class DevError(Exception):
    """Something that the person at the keyboard can mend; the text says how."""


def python_complaint(version: tuple[int, ...], executable: str) -> str:
    """What to tell somebody whose Python is too old, "" when it is not."""
    if version[:2] >= MIN_PYTHON:
        return ""
    wanted, got = (".".join(str(part) for part in parts) for parts in (MIN_PYTHON, version[:3]))
    return (
        f"spectune needs Python {wanted} or newer, {executable} is Python {got}\n"
        f"hint: install a newer one from python.org and start dev.py with it: python{wanted} dev.py demo"
    )


def venv_python(venv: Path, *, windows: bool) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if windows else venv / "bin" / "python"


def without_comments(lock: str) -> list[str]:
    """The requirement lines of a lock file, and its `-r` lines."""
    lines = (line.split("#")[0].strip() for line in lock.splitlines())
    return [line for line in lines if line]


def fingerprint(requirements: list[str], pyproject: str, python: str) -> str:
    """Changes whenever an installation made from these by this Python would be another one."""
    import tomllib  # not at the top: an older Python must come as far as the message about its age

    tables = tomllib.loads(pyproject)
    installed = {key: tables.get(key) for key in ("project", "build-system")}
    parts = [requirements, installed, python]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def keeps_torch(installed: str | None) -> bool:
    """Whether a torch that is already there is new enough to stay."""
    numbers = re.match(r"(\d+)\.(\d+)", installed or "")
    return numbers is not None and tuple(int(number) for number in numbers.groups()) >= MIN_TORCH


def with_torch(lines: list[str], installed: str | None) -> list[str]:
    """The requirement lines with torch pinned to the one that is there, when that one may stay."""
    if not keeps_torch(installed):
        return lines
    return [f"torch=={installed}" if re.match(r"torch\s*==", line) else line for line in lines]


def read_lock(name: str) -> list[str]:
    """The requirement lines of a lock file and of those that it refers to."""
    lines: list[str] = []
    for line in without_comments((ROOT / name).read_text(encoding="utf-8")):
        lines += read_lock(line[2:].strip()) if line.startswith("-r") else [line]
    return lines


def read_stamps() -> dict[str, str]:
    """What was installed, as {lock file: fingerprint}; a lost or damaged record means: nothing."""
    try:
        stamps = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*command: object) -> int:
    """Exit status of a command that is run from the root of the repository; Ctrl-C is left to the command."""
    # UTF-8 mode: recipes and captions are UTF-8 whatever the code page of a Windows console.
    environment = {**os.environ, "PYTHONUTF8": "1"}
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def query(python: Path, code: str) -> str | None:
    """What a line of Python prints in the virtual environment, None when it fails."""
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def make_venv() -> Path:
    """The interpreter of .venv, which is made first where it is missing."""
    python = venv_python(VENV, windows=os.name == "nt")
    # pip too: where the system lacks ensurepip, an environment is left behind that has none.
    ask = "import pip, sys; print(*sys.version_info[:3])"
    version = query(python, ask)
    if version is None:
        say(f"making {VENV.name} with Python {'.'.join(map(str, sys.version_info[:3]))}")
        made = run(sys.executable, "-m", "venv", VENV) == 0
        version = query(python, ask)
        if not made or version is None:
            raise DevError(
                f"no virtual environment could be made in {VENV.name}\n"
                "hint: delete that folder if it is there; Debian and Ubuntu need: apt install python3-venv"
            )
    complaint = python_complaint(tuple(int(number) for number in version.split()), str(python))
    if complaint:
        raise DevError(f"{complaint}\nhint: delete the folder {VENV.name} first")
    return python


def ensure(lock: str, pip_args: list[str] | None = None) -> Path:
    """The interpreter of .venv, with everything in `lock` and spectune itself installed there.

    Does nothing when that has been done and neither the lock file nor the project's own data has changed,
    unless there are arguments for pip.
    """
    python = make_venv()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = query(python, "import sys; print(sys.version_info[:2])") or ""
    # The lock for developers includes the other one.
    locks = (RUN_LOCK, DEV_LOCK) if lock == DEV_LOCK else (lock,)
    wanted = {name: fingerprint(read_lock(name), pyproject, version) for name in locks}
    stamps = read_stamps()
    if {**stamps, **wanted} == stamps and not pip_args:
        return python

    lines = read_lock(lock)
    torch = query(python, "import importlib.metadata as m; print(m.version('torch'))")
    say(f"installing {lock} into {VENV.name}" + (f"; torch {torch} stays" if keeps_torch(torch) else ""))
    pinned = VENV / "spectune-requirements.txt"
    pinned.write_text("\n".join(with_torch(lines, torch)) + "\n", encoding="utf-8")
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
    for target in (["-r", pinned], ["--no-deps", "-e", ROOT]):
        if run(*pip, *(pip_args or []), *target) != 0:
            raise DevError("pip could not install what spectune needs; its message stands above")
    # Written last: an installation that was interrupted is done again.
    STAMP.write_text(json.dumps({**stamps, **wanted}, indent=1) + "\n", encoding="utf-8")
    return python


def setup(args: list[str]) -> int:
    python = ensure(DEV_LOCK, args)
    say(f"ready: {python.relative_to(ROOT)} -m spectune --help")
    return 0


def demo(args: list[str]) -> int:
    return run(ensure(RUN_LOCK), "-m", "spectune", "demo", *args)


def test(args: list[str]) -> int:
    return run(ensure(DEV_LOCK), "-m", "pytest", "-m", "not slow", *args)


def lint(args: list[str]) -> int:
    """Runs all of the checkers, also when the first one complains."""
    python = ensure(DEV_LOCK)
    fix = "--fix" in args
    paths = [arg for arg in args if arg != "--fix"]
    checks = [
        ["ruff", "check", *(["--fix"] if fix else []), *(paths or ["."])],
        ["ruff", "format", *([] if fix else ["--check"]), *(paths or ["."])],
        ["pyright", "--pythonpath", python, *paths],
    ]
    statuses = [run(python, "-m", *check) for check in checks]
    # Not max(): a checker that a signal ended has a negative status.
    return int(any(statuses))


def bench(args: list[str]) -> int:
    names = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
    if not args or args[0] not in names:
        asked = f"there is no benchmark `{args[0]}`" if args else "which benchmark?"
        raise DevError(f"{asked}\nhint: {', '.join(names) or 'none exist yet'}")
    return run(ensure(DEV_LOCK), BENCHMARKS / f"{args[0]}.py", *args[1:])


def experiment(args: list[str]) -> int:
    return run(ensure(DEV_LOCK), EXPERIMENTS, *args)


COMMANDS = {
    "setup": setup,
    "demo": demo,
    "test": test,
    "lint": lint,
    "bench": bench,
    "experiment": experiment,
}


def main(argv: list[str]) -> int:
    complaint = python_complaint(tuple(sys.version_info[:3]), sys.executable)
    if complaint:
        say(f"error: {complaint}")
        return 2
    if argv and argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if not argv or argv[0] not in COMMANDS:
        say(f"error: dev.py has no command `{argv[0]}`\n" if argv else "error: dev.py needs a command\n")
        say(__doc__ or "")
        return 2
    try:
        return COMMANDS[argv[0]](argv[1:])
    except DevError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
