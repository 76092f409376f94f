#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a slice of several hosts, or several slices.
#
#   launch/tpu_vm.sh --name=NAME --type=TYPE --zone=ZONE [OPTIONS] -- ARGUMENTS OF lm_jax.train
#
# It makes the TPU, or uses the one of that name, copies this folder to all of its hosts, installs
# there, and runs python -m lm_jax.train ARGUMENTS on each, showing what they print. When the TPU is
# preempted, it makes it anew and runs the same command, which goes on from the newest checkpoint.
# It ends as training ends, with its exit status.
#
#   --name=NAME        of the TPU
#   --type=TYPE        v4-8, v5litepod-16, v5p-128, v6e-64, tpu7x-64, ...
#   --zone=ZONE        where it is, such as us-east5-b
#   --project=PROJECT  default: gcloud's own
#   --version=VERSION  of the TPU's software; default: the one for its generation
#   --spot             cheap, and may be preempted
#   --reserved         of your reservation
#   --queued           waits in line for it, as a queued resource
#   --node-count=N     so many slices of that type, always queued; each needs a copy of the model:
#                      --config.mesh.data is a multiple of N
#   --with=FLAG        one more flag for the gcloud command that makes it, such as
#                      --with=--network=NAME; may be repeated
#   --restarts=N       after preemptions and other interruptions; default: 100
#   --delete           deletes the TPU in the end; without a command after --, at once
#   --stop             lets a training save and end, and nothing else
#                      Both alone need no --type, but --queued if the TPU was made with it.
#   --dry-run          prints the commands instead of running them; needs no gcloud
#
# Training is detached from the ssh session: a lost connection, or Ctrl-C here, does not end it. The
# same command shows it again. (While nothing here watches, nothing restarts it after a preemption.)
# A training that was interrupted (a host was lost, or a hang was found) is started again where it
# was, and so is one that somebody stopped, but with --stop. One that failed (status 1), or that was
# started three times without coming to the next checkpoint, is not, unless the TPU turns out to be
# gone.
#
# On several hosts --workdir is to be a bucket, gs://BUCKET/RUN, and so it should be wherever the TPU
# can be preempted: the disks go with it. Other paths are seen from this folder's copy, ~/lm_jax; what
# training writes there stays when the copy is renewed. TPU7x is meant for GKE (launch/gke.sh), and
# its version here is not documented by Google.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OPTIONS="name type zone project version node-count with restarts"
SWITCHES="spot reserved queued delete stop dry-run"
name='' type='' zone='' project='' version='' node_count=1 restarts=100
spot='' reserved='' queued='' delete='' stop='' dry_run=''
parse_options "$@"
DRY_RUN=$dry_run

export COPYFILE_DISABLE=1 # macOS: no files beside the files in an archive
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
self="tpu_vm.sh on $(hostname), process $$"
POLL=${LM_JAX_POLL:-20} # seconds between looks at a TPU that comes or goes
STATE=''                # of the TPU, by `look`
MADE=''                 # the type of the one that is there, if gcloud says so
STATES=''               # of the training, one line a host, by `ask`

if [ ${#COMMAND[@]} -gt 0 ] || [ -z "$delete$stop" ]; then
  require name type zone
else
  require name zone
fi
require_number node-count 1
require_number restarts 0
CHIPS=1
[ -z "$type" ] || read_tpu_type "$type"
if [ -n "$type" ] && [ -z "$version" ]; then
  case $GENERATION in # cloud.google.com/tpu/docs/runtimes
    v4) version="tpu-ubuntu2204-base" ;;
    v5litepod) version=v2-alpha-tpuv5-lite ;;
    v5p) version=v2-alpha-tpuv5 ;;
    v6e) version=v2-alpha-tpuv6e ;;
    tpu7x) version=v2-alpha-tpu7-ubuntu2404 ;;
  esac
fi
# Up to 8 cores or chips are one host's; larger slices have 4 chips a host.
hosts=1
[ -z "$type" ] || [ "${type##*-}" -le 8 ] || hosts=$((CHIPS / 4))
hosts=$((hosts * node_count))
[ "$node_count" -eq 1 ] || queued=yes

if [ ${#COMMAND[@]} -gt 0 ] || [ -z "$delete$stop" ]; then
  read_command
  [ "$hosts" -eq 1 ] || require_shared_workdir "$node_count x $type ($hosts hosts)"
  [ -f "$ROOT/${RECIPE%%:*}" ] || fail "there is no recipe '${RECIPE%%:*}' in $ROOT, which is what is copied to the TPU"
  case $WORKDIR$spot in
    gs://*) ;;
    *yes) say "note: --workdir=$WORKDIR is on the TPU's disk, and lost with it at a preemption" ;;
  esac
  check_arguments "$ROOT"
fi
require_tool gcloud "see cloud.google.com/sdk/docs/install"

tpu=tpu-vm every=(--worker=all --batch-size=all) ready=READY shown='value(state,acceleratorType)'
if [ -n "$queued" ]; then
  tpu=queued-resources every=(--node=all "${every[@]}") ready=ACTIVE
  shown='value(state.state,tpu.nodeSpec[0].node.acceleratorType)'
fi
place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
place+=(--quiet)

# gcloud with the verb $1 and more, on this TPU.
cloud() {
  run gcloud compute tpus "$tpu" "$1" "$name" "${@:2}" "${place[@]}"
}

# Runs a command line on all hosts. A host that vanished does not close its connections: without the
# two flags of ssh, it would be waited for forever.
on_hosts() {
  run gcloud compute tpus "$tpu" ssh "$name" "${every[@]}" "${place[@]}" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 "--command=$1"
}

# Sets $STATE to the TPU's, as gcloud names it, or to MISSING, or UNKNOWN if gcloud cannot tell.
look() {
  local said
  if [ -n "$DRY_RUN" ]; then
    cloud describe "--format=$shown"
  elif said=$(cloud describe "--format=$shown" 2>"$scratch/errors"); then
    read -r STATE MADE <<<"$said"
  else
    said=$(cat "$scratch/errors")
    case $said in
      *NOT_FOUND* | *'not found'*) STATE=MISSING ;;
      *) STATE=UNKNOWN && say "$said" ;;
    esac
  fi
}

create() {
  local flags=("--accelerator-type=$type")
  if [ -n "$queued" ]; then
    flags+=("--runtime-version=$version")
    if [ "$node_count" -gt 1 ]; then
      flags+=("--node-count=$node_count" "--node-prefix=$name")
    else
      flags+=("--node-id=$name")
    fi
  else
    flags+=("--version=$version")
  fi
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$reserved" ] || flags+=(--reserved)
  [ ${#PASSED[@]} -eq 0 ] || flags+=("${PASSED[@]}")
  cloud create "${flags[@]}"
}

remove() {
  local force=()
  [ -z "$queued" ] || force=(--force) # its nodes with it
  cloud delete ${force[@]+"${force[@]}"}
}

# Makes the TPU if it is not there, and waits until it is ready. With 'again' it replaces one that
# was preempted, however long that takes; without, it does not touch one that is not as it should be.
obtain() {
  local again=${1:-} before='' unknown=0 looks=0
  if [ -n "$DRY_RUN" ]; then
    say "# if there is none:"
    create
    say "# until it is $ready:"
    look
    return
  fi
  while :; do
    look
    looks=$((looks + 1))
    [ "$STATE" = "$before" ] || say "$name: $STATE"
    before=$STATE
    [ "$STATE" = UNKNOWN ] && unknown=$((unknown + 1)) || unknown=0
    case $STATE in
      "$ready")
        [ "${MADE:-$type}" = "$type" ] || fail "$name is there, and is a $MADE and not a $type:" \
          "give its type, another --name, or delete it (--delete)"
        return
        ;;
      MISSING)
        say "making $name: $node_count x $type ..."
        if ! create; then
          [ -n "$again" ] || fail "gcloud could not make $name: its message is above" \
            "if there is no capacity, --queued waits for it, and --spot or another --zone may have some"
          sleep "$POLL"
        fi
        continue
        ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | ACCEPTED | PROVISIONING) ;;
      WAITING_FOR_RESOURCES | DELETING | SUSPENDING | STOPPING) ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        remove || true # it is tried again
        ;;
      UNKNOWN)
        # At the first look it will be gcloud that is not set up; later it may be the network.
        [ "$unknown$again" != 1 ] || [ "$looks" -gt 1 ] || fail "gcloud cannot look for $name: see its message above"
        [ "$unknown" -lt 30 ] || fail "gcloud does not say how $name is: see its message above" \
          "a training that runs there goes on; the same command shows it again"
        ;;
      *) fail "$name is $STATE: see what 'gcloud compute tpus $tpu describe $name ${place[*]}' says of" \
        "it; delete it (--delete) to have it made anew" ;;
    esac
    sleep "$POLL"
  done
}

# Whether the TPU is as it should be. When training has just ended badly, a preemption may not be
# known yet; it is asked for some time, or once if the TPU cannot be preempted.
still_there() {
  local looks=1
  [ -z "$spot$queued" ] || looks=5
  while :; do
    look
    case $STATE in "$ready" | UNKNOWN) ;; *) return 1 ;; esac
    looks=$((looks - 1))
    [ "$looks" -gt 0 ] || return 0
    sleep "$POLL"
  done
}

# Sets $STATES to how training is on each host; fails unless all of them say so.
ask() {
  local arguments script='if [ -e lm_jax/launch/worker.sh ]; then bash lm_jax/launch/worker.sh status'
  arguments=$(quoted ${COMMAND[@]+"${COMMAND[@]}"})
  script="$script $arguments; else echo \"lm_jax-status \$(hostname) absent\"; fi"
  if [ -n "$DRY_RUN" ]; then
    on_hosts "$script"
    return
  fi
  STATES=$(on_hosts "$script" 2>/dev/null | sed -n 's/^lm_jax-status [^ ]* //p') || return 1
  [ -n "$STATES" ]
}

# The same, as often as it takes; fails when the TPU is gone.
ask_for_sure() {
  local tries=0
  until ask; do
    tries=$((tries + 1))
    look
    case $STATE in "$ready" | UNKNOWN) ;; *) return 1 ;; esac
    [ "$tries" -lt 30 ] || fail "$name is $STATE, but its hosts do not answer over ssh" \
      "try: gcloud compute tpus $tpu ssh $name ${every[*]} ${place[*]} --command=hostname"
    sleep "$POLL"
  done
}

# Copies this folder to the hosts, and installs. Of an earlier copy only the files that came with it,
# which are listed in .copied, are removed: what training has written among them stays.
install() {
  local archive=$scratch/lm_jax.tgz code=0 workdir=${WORKDIR%/} unpack
  say "copying $ROOT to $hosts host(s), and installing ..."
  workdir=./${workdir#./} # one of the same name here is another run's, or an older state of it
  run tar -czf "$archive" -C "$ROOT" "--exclude=$workdir" --exclude=./.git --exclude='./.venv*' --exclude=./runs \
    --exclude=__pycache__ --exclude='*.egg-info' --exclude='.*_cache' . || code=$?
  [ "$code" -ne 0 ] || run gcloud compute tpus "$tpu" scp "$archive" "$name:lm_jax.tgz" \
    "${every[@]}" "${place[@]}" || code=$?
  [ "$code" -eq 0 ] || return "$code"
  unpack='mkdir -p lm_jax && cd lm_jax && touch .copied && tr "\n" "\0" <.copied | xargs -0 rm -f --'
  unpack="$unpack && tar -tzf ../lm_jax.tgz | sed '/\/\$/d' >.copied && tar -xzf ../lm_jax.tgz"
  on_hosts "($unpack) && rm lm_jax.tgz && LM_JAX_EXTRAS=tpu,gcs bash lm_jax/launch/worker.sh install"
}

start() {
  on_hosts "LM_JAX_RESTARTED_BY=$(quoted "$self") bash lm_jax/launch/worker.sh start $(quoted "${COMMAND[@]}")"
}

# Shows what training prints until it ends, or the connection does.
follow() {
  local prefix=''
  [ "$hosts" -eq 1 ] || prefix='LM_JAX_PREFIX=yes '
  on_hosts "${prefix}bash lm_jax/launch/worker.sh follow${1:+ $1}" || true
}

# Deletes the TPU if that was asked for, and ends with the status $1.
finish() {
  if [ -n "$delete" ]; then
    remove || fail "$name could not be deleted, and goes on costing money: delete it by hand"
  elif [ -z "$DRY_RUN" ]; then
    say "$name is kept, and costs money: delete it with $0 $(quoted "--name=$name" "${place[0]}" ${project:+"--project=$project"} ${queued:+--queued}) --delete"
  fi
  exit "$1"
}

# Trains on a TPU that is ready. Sets $outcome to the exit status, or 'gone' or 'again'.
train() {
  local lines='' code
  outcome=gone
  ask_for_sure || return 0
  case $STATES in
    *other*) fail "$name trains something else: end that with --stop, or give another --name" ;;
    *running*) say "it runs already:" && lines=20 ;;
    *)
      if ! install || ! start; then
        still_there || return 0
        fail "$name could not be set up: see the message above"
      fi
      ;;
  esac
  while :; do
    follow "$lines"
    ask_for_sure || return 0
    case $STATES in
      *running*)
        case $STATES in
          *lost* | *absent*) on_hosts 'bash lm_jax/launch/worker.sh stop' || true ;;
          *) say "the connection was lost; training goes on:" ;;
        esac
        lines=20
        sleep "$POLL"
        ;;
      *lost* | *absent*)
        outcome=again status='that nobody wrote down'
        return
        ;;
      *) break ;;
    esac
  done
  # Of several hosts, one that failed; else one that was interrupted.
  outcome=0
  for code in $(printf '%s\n' "$STATES" | awk '$2 != 0 { print $2 }'); do
    outcome=$code
    to_be_started_again "$code" || break
  done
  status=$outcome
  [ "$outcome" != 0 ] || return 0
  case $STATES in
    *stopped*) ;;
    *) ! to_be_started_again "$outcome" || outcome=again ;;
  esac
  still_there || outcome=gone
}

trap 'say; say "training, if it has started, goes on without this; the same command shows it again, --stop ends it"; exit 130' INT

if [ -n "$DRY_RUN" ]; then
  if [ -n "$stop" ]; then
    on_hosts 'bash lm_jax/launch/worker.sh stop'
  elif [ ${#COMMAND[@]} -gt 0 ]; then
    obtain
    say "# if it does not train yet:"
    ask
    install
    start
    say "# what it prints, and how it ended:"
    follow
    ask
    say "# after a preemption, at most $restarts time(s), all of this again; before it: $(remove)"
    [ -z "$delete" ] || say "# in the end:"
  fi
  finish 0
fi
if [ -n "$stop" ]; then
  on_hosts 'bash lm_jax/launch/worker.sh stop'
  finish 0
fi
[ ${#COMMAND[@]} -gt 0 ] || finish 0

restarted=0 again='' status=''
while :; do
  obtain "$again"
  train
  case $outcome in
    gone | again) ;;
    *)
      [ "$outcome" = 0 ] || say "training ended with status $outcome"
      finish "$outcome"
      ;;
  esac
  if [ "$restarted" -ge "$restarts" ]; then
    say "error: training was interrupted, and --restarts=$restarts allows no more"
    finish 1
  fi
  restarted=$((restarted + 1))
  case $outcome in
    again) say "training ended with a status $status: started again, $restarted of at most $restarts times" ;;
    gone) say "$name is gone (${STATE:-preempted}): made anew, $restarted of at most $restarts times" ;;
  esac
  again=again
done
