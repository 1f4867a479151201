@echo off
rem Double-click this file to open spectune as a page in the browser. The first start installs everything.
setlocal
title spectune studio
cd /d "%~dp0"
set "PYTHON="
set "NEW_ENOUGH=import sys; sys.exit(sys.version_info < (3, 11))"
py -3 -c "%NEW_ENOUGH%" >nul 2>nul && set "PYTHON=py -3"
if not defined PYTHON python -c "%NEW_ENOUGH%" >nul 2>nul && set "PYTHON=python"
if not defined PYTHON (
  echo spectune needs Python 3.11 or newer, and this computer has none.
  echo Install Python 3.13 from https://www.python.org/downloads/windows/ and double-click this file again.
  pause
  exit /b 1
)
%PYTHON% dev.py studio %*
if errorlevel 1 pause
