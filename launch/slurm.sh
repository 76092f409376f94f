#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: installs into .venv, then submits a job with sbatch.
#
#   launch/slurm.sh [OPTIONS] -- ARGUMENTS OF lm_jax.train
#
#   --nodes=N          default: 1
#   --gpus=N           of each node; default: 8
#   --cpus=N           for each GPU; default: 8
#   --time=TIME        limit, such as 24:00:00; default: the partition's
#   --partition=NAME, --account=NAME, --name=NAME
#   --grace=SECONDS    before the limit, in which to save; default: 120
#   --restarts=N       when training is interrupted, or its time is up; default: 100
#   --with=FLAG        one more flag for sbatch, such as --with=--qos=low; may be repeated
#   --dry-run          prints the sbatch command and its script, and installs and submits nothing
#
# One process a GPU: jax finds Slurm by itself, and then each process takes the one GPU of its number
# on the node. All GPUs of a node stay visible to each, so that NCCL can copy between them.
#
# A preempted job is put back into the queue by Slurm (--requeue), and one whose time is up, that lost
# a process or that hangs puts itself back, at most --restarts times. Training saves on SIGTERM, and
# the same command goes on from the newest checkpoint. A training that failed (status 1), or that was
# started three times without coming to the next checkpoint, is not started again.
#
# This folder, --workdir and the text are to lie where all nodes see them; paths in the arguments are
# seen from where this is called. The log is slurm-JOB.out there. For .venv see launch/environment.sh;
# LM_JAX_EXTRAS is cuda unless it is set.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

OPTIONS="nodes gpus cpus time partition account name grace restarts with"
SWITCHES="dry-run"
nodes=1 gpus=8 cpus=8 time='' partition='' account='' name=lm_jax grace=120 restarts=100 dry_run=''
parse_options "$@"
DRY_RUN=$dry_run

require_number nodes 1
require_number gpus 1
require_number cpus 1
require_number grace 1
require_number restarts 0
read_command
case $nodes:$WORKDIR in
  1:*) ;;
  *:/tmp/* | *:/var/tmp/* | *:/dev/shm/*) fail "--workdir=$WORKDIR is another folder on each of the $nodes nodes: give one that all of them see" ;;
esac
check_arguments "$PWD"
require_tool sbatch "call this on a login node of the cluster"

flags=("--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus")
flags+=("--cpus-per-task=$cpus" --requeue --open-mode=append "--signal=TERM@$grace")
[ -z "$time" ] || flags+=("--time=$time")
[ -z "$partition" ] || flags+=("--partition=$partition")
[ -z "$account" ] || flags+=("--account=$account")
[ ${#PASSED[@]} -eq 0 ] || flags+=("${PASSED[@]}")

# What runs on the first node. The end of one process does not kill the others (--kill-on-bad-exit=0):
# after SIGTERM they end one by one, and the last may still be saving; if one fails, they end
# themselves, with its status. srun's is the largest of all.
script() {
  cat <<SCRIPT
#!/usr/bin/env bash
export LM_JAX_RESTARTED_BY="slurm job \$SLURM_JOB_ID"
$(declare -f to_be_started_again)
srun --kill-on-bad-exit=0 --cpus-per-task=$cpus $(quoted "$VENV/bin/python" -m lm_jax.train "${COMMAND[@]}")
status=\$?
# scancel ends this script as well.
if to_be_started_again \$status && [ "\${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
SCRIPT
}

if [ -n "$DRY_RUN" ]; then
  printf '%s <<'\''SCRIPT'\''\n' "$(quoted sbatch "${flags[@]}")"
  script
  echo SCRIPT
  exit 0
fi
LM_JAX_EXTRAS=${LM_JAX_EXTRAS-cuda}
make_environment ''
script | sbatch "${flags[@]}"
