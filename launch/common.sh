# shellcheck shell=bash
# Sourced by the other scripts: messages, options, quoting, and what is known of TPU types.
# It runs with bash 3.2 too, which is what macOS has.

# shellcheck disable=SC2034 # for those that source it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
COMMAND=()  # what comes after --
PASSED=()   # the values of --with, or of --env
DRY_RUN=''

fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '%s\n' "$@" >&2
  exit 1
}

say() {
  printf '%s\n' "$*" >&2
}

# Prints the words as a shell reads them back, whatever is in them.
quoted() {
  local word separator=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s.' "$word" | sed "s/'/'\\\\''/g")" && word=${word%.}"'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs a command, or prints it if this is a dry run.
run() {
  if [ -n "$DRY_RUN" ]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# Prints the one of the words $2 ... that is nearest to $1, if any is near.
nearest() {
  local wanted=$1
  shift
  printf '%s\n' "$@" | awk -v a="$wanted" '
    function least(x, y) { return x < y ? x : y }
    {
      m = length(a); n = length($0)
      for (j = 0; j <= n; j++) before[j] = j
      for (i = 1; i <= m; i++) {
        now[0] = i
        for (j = 1; j <= n; j++) {
          change = before[j - 1] + (substr(a, i, 1) != substr($0, j, 1))
          now[j] = least(change, least(before[j], now[j - 1]) + 1)
        }
        for (j = 0; j <= n; j++) before[j] = now[j]
      }
      if (best == "" || before[n] < distance) { best = $0; distance = before[n] }
    }
    END { if (distance <= 1 + length(a) / 4) print best }'
}

# The comment at the head of the script, which is its --help.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# Sets a variable for each option that is given: --node-count=2 sets node_count, --spot sets spot to
# yes. Values are in $OPTIONS and switches in $SWITCHES, names with spaces between.
parse_options() {
  local _given _name _value _near # no option begins with _
  while [ $# -gt 0 ]; do
    _given=$1
    shift
    case $_given in
      --)
        COMMAND=("$@")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --?*) ;;
      *) fail "unexpected '$_given': options are --name=value, and what goes to training comes after --" ;;
    esac
    _name=${_given%%=*}
    _name=${_name#--}
    case " $SWITCHES " in
      *" $_name "*)
        [ "$_given" = "--$_name" ] || fail "--$_name takes no value"
        printf -v "${_name//-/_}" yes
        continue
        ;;
    esac
    case " $OPTIONS " in
      *" $_name "*) ;;
      *)
        case $_name in
          config | config.* | workdir) fail "--$_name goes to training: put -- before it" ;;
        esac
        # shellcheck disable=SC2086 # names have no spaces
        _near=$(nearest "$_name" $OPTIONS $SWITCHES)
        [ -z "$_near" ] || _near="; did you mean '--$_near'?"
        fail "no option '--$_name'$_near (--help lists them)"
        ;;
    esac
    case $_given in
      *=*) _value=${_given#*=} ;;
      *)
        [ $# -gt 0 ] || fail "--$_name needs a value: --$_name=..."
        _value=$1
        shift
        ;;
    esac
    [ -n "$_value" ] || fail "--$_name is empty: --$_name=..."
    case $_name in
      with | env) PASSED+=("$_value") ;;
      *) printf -v "${_name//-/_}" '%s' "$_value" ;;
    esac
  done
}

# Fails unless the options that are named have values.
require() {
  local name variable missing=''
  for name in "$@"; do
    variable=${name//-/_}
    [ -n "${!variable}" ] || missing="$missing --$name"
  done
  [ -z "$missing" ] || fail "missing:$missing (--help says what they are)"
}

# Fails unless the option $1 is a whole number of at least $2.
require_number() {
  local variable=${1//-/_}
  case ${!variable} in
    *[!0-9]*) ;;
    *) [ "${!variable}" -lt "$2" ] || return 0 ;;
  esac
  fail "--$1=${!variable}: a whole number of $2 or more is needed"
}

require_tool() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# Whether a training that ended with the status $1 is to be started again: lm_jax/errors.py says what
# they mean. 130 is Ctrl-C, and somebody's will.
to_be_started_again() {
  [ "$1" -eq 75 ] || { [ "$1" -gt 128 ] && [ "$1" -ne 130 ]; }
}

# Sets $WORKDIR and $RECIPE to what training is told.
read_command() {
  local word before=''
  WORKDIR='' RECIPE=''
  [ ${#COMMAND[@]} -gt 0 ] || fail "nothing to train: give the arguments of lm_jax.train after --," \
    "as in -- --config=configs/gpt2.py --workdir=..."
  for word in "${COMMAND[@]}"; do
    case $before in
      --workdir | -workdir) WORKDIR=$word ;;
      --config | -config) RECIPE=$word ;;
    esac
    case $word in
      --workdir=* | -workdir=*) WORKDIR=${word#*=} ;;
      --config=* | -config=*) RECIPE=${word#*=} ;;
    esac
    before=$word
  done
  [ -n "$WORKDIR" ] || fail "where to? give --workdir=... among the arguments of training"
  [ -n "$RECIPE" ] || fail "which recipe? give --config=configs/FILE.py among the arguments of training"
}

# Fails if what $1 describes has several hosts and they would not share the workdir.
require_shared_workdir() {
  case $WORKDIR in
    gs://?*) ;;
    *) fail "--workdir=$WORKDIR would be another folder on each host of $1:" \
      "give one that all of them see, --workdir=gs://BUCKET/RUN" ;;
  esac
}

# Fails with what training would say of its arguments, seen from the folder $1, if they are wrong.
# Where there is no Python with what lm_jax needs, nothing is checked: this machine may have none.
check_arguments() {
  local python=${VENV:-$ROOT/.venv}/bin/python said
  [ -x "$python" ] || return 0
  said=$(cd "$1" && PYTHONPATH=$ROOT "$python" -m lm_jax.train "${COMMAND[@]}" --validate_only 2>&1) && return
  case $said in
    error:* | *$'\n'error:*) fail "in the arguments of training: ${said#*error: }" ;;
  esac
}

# Prints which type has the shape $1, such as v5p:4x4x4, as lm_jax.plan names it.
_type_of() {
  local generation=${1%%:*} shape=${1#*:}
  case $shape in *[!0-9x]* | x* | *x | *xx* | 0* | *x0*) generation='' ;; esac
  case $generation in
    v5e | v5litepod) echo "the type is v5litepod-$((${shape//x/*}))" ;;
    v6e) echo "the type is v6e-$((${shape//x/*}))" ;;
    v4 | v5p | tpu7x) echo "the type is $generation-$((2 * ${shape//x/*})), whose number counts cores, two a chip" ;;
    *) echo "give a type such as v4-8, v5litepod-16, v5p-128, v6e-64 or tpu7x-64" ;;
  esac
}

# Sets $GENERATION and $CHIPS from a TPU type such as v5p-128, whose number counts chips for v5e and
# v6e, and for the others cores, two a chip.
read_tpu_type() {
  local count=${1##*-} cores=2
  GENERATION=${1%-*}
  case $1 in *:*[0-9]x[0-9]*) fail "--type=$1: that is a shape; $(_type_of "$1")" ;; esac
  case $GENERATION in
    v5litepod | v6e) cores=1 ;;
    v4 | v5p | tpu7x) ;;
    v5e) fail "--type=$1: Google's name for it is v5litepod-$count" ;;
    *) fail "--type=$1: give one such as v4-8, v5litepod-16, v5p-128, v6e-64 or tpu7x-64" ;;
  esac
  case $count in
    '' | *[!0-9]* | 0*) fail "--type=$1: a number is to follow '$GENERATION-'" ;;
  esac
  [ $((count % cores)) -eq 0 ] || fail "--type=$1: the number counts cores, two a chip, and is even"
  # shellcheck disable=SC2034 # for those that source it
  CHIPS=$((count / cores))
}
