#!/bin/sh
# Makes .venv in the checkout if it is missing and installs the project with its test tools into it, at the versions
# of constraints.txt. The file .venv/installed, written last, says that all of it worked.
# If something is missing: what and what to do on standard error, exit code 2.
set -u
cd "$(dirname "$0")/.." || exit 2

fail() {
    printf '\n%s\n' "$1" >&2
    exit 2
}

make_venv() {
    python=$(sh scripts/find_python.sh) || exit 2
    echo "Making .venv with $python"
    "$python" -m venv .venv && return 0
    rm -rf .venv
    fail "$python could not make a virtual environment; its own words are above. Disk full, or the module ensurepip missing?"
}

if [ ! -e .venv ]; then
    make_venv
elif ! PYTHON=.venv/bin/python sh scripts/find_python.sh >/dev/null; then
    fail "The folder .venv is not an environment of a working Python 3.12 or 3.13. Remove it (rm -r .venv) and run make again."
fi

# An environment that uv made, or one whose making was cut off, has no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null ||
    fail "The environment in .venv has no pip and none could be put there. Remove it (rm -r .venv) and run make again."

echo "Installing into .venv at the versions of constraints.txt (several minutes the first time)"
.venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check \
    --constraint constraints.txt --editable ".[test]" ||
    fail "The packages could not be installed; pip's own words are above.
Without a network, or behind a mirror, tell pip where packages are: the variable PIP_INDEX_URL or PIP_FIND_LINKS, or pip.conf."
touch .venv/installed
