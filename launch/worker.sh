#!/usr/bin/env bash
# Installs and trains on a TPU's host; launch/tpu_vm.sh calls it there, over ssh.
#
#   launch/worker.sh install         makes the environment, beside this folder
#   launch/worker.sh start ARGS...   starts python -m lm_jax.train ARGS..., detached from the session
#   launch/worker.sh follow [LINES]  prints its log (or the last LINES of it, then what comes) until
#                                    it ends, and ends with its exit status
#   launch/worker.sh status ARGS...  prints whether it runs: absent, running, ended CODE, stopped CODE
#                                    (by `stop`), lost (it ended without a code, as when the host
#                                    restarts), or other (it runs, with other arguments than ARGS)
#   launch/worker.sh stop            sends it SIGTERM, on which it saves, and waits until it ends
#
# A session that breaks off, or never comes back, does not end the training.

set -euo pipefail
VENV=${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)/lm_jax-venv}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

RUN=$(dirname "$ROOT")/lm_jax-run # command, log, process, exit, stopped
POLL=${LM_JAX_POLL:-1}            # seconds

# A process id means nothing after the host has restarted.
_boot() {
  cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown
}

_ended() {
  local how=ended
  [ ! -e "$RUN/stopped" ] || how=stopped
  echo "$how $(cat "$RUN/exit")"
}

_state() {
  local process boot
  if [ -e "$RUN/exit" ]; then
    _ended
  elif [ ! -e "$RUN/process" ]; then
    echo absent
  else
    read -r process boot <"$RUN/process"
    if [ "$boot" = "$(_boot)" ] && kill -0 "$process" 2>/dev/null; then
      echo running
    elif [ -e "$RUN/exit" ]; then # it ended between the two looks
      _ended
    else
      echo lost
    fi
  fi
}

# The image of a TPU VM may have Python 3.10 alone; uv brings a newer one, without root.
_install() {
  if [ -z "${PYTHON:-}" ] && [ ! -x "$VENV/bin/python" ] && ! (_find_python) 2>/dev/null; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv ||
      fail "this image has no Python that lm_jax can use, and pip could not fetch one by way of uv"
    "$HOME/.local/bin/uv" python install --quiet 3.12
    PYTHON=$(UV_PYTHON_PREFERENCE=only-managed "$HOME/.local/bin/uv" python find 3.12)
  fi
  export LM_JAX_EXTRAS=${LM_JAX_EXTRAS:-tpu,gcs}
  make_environment ''
}

_start() {
  case $(_state) in
    running) fail "a training runs here already: $(cat "$RUN/command")" ;;
  esac
  rm -rf "$RUN"
  mkdir -p "$RUN"
  quoted "$@" >"$RUN/command"
  cd "$ROOT" # paths in the arguments are seen from there
  nohup bash "$ROOT/launch/worker.sh" _train "$@" </dev/null >"$RUN/log" 2>&1 &
  echo "$! $(_boot)" >"$RUN/process"
}

_train() {
  local child code
  # This process outlives its child, to write down how it ended; a signal to both is the child's.
  trap : TERM INT HUP
  "$VENV/bin/python" -m lm_jax.train "$@" &
  child=$!
  echo "$child" >"$RUN/child"
  while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  echo "$code" >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
}

_follow() {
  local line over partial='' first=1 prefix="${LM_JAX_PREFIX:+[$(hostname)] }"
  [ -e "$RUN/log" ] || fail "nothing was started here"
  if [ $# -gt 0 ]; then
    first=$(($(wc -l <"$RUN/log") - $1 + 1))
    [ "$first" -ge 1 ] || first=1
  fi
  exec 3<"$RUN/log"
  while [ "$first" -gt 1 ] && IFS= read -r line <&3; do first=$((first - 1)); done
  while :; do
    case $(_state) in running) over='' ;; *) over=yes ;; esac # before reading: nothing is missed
    while IFS= read -r line <&3; do
      printf '%s%s\n' "$prefix" "$partial$line"
      partial=''
    done
    partial=$partial$line
    [ -z "$over" ] || break
    sleep "$POLL"
  done
  [ -z "$partial" ] || printf '%s%s\n' "$prefix" "$partial"
  case $(_state) in
    ended\ * | stopped\ *) exit "$(cat "$RUN/exit")" ;;
    *) fail "the training on $(hostname) was cut off" ;;
  esac
}

_stop() {
  [ "$(_state)" = running ] || return 0
  touch "$RUN/stopped"
  kill -TERM "$(cat "$RUN/child")"
  while [ "$(_state)" = running ]; do sleep "$POLL"; done
}

case ${1:-} in
  install) _install ;;
  start) shift && _start "$@" ;;
  follow) shift && _follow "$@" ;;
  stop) _stop ;;
  status)
    shift
    state=$(_state)
    [ "$state" != running ] || [ "$(quoted "$@")" = "$(cat "$RUN/command")" ] || state=other
    echo "lm_jax-status $(hostname) $state"
    ;;
  _train) shift && _train "$@" ;;
  *)
    usage
    [ "${1:-}" = --help ]
    ;;
esac
