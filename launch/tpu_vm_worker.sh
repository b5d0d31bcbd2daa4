#!/usr/bin/env bash
# What one TPU VM does; tpu_vm.sh copies this file to every worker and calls it there over ssh.
#
#   tpu_vm_worker.sh install COMMIT        unpack ~/sr_jax-COMMIT.tar.gz, make the environment
#   tpu_vm_worker.sh start COMMAND...      start it detached: training outlives the ssh connection
#   tpu_vm_worker.sh state                 one line: running, finished, failed, stopped or none
#   tpu_vm_worker.sh stop SECONDS          TERM (sr_jax saves a checkpoint), and KILL after SECONDS
#   tpu_vm_worker.sh log LINES [follow]
#
# Errors of its own exit with 10 to 19, so that the caller can tell them from ssh's (255) and
# gcloud's (1), which are worth another try.
set -euo pipefail

self="$(realpath "${BASH_SOURCE[0]}")"
run="$HOME/sr_jax_run"
venv="$HOME/sr_jax_venv"
PATH="$HOME/.local/bin:$PATH"

say() { printf 'sr_jax: %s: %s\n' "$HOSTNAME" "$*" >&2; }
fail() { local code="$1"; shift; say "$*"; exit "$code"; }
read_file() { if [[ -f "$1" ]]; then cat -- "$1"; else printf '%s' "$2"; fi; }

# The supervisor and all that it starts hold this lock, so it is free exactly when nothing of the
# run is alive any more; a process id on its own would be reused after a reboot.
running() {
  [[ -f "$run/lock" ]] && ! flock --nonblock "$run/lock" true
}

print_state() {
  local state=none status="-"
  if running; then
    state=running
  elif [[ -f "$run/stopped" ]]; then
    state=stopped
  elif [[ -f "$run/status" ]]; then
    status="$(cat "$run/status")"
    if [[ "$status" == 0 ]]; then state=finished; else state=failed; fi
  elif [[ -f "$run/pid" ]]; then
    state=failed  # began and left no status: killed, or the machine was restarted
  fi
  # One printf and one line: the output of all workers arrives interleaved.
  printf 'sr_jax_worker host=%s state=%s status=%s commit=%s packages=%s\n' "$HOSTNAME" \
    "$state" "$status" "$(read_file "$HOME/sr_jax_commit" -)" "$(read_file "$HOME/sr_jax_packages" -)"
}

install() {
  local commit="$1"
  local archive="$HOME/sr_jax-$commit.tar.gz" target="$HOME/sr_jax-$commit"
  if [[ "$(read_file "$HOME/sr_jax_commit" -)" == "$commit" ]]; then
    rm -f -- "$archive"
    print_state
    return
  fi
  if running; then
    fail 12 "a run is alive; stop it before another commit is installed"
  fi
  # Until all is done no commit counts as installed: half an installation is made again.
  rm -rf -- "$target" "$HOME/sr_jax_commit"
  mkdir -p -- "$target"
  tar -xzf "$archive" -C "$target" || fail 11 "cannot unpack $archive"
  # The images come with Python 3.10, sr_jax needs 3.11: uv brings its own.
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv || fail 11 "cannot install uv"
  fi
  uv venv --quiet --allow-existing --python 3.12 "$venv" || fail 11 "cannot make $venv"
  uv pip install --quiet --python "$venv/bin/python" -r "$target/requirements.txt" 'jax[tpu]' \
    'gcsfs>=2026.4' || fail 11 "cannot install the requirements"
  # Hosts with different libtpu or jax hang at the first collective: tpu_vm.sh compares this.
  uv pip freeze --quiet --python "$venv/bin/python" | sha256sum | cut -c1-12 >"$HOME/sr_jax_packages"
  ln -sfn -- "$target" "$HOME/sr_jax"
  rm -f -- "$archive"
  printf '%s\n' "$commit" >"$HOME/sr_jax_commit"
  print_state
}

start() {
  [[ -f "$HOME/sr_jax_commit" ]] || fail 14 "nothing is installed here; run setup first"
  mkdir -p -- "$run"
  exec 9>>"$run/lock"
  # Not at once: `state` holds the lock for a moment when it looks.
  if ! flock --timeout 0.5 9; then
    if printf '%s\0' "$@" | cmp --silent - "$run/command"; then
      say "this command is running already"
      return
    fi
    fail 13 "another command is running; stop it first"
  fi
  rm -f -- "$run/status" "$run/stopped" "$run/pid"
  printf '%s\0' "$@" >"$run/command"
  cd -- "$HOME/sr_jax"
  # A session of its own: closing the ssh connection reaches nobody, and stop reaches everybody.
  # What TERM stops (a preemption) has not finished: babysit must not take it for that.
  SR_JAX_COMMIT="$(cat "$HOME/sr_jax_commit")" SR_JAX_STOPPED_STATUS=143 PATH="$venv/bin:$PATH" \
    setsid bash "$self" supervise "$@" >>"$run/log" 2>&1 </dev/null &
  local i
  for ((i = 0; i < 200; i++)); do
    if [[ -s "$run/pid" ]]; then
      say "started"
      return
    fi
    sleep 0.05
  done
  fail 15 "the run did not start; see $run/log"
}

supervise() {
  # Trapped and not ignored: bash outlives the signal to note the status, the program receives it.
  trap : TERM INT
  printf '%s\n' "$$" >"$run/pid.new"
  mv -- "$run/pid.new" "$run/pid"
  printf '%s sr_jax: start on %s: %s\n' "$(date -Is)" "$HOSTNAME" "$*"
  local status=0
  "$@" || status="$?"
  printf '%s sr_jax: exit status %s\n' "$(date -Is)" "$status"
  printf '%s\n' "$status" >"$run/status"
}

stop() {
  local grace="$1" i
  if ! running; then
    # A run that ended by itself stays finished or failed.
    print_state
    return
  fi
  touch -- "$run/stopped"
  kill -TERM -- "-$(cat "$run/pid")" || true
  for ((i = 0; i < grace * 10; i++)); do
    running || break
    sleep 0.1
  done
  if running; then
    say "alive $grace s after TERM: killed. The newest checkpoint is where the next run begins"
    kill -KILL -- "-$(cat "$run/pid")" || true
    sleep 0.5
  fi
  print_state
}

log() {
  [[ -f "$run/log" ]] || fail 16 "no run has been started here"
  if [[ "${2:-}" == follow ]]; then
    exec tail -n "$1" -F -- "$run/log"
  fi
  tail -n "$1" -- "$run/log"
}

verb="${1:-}"
shift || true
case "$verb" in
  install | start | supervise | stop | log) "$verb" "$@" ;;
  state) print_state ;;
  *) fail 10 "unknown verb '$verb': install, start, state, stop or log" ;;
esac
