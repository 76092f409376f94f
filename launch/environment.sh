# shellcheck shell=bash
# Sourced by the other scripts: finds a Python and makes the virtual environment.
#
#   PYTHON         the interpreter to make it with; default: the first of python3.13, python3.12,
#                  python3.11, python3 and python that runs and is new enough
#   VENV           where it goes; default: .venv beside this folder
#   LM_JAX_EXTRAS  extras to install, as in LM_JAX_EXTRAS=cuda

source "$(dirname "${BASH_SOURCE[0]}")/common.sh" # sets ROOT
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
_NEEDED_MB=2000  # the environment, 1.1 GB, and what pip unpacks on the way
_TEST_MB=1000    # of the extra 'test', PyTorch above all: 1 GB more where it is the CPU's

# Prints why the interpreter $1 cannot be used, or nothing if it can. A name that is on the PATH may
# still not run: pyenv puts one there for each version that it knows.
_unfit() {
  local version
  version=$("$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null) || version=
  case $version in
    '') echo "does not run" ;;
    3\ [0-9] | 3\ 10 | [!3]\ *) echo "is Python ${version/ /.}" ;;
    *) "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "has no venv module" ;;
  esac
}

# Sets $BASE to the interpreter that makes the environment.
_find_python() {
  local candidate why seen=''
  if [ -n "${PYTHON:-}" ]; then
    why=$(_unfit "$PYTHON")
    [ -z "$why" ] || fail "PYTHON=$PYTHON $why; lm_jax needs Python 3.11 or newer, with venv"
    BASE=$PYTHON
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    command -v "$candidate" >/dev/null || continue
    why=$(_unfit "$candidate")
    if [ -z "$why" ]; then
      BASE=$candidate
      return
    fi
    seen="$seen
  $(command -v "$candidate") $why"
  done
  fail "lm_jax needs Python 3.11 or newer, with its venv module; found:${seen:-
  no Python at all}" \
    "install it (Debian and Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python $0"
}

# The interpreter that the environment at $VENV was made with.
_identity() {
  "$1" -c 'import os, sys; print(os.path.realpath(sys._base_executable), *sys.version_info[:2])' \
    2>/dev/null
}

# Makes the environment with the package and the extras $1 in it, unless it is there.
# Afterwards $VENV/bin/python is ready.
make_environment() {
  local state=$VENV/lm_jax-installed unfinished=$VENV/lm_jax-unfinished log=$VENV/lm_jax-install.log
  local wanted there='' extra missing='' from='' fingerprint started=$SECONDS
  wanted=$(printf '%s' "$1 ${LM_JAX_EXTRAS:-}" | tr ',' ' ')

  if [ -s "$unfinished" ] && kill -0 "$(cat "$unfinished")" 2>/dev/null &&
    [ "$(cat "$unfinished")" != $$ ]; then
    fail "$VENV is being made by process $(cat "$unfinished"): wait for it, or name another with VENV=DIR"
  fi
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ ! -e "$unfinished" ] && [ ! -e "$state" ] &&
    [ -n "$(ls -A "$VENV")" ]; then
    fail "$VENV is there and is no virtual environment: remove it, or name another with VENV=DIR"
  fi
  # An environment that works stays, whatever else is on the PATH; another PYTHON replaces it, and
  # so does one whose installation was cut off.
  if [ -n "${PYTHON:-}" ] || [ -e "$unfinished" ] || ! _identity "$VENV/bin/python" >/dev/null ||
    [ -n "$(_unfit "$VENV/bin/python")" ]; then
    _find_python
    if [ -e "$unfinished" ] ||
      [ "$(_identity "$BASE")" != "$(_identity "$VENV/bin/python")" ]; then
      _new_environment "$unfinished"
    fi
  fi

  # What is installed: the code is not, it is used where it lies.
  fingerprint="$ROOT $(_identity "$VENV/bin/python") $(cksum <"$ROOT/pyproject.toml")"
  if [ -e "$state" ]; then
    there=$(sed -n 2p "$state")
    from=$(sed -n '1s/ \/.*//p' "$state")
    [ "$(sed -n 1p "$state")" = "$fingerprint" ] || missing=yes
  else
    missing=yes
  fi
  for extra in $wanted; do
    case " $there " in *" $extra "*) ;; *) there="$there $extra" missing=yes ;; esac
  done
  [ -n "$missing" ] || return 0

  there=${there# }
  if [ -n "$from" ] && [ "$from" != "$ROOT" ]; then
    echo "$VENV had the code in $from installed: from now on it has that in $ROOT" >&2
  fi
  echo "installing lm_jax${there:+ [$there]} into $VENV (once, a minute or two) ..." >&2
  rm -f "$state"
  echo $$ >"$unfinished"
  if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    --editable "$ROOT${there:+[${there// /,}]}" >"$log" 2>&1; then
    _explain "$log"
  fi
  printf '%s\n%s\n' "$fingerprint" "$there" >"$state"
  rm -f "$unfinished"
  echo "installed in $((SECONDS - started)) s" >&2
}

# Makes an empty environment with $BASE for the extras $wanted. The file $1 is there from before the
# first change until the packages are installed, so that whatever is cut off on the way is not
# trusted later.
_new_environment() {
  local free said needed=$_NEEDED_MB
  case " $wanted " in *" test "*) needed=$((needed + _TEST_MB)) ;; esac
  free=$(df -Pk "$(dirname "$VENV")" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')
  if [ -n "$free" ] && [ "$free" -lt "$needed" ]; then
    fail "$(dirname "$VENV") has $free MB free, and the environment needs $needed:" \
      "make room, or name another place with VENV=DIR"
  fi
  if ! said=$(
    {
      mkdir -p "$VENV" && echo $$ >"$1" &&
        find "$VENV/" -mindepth 1 ! -path "$VENV/$(basename "$1")" -delete &&
        "$BASE" -m venv "$VENV"
    } 2>&1
  ); then
    fail "$BASE could not make the environment $VENV:" "$said"
  fi
}

# Says why pip failed, as far as its log $1 tells, and ends.
_explain() {
  tail -n 15 "$1" >&2
  if grep -qi 'no space left\|errno 28' "$1"; then
    fail "the disk is full: make room, or name another place with VENV=DIR (and TMPDIR=DIR)"
  elif grep -qi 'NewConnectionError\|name resolution\|ConnectTimeout\|ReadTimeout\|ProxyError\|SSLError\|connection broken' "$1"; then
    fail "pip could not reach the package index: check the network (and proxy), then run this again"
  fi
  fail "pip could not install lm_jax; its output is above and in $1"
}

# Sees to it that there is a Chromium, or says how to get one: tests of pages need it, others not.
find_browser() {
  local name log=$VENV/lm_jax-chromium.log sudo='' started=$SECONDS
  for name in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then return 0; fi
    [ -z "${CHROMIUM:-}" ] || fail "CHROMIUM=$CHROMIUM: there is no such program"
  done
  if command -v apt-get >/dev/null; then
    if [ "$(id -u)" = 0 ]; then
      sudo='env'
    elif sudo -n true 2>/dev/null; then
      sudo='sudo -n env'
    fi
  fi
  if [ -n "$sudo" ]; then
    say "installing Chromium, which pages are tested in (once, about a minute) ..."
    # shellcheck disable=SC2086 # words
    if { $sudo apt-get update -qq && $sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
      --no-install-recommends chromium; } </dev/null >"$log" 2>&1 && command -v chromium >/dev/null; then
      say "installed in $((SECONDS - started)) s"
      return
    fi
    tail -n 5 "$log" >&2
  fi
  say "note: no Chromium here, and the tests that open pages will fail: install one (Debian:" \
    "apt-get install chromium), or name it with CHROMIUM=/path/to/chrome"
}
