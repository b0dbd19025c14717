#!/usr/bin/env bash
# The one door: makes .venv, installs what was tested, and runs a command in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: ./run.sh [COMMAND] [SETTINGS]

  simulate [SETTINGS]   one run by `flwr run`; without settings FedDyn and FedAvg side by side
  sweep SETTINGS        every combination on the local runtime: strategy=fedavg,feddyn seed=0,1,2
  study NAME [size=quick|paper] [seeds=N] [SETTINGS]   measure a claim;  study --list
  report DIR...         compare runs: a table and a plot
  deploy [--memory] [SETTINGS]   a real deployment on this machine: TLS, keys, nodes=N processes
  bench [OPTIONS]       seconds per round beside stock Flower and no framework;  bench --help
  test [PYTEST OPTIONS] the tests
  install               only make .venv

Settings are Hydra's: local.epochs=1 strategy.alpha=0.1 data=mnist data.root=DIR
TEXT
}

# Installing is skipped while nothing that decides it has changed.
install() {
    local python=${PYTHON:-python3} want
    want=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
    [ "$(cat .venv/.installed 2>/dev/null || true)" = "$want" ] && return
    "$python" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(f"error: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; set PYTHON")
PY
    echo "installing into .venv (torch is large: this takes minutes the first time)" >&2
    # Debian splits ensurepip off; the pip outside can then install into the new environment.
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        "$python" -m venv --without-pip .venv
    fi
    local -a needs pip=("$python" -m pip --python .venv/bin/python)
    mapfile -t needs < <("$python" - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["test"], *extras["joblib"], sep="\n")
PY
    )
    [ -x .venv/bin/pip ] && pip=(.venv/bin/python -m pip)
    # Only what is imported is compiled, when it is: of 18,000 files few are, and all take a minute.
    "${pip[@]}" install --quiet --disable-pip-version-check --no-compile \
        -c constraints.txt "${needs[@]}"
    echo "$want" >.venv/.installed
}

command=${1:-simulate}
[ $# -gt 0 ] && shift
case $command in
    -h | --help | help) usage; exit ;;
    simulate | sweep | study | report | deploy | bench | test | install) ;;
    *) echo "error: no command is called '$command'; see ./run.sh help" >&2; exit 2 ;;
esac
install
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
# Flower starts a process for every message: compiling the app anew each time is half a second.
unset PYTHONDONTWRITEBYTECODE
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} RAY_USAGE_STATS_ENABLED=0

case $command in
    simulate)
        if [ $# -gt 0 ]; then
            exec python -m app.experiment runtime=flower "$@"
        fi
        folder=runs/first-$(date +%Y%m%d-%H%M%S)
        for strategy in feddyn fedavg; do
            echo "== $strategy =="
            python -m app.experiment runtime=flower "strategy=$strategy" \
                "output_dir=$folder" "name=$strategy"
        done
        python -m app.report "$folder" --targets 0.8,0.9
        ;;
    sweep) exec python -m app.experiment -m "$@" ;;
    study) exec python -m app.study "$@" ;;
    report) exec python -m app.report "$@" ;;
    deploy) exec python -m app.deploy "$@" ;;
    bench) exec python -m bench "$@" ;;
    # In the order of the files: those that wait for processes then run beside those that compute.
    test) exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" ;;
esac
