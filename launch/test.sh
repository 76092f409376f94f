#!/usr/bin/env bash
# Checks the code's form, then runs the tests, on the CPU alone.
#
#   launch/test.sh [PYTEST ARGUMENTS ...]
#
# See launch/environment.sh for the variables PYTHON and VENV. CHROMIUM names the browser that pages
# are opened in; default: one that is on the PATH, else it is installed with apt-get, where that can
# be had.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment test
find_browser

cd "$ROOT"
export JAX_PLATFORMS=cpu
"$VENV/bin/python" -m ruff check lm_jax tests # configs/ may hold recipes of your own
"$VENV/bin/python" -m ruff format --check lm_jax tests
# A worker a core; a file stays with one, and so do the fixtures that its tests share. Files go in
# the order of tests/conftest.py.
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
