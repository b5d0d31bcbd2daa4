#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one host or a pod, through queued resources.
#
#   launch/tpu_vm.sh create  NAME --type TYPE [--spot] [--no-wait]
#   launch/tpu_vm.sh setup   NAME [--commit COMMIT]         this commit and its packages, every host
#   launch/tpu_vm.sh run     NAME -- python -m sr_jax.main --config ... --workdir gs://...
#   launch/tpu_vm.sh logs    NAME [--worker N|all] [--lines N] [--follow]
#   launch/tpu_vm.sh status  NAME
#   launch/tpu_vm.sh stop    NAME                           ends the training; the TPU still costs
#   launch/tpu_vm.sh delete  NAME --yes-delete NAME
#   launch/tpu_vm.sh babysit NAME --type TYPE --yes-delete NAME -- python -m sr_jax.main ...
#
# Every verb takes --zone ZONE (or TPU_ZONE; with --type, else the type's zone in tpu_types.tsv),
# --project PROJECT (else gcloud's own) and --dry-run, which prints each command and calls nothing.
# Every verb can be repeated: what is there already is kept, and the training resumes.
#
# More flags: --runtime-version VERSION, --internal-ip, --poll-seconds S (30), --wait-minutes M
# (create; 0 is for ever), --ssh-tries N (5), --grace-seconds S (120, stop), and for babysit
# --max-failures N (3) and --delete-after, which deletes the TPU when babysit ends.
#
# Exit status: 2 usage, 3 quota, 4 the TPU is not usable, 5 nothing of this name, 6 stopped or
# deleted by hand, 7 babysit gave up; from a worker 10 to 19; else gcloud's.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
scratch=""
trap 'if [[ -n "$scratch" ]]; then rm -rf -- "$scratch"; fi' EXIT

say() { printf 'tpu_vm: %s\n' "$*" >&2; }
die() { local code="$1"; shift; say "$*"; exit "$code"; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

# The only place where words become shell text: for a remote shell, and for the eye.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

# Every command that does anything outside this process goes through here.
call() {
  if ((dry_run)); then
    printf '%s\n' "$(quoted "$@")"
    return
  fi
  "$@"
}

pause() { if ! ((dry_run)); then sleep "$1"; fi; }

# --- arguments ---------------------------------------------------------------------------------

case "${1:-}" in
  -h | --help | help) usage; exit 0 ;;
  create | setup | run | logs | status | stop | delete | babysit) verb="$1" ;;
  *) usage >&2; die 2 "verb '${1:-}' must be one of create setup run logs status stop delete babysit" ;;
esac
name="${2:-}"
# It becomes part of the name of a TPU node, so the API's own rule for those.
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
  die 2 "NAME '$name' must be lower-case letters, digits and '-', a letter first; try sr-jax-1"
shift 2

type="" zone="${TPU_ZONE:-}" project="" runtime="" commit="" yes_delete="" worker=0 lines=100
spot=0 dry_run=0 wait_active=1 follow=0 internal_ip=0 delete_after=0
poll_seconds=30 wait_minutes=0 ssh_tries=5 grace_seconds=120 max_failures=3
command=()
while (($#)); do
  flag="$1"
  value="${2-}"
  if [[ "$flag" == --*=* ]]; then
    value="${flag#*=}"
    flag="${flag%%=*}"
    set -- "$flag" "$value" "${@:2}"
  fi
  case "$flag" in
    --spot) spot=1; shift; continue ;;
    --dry-run) dry_run=1; shift; continue ;;
    --no-wait) wait_active=0; shift; continue ;;
    --follow) follow=1; shift; continue ;;
    --internal-ip) internal_ip=1; shift; continue ;;
    --delete-after) delete_after=1; shift; continue ;;
    --) shift; command=("$@"); break ;;
    --type | --zone | --project | --runtime-version | --commit | --yes-delete | --worker | --lines) ;;
    --poll-seconds | --wait-minutes | --ssh-tries | --grace-seconds | --max-failures) ;;
    *) die 2 "unknown argument '$flag'; the training command comes after --" ;;
  esac
  if (($# < 2)) || [[ -z "$value" || "$value" == --* ]]; then die 2 "$flag needs a value"; fi
  case "$flag" in
    --lines | --poll-seconds | --wait-minutes | --ssh-tries | --grace-seconds | --max-failures)
      [[ "$value" =~ ^[0-9]+$ ]] || die 2 "$flag '$value' must be a whole number" ;;
  esac
  case "$flag" in
    --type) type="$value" ;;
    --zone) zone="$value" ;;
    --project) project="$value" ;;
    --runtime-version) runtime="$value" ;;
    --commit) commit="$value" ;;
    --yes-delete) yes_delete="$value" ;;
    --worker) worker="$value" ;;
    --lines) lines="$value" ;;
    --poll-seconds) poll_seconds="$value" ;;
    --wait-minutes) wait_minutes="$value" ;;
    --ssh-tries) ssh_tries="$value" ;;
    --grace-seconds) grace_seconds="$value" ;;
    --max-failures) max_failures="$value" ;;
  esac
  shift 2
done
[[ "$worker" =~ ^([0-9]+|all)$ ]] || die 2 "--worker '$worker' must be a number or all"

hosts=0  # 0: not known, and then not compared
if [[ -n "$type" ]]; then
  row="$(grep -v '^#' "$here/tpu_types.tsv" | awk -F '\t' -v type="$type" '$1 == type')"
  if [[ -n "$row" ]]; then
    IFS=$'\t' read -r _ row_runtime _ hosts row_zone _ <<<"$row"
    runtime="${runtime:-$row_runtime}"
    zone="${zone:-$row_zone}"
  elif [[ -z "$runtime" ]]; then
    die 2 "--type '$type' is not in launch/tpu_types.tsv, which has" \
      "$(grep -v '^#' "$here/tpu_types.tsv" | awk -F '\t' 'NR > 1 {printf "%s ", $1}')" \
      "; for another give --runtime-version and --zone"
  fi
fi
[[ -n "$zone" ]] || die 2 "no zone; give --zone ZONE or set TPU_ZONE"
case "$verb" in
  create | babysit) [[ -n "$type" ]] || die 2 "$verb needs --type TYPE, as --type v6e-8" ;;
esac
case "$verb" in
  run | babysit)
    ((${#command[@]})) || die 2 "$verb needs a command: $verb $name -- python -m sr_jax.main ..." ;;
  *) ((${#command[@]} == 0)) || die 2 "$verb takes no command; ${command[0]} came after --" ;;
esac
case "$verb" in
  delete | babysit)
    # babysit deletes what was preempted before it asks for a new one.
    [[ "$yes_delete" == "$name" ]] ||
      die 2 "$verb deletes TPUs: repeat the exact name, --yes-delete $name (got '$yes_delete')" ;;
esac

place=(--zone="$zone")
if [[ -n "$project" ]]; then place+=(--project="$project"); fi
ssh_flags=("${place[@]}" --quiet)
if ((internal_ip)); then ssh_flags+=(--internal-ip); fi

# What to type for another verb on the same TPU.
own() { quoted launch/tpu_vm.sh "$1" "$name" "${place[@]}" "${@:2}"; }
remind() {
  say "$name ($zone) costs money until it is deleted: $(own delete --yes-delete "$name")"
}

# --- the queued resource -----------------------------------------------------------------------

state=""
pretended=NONE  # what a dry run takes the state to be

# Sets `state`: NONE where there is no such resource, UNKNOWN where the question failed. Nothing
# is ever deleted or created because of UNKNOWN.
look() {
  local errors output
  if ((dry_run)); then
    call gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format="value(state.state)"
    state="$pretended"
    return
  fi
  errors="$scratch/errors"
  if output="$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format="value(state.state)" 2>"$errors")"; then
    state="${output:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors"; then
    state=NONE
  else
    state=UNKNOWN
    cat -- "$errors" >&2
  fi
}

# Asks for the TPU. Where the name exists already that is no error: the same command resumes.
request() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  if ((spot)); then flags+=(--spot); fi
  local status=0
  call gcloud compute tpus queued-resources create "$name" "${place[@]}" "${flags[@]}" \
    --async --quiet 2>"$scratch/errors" || status="$?"
  cat -- "$scratch/errors" >&2
  pretended=ACTIVE
  if ((status == 0)); then
    say "asked for $name: $type in $zone$( ((spot)) && printf ', spot')"
    remind
  elif grep -q ALREADY_EXISTS "$scratch/errors"; then
    say "$name exists already; it is kept"
  elif grep -qiE 'quota|RESOURCE_EXHAUSTED' "$scratch/errors"; then
    die 3 "no quota for $type in $zone: ask for it (IAM & Admin, Quotas, 'TPU'), or take another" \
      "--zone, --type or --spot, which has a quota of its own. Nothing was made"
  else
    die "$status" "the request failed; nothing was made"
  fi
}

# Waits until the TPU can be used. Returns 1 where it never will be, with `state` saying why.
wait_until_active() {
  local begin="$SECONDS" missing=0 unknown=0
  while :; do
    look
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
      NONE) missing=$((missing + 1)) ;;  # a request shows up a moment after it was made
      UNKNOWN) unknown=$((unknown + 1)) ;;
      *) missing=0 unknown=0 ;;
    esac
    if ((missing > 10)); then return 1; fi
    if ((unknown > 10)); then
      remind
      die 4 "gcloud cannot describe $name; is it still logged in?"
    fi
    if ((wait_minutes && SECONDS - begin >= wait_minutes * 60)); then
      remind
      die 4 "$name is $state after $wait_minutes minutes; the request stays in the queue"
    fi
    say "$name: $state; asking again in $poll_seconds s (Ctrl-C ends the waiting, not the request)"
    pause "$poll_seconds"
  done
}

explain_failure() {
  say "$name is $state; what the service says:"
  call gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format=yaml >&2 || true
}

# Deletes the TPU and waits until it is gone.
erase() {
  local status=0 tries=0
  if [[ "$state" != DELETING ]]; then
    call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet ||
      status="$?"
  fi
  pretended=NONE
  while :; do
    look
    if [[ "$state" == NONE ]]; then
      say "$name is gone"
      pretended=NONE
      return
    fi
    tries=$((tries + 1))
    if ((status || tries > 60)); then
      die 4 "$name is still there ($state) and may cost money; try again: $(own delete --yes-delete "$name")"
    fi
    pause "$poll_seconds"
  done
}

# Makes sure that an ACTIVE TPU of this name exists, for babysit: what was preempted is replaced.
replace_if_lost() {
  look
  case "$state" in
    NONE) request ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      if [[ "$state" == FAILED ]]; then explain_failure; fi
      say "$name is $state: a new one takes its place"
      erase
      request
      ;;
  esac
  wait_until_active
}

# --- the workers -------------------------------------------------------------------------------

# Runs words on a worker (or on all), each word arriving as it is here.
ssh_once() {
  local target="$1"
  shift
  call gcloud compute tpus tpu-vm ssh "$name" "${ssh_flags[@]}" --worker="$target" \
    --command="$(quoted "$@")"
}

# Calls a function until it works. ssh fails for the first minutes of a TPU VM; 10 to 19 is the
# worker's own word and final. Anything called so can be repeated.
persist() {
  local try status
  for ((try = 1; ; try++)); do
    status=0
    "$@" || status="$?"
    if ((status == 0 || (status >= 10 && status < 20) || try >= ssh_tries)); then
      return "$status"
    fi
    say "try $try of $ssh_tries failed with status $status; again in $poll_seconds s"
    pause "$poll_seconds"
  done
}

worker_command() { ssh_once "$1" bash tpu_vm_worker.sh "${@:2}"; }

copy_to_all() {
  call gcloud compute tpus tpu-vm scp "$@" "$name:" "${ssh_flags[@]}" --worker=all
}

# Checks the answers of all hosts in "$1": as many as the type has, and of one mind.
check_hosts() {
  ((dry_run)) && return
  local answers count fields
  answers="$(grep '^sr_jax_worker ' <<<"$1" || true)"
  count="$(grep -c . <<<"$answers" || true)"
  if ((hosts && count != hosts)); then
    say "$count of $hosts hosts of $name answered"
    return 1
  fi
  fields="$(sed -E 's/.* (commit=[^ ]* packages=.*)$/\1/' <<<"$answers" | sort -u)"
  if [[ "$fields" == *$'\n'* ]]; then
    say "the hosts differ, and would hang at the first collective; delete and create anew:"
    printf '%s\n' "$answers" >&2
    return 1
  fi
}

# The commit goes there as an archive: no credentials on the VM, nothing to push first, and the
# same files on every host.
setup() {
  if [[ -z "$commit" ]]; then
    [[ -z "$(git -C "$here/.." status --porcelain --untracked-files=no)" ]] ||
      die 2 "there are uncommitted changes, which would stay behind; commit, or --commit HEAD"
  fi
  local sha archive output
  sha="$(git -C "$here/.." rev-parse --verify --quiet "${commit:-HEAD}^{commit}")" ||
    die 2 "--commit '${commit:-HEAD}' is no commit of this repository"
  archive="$scratch/sr_jax-$sha.tar.gz"
  call git -C "$here/.." archive --format=tar.gz --output="$archive" "$sha" || return
  persist copy_to_all "$archive" "$here/tpu_vm_worker.sh" || return
  if ((dry_run)); then
    worker_command all install "$sha"
    return
  fi
  output="$(persist worker_command all install "$sha")" || return
  printf '%s\n' "$output"
  check_hosts "$output" || return 4
  say "commit $sha is on every host of $name"
}

run() {
  local status=0
  persist worker_command all start "${command[@]}" || status="$?"
  if ((status)); then
    # 13 is another command's run, which is not ours to end.
    if ((status != 13)); then
      say "not all hosts started, and those that did would wait for the others: stopping all"
      worker_command all stop 10 || true
    fi
    return "$status"
  fi
  say "runs on every host of $name; watch it: $(own logs --follow)"
}

stop() { persist worker_command all stop "$grace_seconds"; }

# Sets `program`: running, finished, stopped, failed, or unreachable.
program=""
look_at_program() {
  local output states
  if ((dry_run)); then
    worker_command all state
    program=finished
    return
  fi
  if ! output="$(worker_command all state)" || ! check_hosts "$output"; then
    program=unreachable
    return
  fi
  states="$(sed -nE 's/^sr_jax_worker .* state=([a-z]+) .*/\1/p' <<<"$output" | sort -u)"
  case "$states" in
    finished | running | stopped) program="$states" ;;
    # Hosts end within seconds of each other.
    $'finished\nrunning') program=running ;;
    *stopped*) program=stopped ;;
    # Failed on one, or not running on one (restarted machine): no use waiting for the others.
    *) program=failed ;;
  esac
}

# Watches until there is something to do; sets `program` as above, or to preempted or deleted.
watch() {
  local unreachable=0
  while :; do
    look
    case "$state" in
      ACTIVE | UNKNOWN) ;;
      NONE | DELETING) program=deleted; return ;;  # the service keeps what it preempts as SUSPENDED
      *) program=preempted; return ;;
    esac
    look_at_program
    case "$program" in
      running) unreachable=0 ;;
      unreachable)
        unreachable=$((unreachable + 1))
        if ((unreachable >= ssh_tries)); then return; fi
        ;;
      *) return ;;
    esac
    pause "$poll_seconds"
  done
}

# Ends babysit: the TPU is deleted or said to cost, never left in silence.
end_babysit() {
  if ((delete_after)); then erase; else remind; fi
}

babysit() {
  local failures=0 began status
  while :; do
    status=0
    program=failed
    began="$SECONDS"
    if replace_if_lost; then
      { setup && run; } || status="$?"
      if ((status == 0)); then
        watch
      elif ((status == 2)); then
        exit 2
      else
        # It may have been preempted between create and run; that is no failure of the program.
        look
        case "$state" in ACTIVE | UNKNOWN) ;; *) program=preempted ;; esac
      fi
    elif [[ "$state" != FAILED ]]; then
      program=preempted
    fi
    case "$program" in
      finished)
        say "finished"
        end_babysit
        if ((dry_run)); then
          say "after a preemption, before setup and run again:"
          erase
          request
        fi
        return
        ;;
      stopped)
        remind
        die 6 "stopped by hand; the same command resumes"
        ;;
      deleted) die 6 "$name was deleted by hand; the same command makes a new one" ;;
      preempted)
        say "$name was preempted ($state): a new one resumes from the last checkpoint"
        pause "$poll_seconds"
        continue
        ;;
    esac
    # An hour's work is progress: the count is of failures in a row.
    if ((SECONDS - began > 3600)); then failures=0; fi
    failures=$((failures + 1))
    say "failure $failures of $max_failures ($program)"
    if [[ "$program" != unreachable && "$state" == ACTIVE ]]; then
      # All hosts or none: one that goes on alone waits for ever, or writes beside the others.
      worker_command 0 log 20 || true
      worker_command all stop 10 || true
    fi
    if ((failures >= max_failures)); then
      end_babysit
      die 7 "gave up after $failures failures in a row"
    fi
    if [[ "$program" == unreachable ]]; then
      say "$name does not answer: a new one takes its place"
      erase
    fi
    pause $((poll_seconds << failures))
  done
}

# --- the verbs ---------------------------------------------------------------------------------

scratch="$(mktemp -d)"
case "$verb" in
  create)
    look
    case "$state" in
      NONE) request ;;
      UNKNOWN) die 4 "gcloud cannot say whether $name exists; nothing was asked for" ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        explain_failure
        die 4 "delete it before a new one of this name: $(own delete --yes-delete "$name")"
        ;;
      *) say "$name exists already ($state); it is kept" ;;
    esac
    if ((wait_active)); then
      if ! wait_until_active; then
        explain_failure
        die 4 "it will not become usable; delete it: $(own delete --yes-delete "$name")"
      fi
      say "$name is ready; next: $(own setup)"
      remind
    fi
    ;;
  setup)
    setup
    say "next: $(own run -- python -m sr_jax.main --config configs/esrgan.py --workdir gs://BUCKET/RUN)"
    ;;
  run) run ;;
  logs)
    # All logs at once is possible, but they say the same in step.
    if ((follow)); then
      worker_command "$worker" log "$lines" follow
    else
      worker_command "$worker" log "$lines"
    fi
    ;;
  status)
    pretended=ACTIVE
    look
    printf 'queued resource %s (%s): %s\n' "$name" "$zone" "$state"
    case "$state" in
      NONE) exit 5 ;;
      ACTIVE)
        worker_command all state
        remind
        ;;
      *) remind ;;
    esac
    ;;
  stop)
    stop
    remind
    ;;
  delete)
    look
    case "$state" in
      NONE)
        if ! ((dry_run)); then
          die 5 "there is no $name in $zone. In another zone or project it would still cost:" \
            "gcloud compute tpus queued-resources list --zone=ZONE --project=PROJECT"
        fi
        ;;
      UNKNOWN) die 4 "gcloud cannot say whether $name exists; nothing was deleted" ;;
    esac
    erase
    ;;
  babysit) babysit ;;
esac
