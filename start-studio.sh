#!/bin/sh
# Open spectune as a page in the browser. The first start installs everything.
cd "$(dirname "$0")" || exit 1
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
for python in python3 python3.14 python3.13 python3.12 python3.11 python; do
  if command -v "$python" >/dev/null && "$python" -c "$new_enough" 2>/dev/null; then
    exec "$python" dev.py studio "$@"
  fi
done
echo "spectune needs Python 3.11 or newer, and this computer has none."
echo "On Debian and Ubuntu: sudo apt install python3 python3-venv. Else: https://www.python.org/downloads/"
if [ -t 0 ]; then
  printf "Press Enter to close this window. "
  read -r _
fi
exit 1
