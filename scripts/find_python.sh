#!/bin/sh
# Prints the path of a Python that can make this project's environment: CPython 3.12 or 3.13 with venv and ensurepip.
# Looks at $PYTHON alone if that is set; else on the PATH, then among the versions that pyenv and uv keep.
# If there is none: the reasons on standard error, exit code 2.
set -u

probe='
import sys, sysconfig
reason = ""
if sys.version_info[:2] not in ((3, 12), (3, 13)):
    reason = "is Python %d.%d" % sys.version_info[:2]
elif sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    reason = "is not the standard build of CPython, for which the packages are built"
else:
    try:
        import ensurepip, venv
    except ImportError:
        reason = "lacks the modules venv and ensurepip (on Debian and Ubuntu: apt install python%d.%d-venv)" % sys.version_info[:2]
print(reason or sys.executable)
sys.exit(1 if reason else 0)
'
refused=""

# Ends the script with the path if this one fits; notes why not if it is a Python that does not.
examine() {
    command -v "$1" >/dev/null 2>&1 || return 0
    if verdict=$("$1" -c "$probe" 2>/dev/null </dev/null); then
        printf '%s\n' "$verdict"
        exit 0
    fi
    [ -z "$verdict" ] || refused="$refused
  $1 $verdict"
}

if [ -n "${PYTHON:-}" ]; then
    examine "$PYTHON"
    printf 'PYTHON=%s is no usable Python 3.12 or 3.13.%s\n' "$PYTHON" "$refused" >&2
    exit 2
fi

pyenv_versions="${PYENV_ROOT:-${HOME:-}/.pyenv}/versions"
uv_versions="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}"
for name in python3.12 python3.13 python3 python; do examine "$name"; done
for path in "$pyenv_versions"/3.12*/bin/python3 "$pyenv_versions"/3.13*/bin/python3; do examine "$path"; done
for path in "$uv_versions"/cpython-3.12*/bin/python3 "$uv_versions"/cpython-3.13*/bin/python3; do examine "$path"; done

cat >&2 <<END
No Python 3.12 or 3.13 found. Looked for:
  python3.12, python3.13, python3 and python on the PATH
  $pyenv_versions/3.12* and 3.13* (pyenv)
  $uv_versions/cpython-3.12* and cpython-3.13* (uv)
Found, but not usable:${refused:- nothing}
Get one with one of these, then run make again:
  uv python install 3.12
  pyenv install 3.12
  apt install python3.12 python3.12-venv
or name one: make PYTHON=/path/to/python3.12 ...
END
exit 2
