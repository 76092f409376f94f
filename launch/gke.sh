#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster: writes a JobSet from launch/gke/jobset.yaml and applies it.
#
#   launch/gke.sh --name=NAME --type=TYPE --image=IMAGE [OPTIONS] -- ARGUMENTS OF lm_jax.train
#
# The manifest is applied with kubectl, to the cluster that kubectl is set to; --dry-run prints it
# instead, and needs no kubectl. The same as a command of XPK stands in its first lines.
#
#   --name=NAME             of the JobSet, in lower case
#   --type=TYPE             of a slice: v4-8, v5litepod-16, v5p-128, v6e-64, tpu7x-64, ...
#   --topology=TOPOLOGY     of a slice, such as 4x4x8; default: the usual one for its size
#   --chips-per-host=N      of the node pool's machines; default: 4, or 1 for a slice of one chip
#   --slices=N              default: 1; each needs a copy of the model: --config.mesh.data is a
#                           multiple of N
#   --image=IMAGE           with lm_jax in it: docker build -f launch/gke/Dockerfile -t IMAGE . &&
#                           docker push IMAGE
#   --restarts=N            after a preemption or a failure; default: 10
#   --spot                  on nodes that are cheap and may be preempted
#   --service-account=NAME  of Kubernetes. The pods are on the host's network, and so use the bucket
#                           with the rights of the node pool's own account
#   --namespace=NAME        default: default
#   --env=NAME=VALUE        a variable of the training's environment; may be repeated
#   --queue=NAME            a LocalQueue of Kueue, if the cluster has it
#   --cluster=NAME          for the XPK command alone
#   --dry-run               prints the manifest
#
# The cluster needs the JobSet controller (XPK's clusters have it), of version 0.6 or newer. When a
# host is lost or preempted, or hangs, all slices start again, and the same command goes on from the
# newest checkpoint in --workdir, which is to be a bucket: gs://BUCKET/RUN. A training that failed
# (status 1: a wrong argument, say), or that was started three times without coming to the next
# checkpoint, is not started again.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OPTIONS="name type topology chips-per-host slices image restarts service-account namespace env queue cluster"
SWITCHES="spot dry-run"
name='' type='' topology='' chips_per_host='' slices=1 image='' restarts=10 service_account=''
namespace=default queue='' cluster='' spot='' dry_run=''
parse_options "$@"
DRY_RUN=$dry_run

require name type image
require_number slices 1
require_number restarts 0
read_tpu_type "$type"
read_command
case $name in
  *[!a-z0-9-]* | -* | *- | [0-9]*) fail "--name=$name: Kubernetes takes lower case letters, digits and '-', a letter first" ;;
esac
[ ${#name} -le 40 ] || fail "--name=$name: at most 40 characters, to which JobSet adds its own"
case $WORKDIR in
  gs://?*) ;;
  *) fail "--workdir=$WORKDIR would be inside of a pod, and lost with it: give --workdir=gs://BUCKET/RUN" ;;
esac

# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
case $GENERATION in
  v4) accelerator=tpu-v4-podslice ;;
  v5litepod) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  tpu7x) accelerator=tpu7x ;;
esac
case $GENERATION in v5litepod | v6e) axes=2 ;; *) axes=3 ;; esac
xpk_type=$GENERATION-$topology
if [ -z "$topology" ]; then
  xpk_type=$type
  case $axes-$CHIPS in
    2-1) topology=1x1 ;;
    2-4) topology=2x2 ;;
    2-8) topology=2x4 ;;
    2-16) topology=4x4 ;;
    2-32) topology=4x8 ;;
    2-64) topology=8x8 ;;
    2-128) topology=8x16 ;;
    2-256) topology=16x16 ;;
    3-4) topology=2x2x1 ;;
    3-8) topology=2x2x2 ;;
    3-16) topology=2x2x4 ;;
    3-32) topology=2x4x4 ;;
    3-64) topology=4x4x4 ;;
    3-128) topology=4x4x8 ;;
    3-256) topology=4x8x8 ;;
    3-512) topology=8x8x8 ;;
    3-1024) topology=8x8x16 ;;
    3-2048) topology=8x16x16 ;;
    3-4096) topology=16x16x16 ;;
    *) fail "--type=$type: no usual topology for $CHIPS chips: give --topology=A${axes/[23]/xB}$([ "$axes" = 2 ] || echo xC)" ;;
  esac
fi
case $topology in
  x* | *x | *xx* | *[!0-9x]*) product=0 ;;
  *) product=$((${topology//x/*})) ;;
esac
[ "$product" -eq "$CHIPS" ] || fail "--topology=$topology is not one of $CHIPS chips, which $type has"
if [ -z "$chips_per_host" ]; then
  chips_per_host=4
  [ "$CHIPS" -gt 1 ] || chips_per_host=1
fi
require_number chips-per-host 1
[ ! -f "$ROOT/${RECIPE%%:*}" ] || check_arguments "$ROOT" # the image may have other recipes
[ $((CHIPS % chips_per_host)) -eq 0 ] || fail "--chips-per-host=$chips_per_host does not divide the $CHIPS chips of $type"

# A JSON string, which YAML reads too.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

# Pods of large slices come up minutes apart, and images are pulled meanwhile.
variables='{name: LM_JAX_JOIN_SECONDS, value: "3600"}'
variables="$variables, {name: LM_JAX_RESTARTED_BY, value: \"JobSet $name\"}"
for word in ${PASSED[@]+"${PASSED[@]}"}; do
  key=${word%%=*}
  case $key in '' | "$word" | [!A-Za-z_]* | *[!A-Za-z0-9_]*) fail "--env=$word: give --env=NAME=VALUE" ;; esac
  variables="$variables, {name: $key, value: $(json "${word#*=}")}"
done
arguments=''
for word in "${COMMAND[@]}"; do arguments="$arguments, $(json "$word")"; done
xpk=(xpk workload create "--cluster=${cluster:-CLUSTER}" "--workload=$name" "--tpu-type=$xpk_type")
xpk+=("--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts")
[ -z "$spot" ] || xpk+=(--spot)
xpk+=("--command=python -m lm_jax.train $(quoted "${COMMAND[@]}")")

# The template with its {{WORDS}} filled in; a line whose word has no value is left out.
manifest() {
  local line key value
  quoted "${xpk[@]}" | sed 's/^/# /'
  echo
  while IFS= read -r line; do
    case $line in
      *'{{'*'}}'*)
        key=${line#*'{{'}
        key=${key%%'}}'*}
        case $key in
          NAME) value=$name ;;
          NAMESPACE) value=$(json "$namespace") ;;
          QUEUE) value=${queue:+$(json "$queue")} ;;
          RESTARTS) value=$restarts ;;
          SLICES) value=$slices ;;
          HOSTS) value=$((CHIPS / chips_per_host)) ;;
          ACCELERATOR) value=$accelerator ;;
          TOPOLOGY) value=$topology ;;
          SPOT) value=${spot:+'"true"'} ;;
          SERVICE_ACCOUNT) value=${service_account:+$(json "$service_account")} ;;
          IMAGE) value=$(json "$image") ;;
          VARIABLES) value=$variables ;;
          ARGUMENTS) value=${arguments#, } ;;
          CHIPS) value=$chips_per_host ;;
          *) fail "launch/gke/jobset.yaml: nothing is known of {{$key}}" ;;
        esac
        [ -n "$value" ] || continue
        printf '%s%s%s\n' "${line%%'{{'*}" "$value" "${line#*'}}'}"
        ;;
      *) printf '%s\n' "$line" ;;
    esac
  done <"$ROOT/launch/gke/jobset.yaml"
}

if [ -n "$DRY_RUN" ]; then
  manifest
  exit 0
fi
require_tool kubectl "see kubernetes.io/docs/tasks/tools"
manifest | kubectl apply -f -
say "its output: kubectl logs -f --namespace=$namespace -l jobset.sigs.k8s.io/jobset-name=$name --prefix" \
  "--max-log-requests=$((slices * CHIPS / chips_per_host))"
say "to end it: kubectl delete jobset --namespace=$namespace $name"
