#!/usr/bin/env bash
# Sets up .venv where that is needed, then
#   bash run.sh demo [ARGUMENTS]   runs `onlinequant demo`
#   bash run.sh test               checks style and types and passes the tests, and says how long each step takes
#   bash run.sh test ARGUMENTS     the same with these arguments for pytest
#   bash run.sh lint               checks style and types only
#   bash run.sh docs [ARGUMENTS]   builds the documentation into build/site
#   bash run.sh setup              does nothing more
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

set_up() {
    # The folder counts too: a copied or moved checkout must be installed from its new place.
    local wanted
    wanted="$PWD $(cat pyproject.toml constraints.txt | cksum)"
    if [[ -f .venv/made-from && "$(<.venv/made-from)" == "$wanted" ]]; then
        return
    fi
    echo "Setting up .venv; the first time takes some minutes."
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
    # CPU builds of torch bring no Triton, whose interpreter runs the tests of the GPU's kernels.
    if [[ "$(uname)" == Linux ]] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
        .venv/bin/python -m pip install --quiet --no-deps triton==3.8.0
    fi
    echo "$wanted" >.venv/made-from
}

lint() {
    .venv/bin/python -m ruff check
    .venv/bin/python -m ruff format --check
    .venv/bin/python -m mypy
}

# The site's tools are not among those that `setup` installs: only this needs them.
set_up_docs() {
    if ! .venv/bin/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null; then
        .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
    fi
}

# One step: its name, then its command. Says how long it took, also if it failed, which ends everything.
step() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "=== $name"
    "$@" || status=$?
    echo "=== $name: $((SECONDS - start)) s, exit status $status"
    return "$status"
}

# One command a line: `set_up && lint` would switch off `set -e` inside the functions.
command=${1:-}
shift || true
case $command in
demo)
    set_up
    .venv/bin/python -m onlinequant_backend.cli demo "$@"
    ;;
test)
    set_up
    if (($#)); then
        lint
        .venv/bin/python -m pytest "$@"
    else
        # All tests go to all cores, to whichever has nothing left.
        tests=(.venv/bin/python -m pytest --numprocesses=auto --dist=worksteal --durations=15)
        step lint bash run.sh lint
        step unit "${tests[@]}" --ignore=tests/scenarios
        step scenarios "${tests[@]}" tests/scenarios
    fi
    ;;
step)
    step "$@"
    ;;
lint)
    set_up
    lint
    ;;
docs)
    set_up
    set_up_docs
    NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict "$@"
    ;;
setup)
    set_up
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
