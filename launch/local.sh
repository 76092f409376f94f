#!/usr/bin/env bash
# Trains a small GPT on this machine: installs what is needed, then runs configs/quickstart.py.
#
#   launch/local.sh [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE ...]
#
# See launch/environment.sh for the variables PYTHON, VENV and LM_JAX_EXTRAS.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
esac
make_environment ""

# Paths that the user gives are relative to where the user is; the defaults lie beside this folder.
here=$ROOT/
[ "$PWD" != "$ROOT" ] || here=
config=--config=${here}configs/quickstart.py
workdir=--workdir=${here}runs/quickstart
for argument in "$@"; do
  case $argument in
    --config | --config=* | -config | -config=*) config='' workdir='' ;; # another recipe, another folder
  esac
done
for argument in "$@"; do
  case $argument in
    --workdir | --workdir=* | -workdir | -workdir=*) workdir='' ;;
  esac
done
exec "$VENV/bin/python" -m lm_jax.train ${config:+"$config"} ${workdir:+"$workdir"} "$@"
