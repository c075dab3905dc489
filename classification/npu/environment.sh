# shellcheck shell=bash
# What the scripts beside it begin with; not to be run. They define `usage` and default_recipe. This leaves data_dir,
# recipe and, as positional parameters, the options, in an environment that knows CANN.

case "${1-}" in
-h | --help)
    usage
    exit 0
    ;;
"" | -*)
    usage >&2
    echo "error: DATA_DIR is missing" >&2
    exit 2
    ;;
esac
data_dir=$1
recipe=$default_recipe
shift
case "${1--}" in
-*) ;;
*)
    recipe=$1
    shift
    ;;
esac

# CANN: as this shell knows it, or from the set_env.sh under ASCEND_HOME, or from where the installer puts it.
if [ -z "${ASCEND_HOME_PATH-}${ASCEND_TOOLKIT_HOME-}" ]; then
    set_env=""
    if [ -n "${ASCEND_HOME-}" ]; then
        homes=("$ASCEND_HOME")
    else
        homes=(/usr/local/Ascend "${HOME-}/Ascend")
    fi
    for home in "${homes[@]}"; do
        for folder in "$home" "$home/cann" "$home/ascend-toolkit"; do # "cann" since 8.5
            if [ -z "$set_env" ] && [ -f "$folder/set_env.sh" ]; then
                set_env=$folder/set_env.sh
            fi
        done
    done
    if [ -z "$set_env" ]; then
        echo "error: CANN was not found: source its set_env.sh, or set ASCEND_HOME to the folder that holds it;" \
            "\`hvt doctor --npu\` says what is missing" >&2
        exit 2
    fi
    set +eu # set_env.sh is not written for these, and not for our arguments
    # shellcheck disable=SC1090
    . "$set_env" ""
    set -eu
fi

# HCCL's own 120 s are short where one process reads a slow disk before it meets the others.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-600}"
# The packages are found from any folder, so that paths and outputs are the caller's.
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
