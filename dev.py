#!/usr/bin/env python3
"""Install spectune in .venv and run it. Needs only Python 3.11 or newer, on Linux, macOS or Windows.

    python dev.py demo            run the whole workflow on the embedded model
    python dev.py studio          open spectune as a page in the browser; start-studio.bat and .sh do the same
    python dev.py setup           install everything for development; further arguments go to `pip install`
                                  --torch cu130: install this build of torch (see below)
    python dev.py test            run the tests except the slow ones; further arguments go to pytest
                                  --browser: run the tests in Chromium instead; --shots FOLDER: screenshots
    python dev.py lint [--fix]    run ruff and pyright
    python dev.py docs            build the documentation site; warnings are errors
                                  --serve: show it in a browser; --write: regenerate the generated pages first
    python dev.py bench NAME      run benchmarks/NAME.py; further arguments go to it
    python dev.py fuzz MINUTES    try bad files, recipes and commands; --seed N, --only TARGET
    python dev.py faults [COUNT]  kill commands, fill the disk, change inputs; --help lists the options
    python dev.py experiment ...  repeat the experiments of docs/concepts/evidence.md, by name or all

Every command first installs packages that are missing or out of date. A torch that is already in .venv
stays. Otherwise dev.py looks for an NVIDIA or AMD card and installs the build of torch for it; without a
card, pip chooses. `setup --torch BUILD` installs a build, also in the place of another one: cu130 (NVIDIA,
driver 580 or newer), cu126 (older drivers, and cards before RTX 20), cu132, rocm (AMD, Linux), cpu.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "spectune-stamp.json"
BENCHMARKS = ROOT / "benchmarks"
EXPERIMENTS = ROOT / "experiments" / "run_all.py"
PAGE_GENERATOR = ROOT / "docs" / "generate.py"
RUN_LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
HASHES = "requirements.hashes"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 4)
# The builds of the locked torch on download.pytorch.org.
BUILDS = ("cu126", "cu130", "cu132", "rocm7.2", "cpu")
NEWEST_CUDA, OLDER_CUDA, ROCM = "cu130", "cu126", "rocm7.2"
# What CUDA 13 needs: a driver, and a compute capability (Turing). CUDA 12.6 has no kernels for Blackwell.
CUDA_13_DRIVER, TURING, BLACKWELL = 580, (7, 5), (10, 0)


class DevError(Exception):
    """An error that the user can fix, with a hint."""


def python_complaint(version: tuple[int, ...], executable: str) -> str:
    """Return an error message if Python is too old, otherwise an empty string."""
    if version[:2] >= MIN_PYTHON:
        return ""
    required, found = (".".join(str(part) for part in parts) for parts in (MIN_PYTHON, version[:3]))
    return (
        f"spectune needs Python {required} or newer, {executable} is Python {found}\n"
        f"hint: install a newer Python from python.org and run dev.py with it: python{required} dev.py demo"
    )


def venv_python(venv: Path, *, windows: bool) -> Path:
    """Return the path of the interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if windows else venv / "bin" / "python"


def without_comments(lock: str) -> list[str]:
    """Return the requirement lines and the `-r` lines of a lock file."""
    lines = (line.split("#")[0].strip() for line in lock.splitlines())
    return [line for line in lines if line]


def fingerprint(requirements: list[str], pyproject: str, python: str) -> str:
    """Return a hash of everything that determines an installation."""
    import tomllib  # not at the top, so that an older Python reaches the error about its version

    tables = tomllib.loads(pyproject)
    installed = {key: tables.get(key) for key in ("project", "build-system")}
    parts = [requirements, installed, python]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def keeps_torch(installed: str | None) -> bool:
    """Return whether an installed torch is new enough to keep."""
    version = re.match(r"(\d+)\.(\d+)", installed or "")
    return version is not None and tuple(int(part) for part in version.groups()) >= MIN_TORCH


def with_torch(lines: list[str], installed: str | None) -> list[str]:
    """Return the requirement lines, with torch pinned to the installed version if that is new enough."""
    if not keeps_torch(installed):
        return lines
    return [f"torch=={installed}" if re.match(r"torch\s*==", line) else line for line in lines]


def cuda_build(rows: str) -> str | None:
    """Return the build for the cards in the output of nvidia-smi, or None if there are none.

    Each row of the output has a driver version and a compute capability: `580.95.05, 8.6`.
    """
    found = re.findall(r"^\s*(\d+)[\d.]*,\s*(\d+)\.(\d+)\s*$", rows, flags=re.MULTILINE)
    if not found:
        return None
    driver = int(found[0][0])
    cards = [(int(major), int(minor)) for _, major, minor in found]
    if driver >= CUDA_13_DRIVER and min(cards) >= TURING:
        return NEWEST_CUDA
    return OLDER_CUDA if max(cards) < BLACKWELL else NEWEST_CUDA


def find_build() -> str | None:
    """Return the build of torch for the card of this machine, or None if pip is to choose."""
    if shutil.which("nvidia-smi"):
        rows = output_of("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
        build = cuda_build(rows or "")
        if build is not None:
            return build
    # The device file exists only if the driver of an AMD card is loaded.
    tools = shutil.which("rocminfo") or shutil.which("rocm-smi") or Path("/opt/rocm").is_dir()
    return ROCM if sys.platform == "linux" and tools and Path("/dev/kfd").exists() else None


def parse_build(word: str) -> str | None:
    """Return a build of torch by name, or None for auto."""
    if word == "auto":
        return None
    build = ROCM if word == "rocm" else word
    if build not in BUILDS:
        raise DevError(
            f"there is no build `{word}` of torch\nhint: choose from auto, rocm, {', '.join(BUILDS)}"
        )
    if sys.platform == "darwin":
        raise DevError("macOS has only one build of torch\nhint: leave out --torch")
    return build


def split_torch_option(args: list[str]) -> tuple[str | None, list[str]]:
    """Return the build that `--torch BUILD` or `--torch=BUILD` names, and the other arguments."""
    build, rest, words = None, [], iter(args)
    for word in words:
        if word == "--torch":
            build = parse_build(next(words, ""))
        elif word.startswith("--torch="):
            build = parse_build(word[len("--torch=") :])
        else:
            rest.append(word)
    return build, rest


def read_lock(name: str) -> list[str]:
    """Return the requirement lines of a lock file and of the files that it includes."""
    lines: list[str] = []
    for line in without_comments((ROOT / name).read_text(encoding="utf-8")):
        lines += read_lock(line[2:].strip()) if line.startswith("-r") else [line]
    return lines


def pin_of(line: str) -> str:
    """Return `name==version` of a requirement line, without its marker."""
    return line.split(";")[0].strip()


def with_hashes(lines: list[str]) -> list[str]:
    """Return the requirement lines with the hashes of their files, without torch, whose builds have none."""
    rows = (line.split() for line in (ROOT / HASHES).read_text(encoding="utf-8").splitlines())
    hashes = {row[0]: row[1:] for row in rows if row}
    pins = [line for line in lines if not re.match(r"torch\s*==", line)]
    return [" ".join([line, *(f"--hash=sha256:{one}" for one in hashes[pin_of(line)])]) for line in pins]


def read_stamps() -> dict[str, str]:
    """Read {lock file: fingerprint} of the installation, or {} if the record is missing or damaged."""
    try:
        stamps = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*command: object) -> int:
    """Run a command in the root of the repository and return its exit status. Ctrl-C goes to the command."""
    # UTF-8 mode: recipes and captions are UTF-8, even if the code page of a Windows console is not.
    # The other variable silences an announcement of MkDocs.
    environment = {**os.environ, "PYTHONUTF8": "1", "NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def output_of(*command: str) -> str | None:
    """Return what a command prints, or None if it fails."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def query(python: Path, code: str) -> str | None:
    """Return what a line of Python prints in the virtual environment, or None if it fails."""
    return output_of(str(python), "-c", code)


def torch_version(python: Path) -> str:
    """Return the version of the installed torch with its build, such as 2.13.0+cpu; "" without torch.

    The version that pip knows lacks the build if the package comes from PyPI.
    """
    code = (
        "import importlib.metadata as m, runpy; "
        "print(runpy.run_path(str(m.distribution('torch').locate_file('torch/version.py')))['__version__'])"
    )
    return query(python, code) or ""


def pip_install(python: Path) -> list[object]:
    """Return the command to install packages. See `compile_modules` for `--no-compile`."""
    return [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]


def compile_modules(python: Path) -> None:
    """Compile all modules if Python does not compile those that it imports.

    pip would compile 14,000 modules with one process, which takes a minute.
    """
    if sys.dont_write_bytecode:
        folder = query(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        run(python, "-m", "compileall", "-qq", "-j", "0", folder)


def place_torch(python: Path, lines: list[str], build: str | None) -> None:
    """Install the requested build of torch, or the one for this machine's card if there is no torch."""
    old = torch_version(python)
    if build is None and not keeps_torch(old):
        build = find_build()
    if build is None or (keeps_torch(old) and old.partition("+")[2] == build):
        return
    (locked,) = [line for line in lines if re.match(r"torch\s*==", line)]
    new = f"{locked.partition('==')[2].split(';')[0].strip()}+{build}"
    say(f"replacing torch {old} by torch {new}" if old else f"installing torch {new}")
    index = f"https://download.pytorch.org/whl/{build}"
    if run(*pip_install(python), f"torch=={new}", "--index-url", index) != 0:
        raise DevError(
            "pip failed; its message is above\n"
            f"hint: install a torch of your choice first: {python} -m pip install torch; dev.py keeps it"
        )


def warn_of_unused_card(python: Path) -> None:
    """Say which command installs a build of torch for the card, if the installed build is for CPUs."""
    version = torch_version(python)
    build = find_build() if version.endswith("+cpu") else None
    if build is not None:
        say(f"warning: torch {version} does not use this computer's graphics card")
        say(f"hint: python dev.py setup --torch {build}")


def make_venv() -> Path:
    """Return the interpreter of .venv; create .venv if it is missing."""
    python = venv_python(VENV, windows=os.name == "nt")
    # Also import pip: without ensurepip, creation fails and leaves an environment without pip.
    probe = "import pip, sys; print(*sys.version_info[:3])"
    version = query(python, probe)
    if version is None:
        say(f"creating {VENV.name} with Python {'.'.join(map(str, sys.version_info[:3]))}")
        created = run(sys.executable, "-m", "venv", VENV) == 0
        version = query(python, probe)
        if not created or version is None:
            raise DevError(
                f"cannot create a virtual environment in {VENV.name}\n"
                "hint: delete this folder if it exists; on Debian and Ubuntu run: apt install python3-venv"
            )
    complaint = python_complaint(tuple(int(part) for part in version.split()), str(python))
    if complaint:
        raise DevError(f"{complaint}\nhint: delete the folder {VENV.name} first")
    return python


def install(python: Path, pip_args: list[str] | None, lines: list[str], *options: str) -> None:
    """Install requirement lines."""
    pinned = VENV / "spectune-requirements.txt"
    pinned.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if run(*pip_install(python), *(pip_args or []), *options, "-r", pinned) != 0:
        raise DevError(
            "pip failed; its message is above\n"
            "hint: if it names a hash, a file is not the one that was tested: do not install it"
        )


def ensure(lock: str, pip_args: list[str] | None = None, *, build: str | None = None) -> Path:
    """Install `lock` and spectune itself into .venv, and return the interpreter of .venv.

    The installation is skipped if the lock file and the project metadata have not changed since the last one
    and there are no `pip_args` and no `build` of torch.
    """
    python = make_venv()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = query(python, "import sys; print(sys.version_info[:2])") or ""
    # The development lock includes the run lock.
    locks = (RUN_LOCK, DEV_LOCK) if lock == DEV_LOCK else (lock,)
    current = {name: fingerprint(read_lock(name), pyproject, version) for name in locks}
    stamps = read_stamps()
    if {**stamps, **current} == stamps and not pip_args and build is None:
        return python

    lines = read_lock(lock)
    say(f"installing {lock} into {VENV.name}")
    install(python, pip_args, with_hashes(lines), "--require-hashes", "--no-deps")
    place_torch(python, lines, build)
    torch = query(python, "import importlib.metadata as m; print(m.version('torch'))")
    if keeps_torch(torch):
        say(f"keeping torch {torch}")
    install(python, pip_args, with_torch(lines, torch))
    if run(*pip_install(python), *(pip_args or []), "--no-deps", "-e", ROOT) != 0:
        raise DevError("pip failed; its message is above")
    compile_modules(python)
    # Written last, so that an interrupted installation is repeated.
    STAMP.write_text(json.dumps({**stamps, **current}, indent=1) + "\n", encoding="utf-8")
    return python


def setup(args: list[str]) -> int:
    build, pip_args = split_torch_option(args)
    python = ensure(DEV_LOCK, pip_args, build=build)
    warn_of_unused_card(python)
    say(f"ready: {python.relative_to(ROOT)} -m spectune --help")
    return 0


def demo(args: list[str]) -> int:
    return run(ensure(RUN_LOCK), "-m", "spectune", "demo", *args)


def studio(args: list[str]) -> int:
    python = ensure(RUN_LOCK)
    warn_of_unused_card(python)
    return run(python, "-m", "spectune", "studio", *args)


def test(args: list[str]) -> int:
    # One process per core with one thread each: small tensors gain nothing from more threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Workers print warnings of transformers about torchvision after the summary of pytest.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    python = ensure(DEV_LOCK)
    if "--browser" in args:
        return browser_test(python, [arg for arg in args if arg != "--browser"])
    return run(python, "-m", "pytest", "-m", "not slow", "-n", "logical", "--dist", "worksteal", *args)


def browser_test(python: Path, args: list[str]) -> int:
    """Run the tests of the Studio in Chromium; without one on this machine, Playwright downloads its own."""
    found = os.environ.get("SPECTUNE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found and run(python, "-m", "playwright", "install", "chromium") != 0:
        raise DevError("no browser was installed\nhint: set SPECTUNE_CHROMIUM to a Chromium or Chrome")
    return run(python, "-m", "pytest", "-m", "browser", "tests/studio", *args)


def lint(args: list[str]) -> int:
    """Run all checkers, even if the first one fails."""
    python = ensure(DEV_LOCK)
    fix = "--fix" in args
    paths = [arg for arg in args if arg != "--fix"]
    checks = [
        ["ruff", "check", *(["--fix"] if fix else []), *(paths or ["."])],
        ["ruff", "format", *([] if fix else ["--check"]), *(paths or ["."])],
        ["pyright", "--pythonpath", python, *paths],
    ]
    statuses = [run(python, "-m", *check) for check in checks]
    # Not max(): a checker that was ended by a signal has a negative status.
    return int(any(statuses))


def docs(args: list[str]) -> int:
    """Build the documentation site with warnings as errors."""
    unknown = [arg for arg in args if arg not in ("--serve", "--write")]
    if unknown:
        raise DevError(f"docs has no option `{unknown[0]}`\nhint: choose from --serve, --write")
    python = ensure(DEV_LOCK)
    if "--write" in args:
        status = run(python, PAGE_GENERATOR)
        if status != 0:
            return status
    return run(python, "-m", "mkdocs", "serve" if "--serve" in args else "build", "--strict")


def bench(args: list[str]) -> int:
    names = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
    if not args or args[0] not in names:
        problem = f"there is no benchmark `{args[0]}`" if args else "expected the name of a benchmark"
        raise DevError(f"{problem}\nhint: choose from {', '.join(names) or 'none, the folder is empty'}")
    return run(ensure(DEV_LOCK), BENCHMARKS / f"{args[0]}.py", *args[1:])


def fuzz(args: list[str]) -> int:
    # Small tensors gain nothing from more threads, and the CPU time of an input is measured.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run(ensure(DEV_LOCK), "-m", "tests.fuzz", *args)


def faults(args: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run(ensure(DEV_LOCK), "-m", "tests.faults", *args)


def experiment(args: list[str]) -> int:
    return run(ensure(DEV_LOCK), EXPERIMENTS, *args)


COMMANDS = {
    "setup": setup,
    "demo": demo,
    "studio": studio,
    "test": test,
    "lint": lint,
    "docs": docs,
    "bench": bench,
    "fuzz": fuzz,
    "faults": faults,
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
