#!/bin/sh
# Builds the TensorRT engine of this bundle, on the device that will run it: work/engine.plan and work/engine.json.
#
#   ./build.sh [--etc DIR] [--var DIR]          checks the bundle first, with the keys of this device
#   ./build.sh --dry-run --tensorrt 8.2         prints the command for a version, checks and changes nothing
#
# Exit status 0: built, or nothing to build; 2: used wrongly; 3: refused.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
etc=${FORJA_EDGE_ETC:-/etc/forja-edge}
var=${FORJA_EDGE_VAR:-/var/lib/forja-edge}
dry=''
version=''

refuse() {
    echo "refused: $1; to do: $2" >&2
    exit 3
}

# Read, not sourced: what is in the file is never run, whatever it says.
value() {
    sed -n "s/^$1=//p" "$here/bundle.env"
}

while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=yes ;;
        --tensorrt) version=${2:?a version after --tensorrt} && shift ;;
        --etc) etc=${2:?a folder after --etc} && shift ;;
        --var) var=${2:?a folder after --var} && shift ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
    shift
done
if [ -z "$dry" ]; then
    [ -z "$version" ] || refuse "--tensorrt without --dry-run" "leave it out: the version of this device counts"
    python3 -B "$here/trust.py" --etc "$etc" --var "$var" "$here" || exit 3
fi

case $(value RUNTIME) in
    onnxruntime) echo "nothing to build: ONNX Runtime reads model.onnx" && exit 0 ;;
    tensorrt-rtx) echo "nothing to build: engine.plan was built ahead of time; TensorRT-RTX compiles its kernels when it loads it" && exit 0 ;;
esac

# TensorRT 8.2.1 says v8201, 10.3.0 says v100300.
ask_version() {
    said=$("$1" --help 2>/dev/null | sed -n 's/.*\[TensorRT v\([0-9]*\)\].*/\1/p' | head -n 1)
    [ -n "$said" ] || refuse "$1 doesn't say its version" "run $1 --help and see what is wrong with it"
    if [ "$said" -ge 100000 ]; then
        echo "$((said / 10000)).$((said / 100 % 100)).$((said % 100))"
    else
        echo "$((said / 1000)).$((said / 100 % 10)).$((said % 100))"
    fi
}

number() { # 10.3.0 as 10003, to compare
    major=${1%%.*}
    rest=${1#*.}
    echo "$((major * 1000 + ${rest%%.*}))"
}

tool=trtexec
if [ -z "$version" ]; then
    tool=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
    [ -x "$tool" ] || refuse "trtexec is neither on the PATH nor at $tool" "install TensorRT of this JetPack (apt-get install tensorrt)"
    version=$(ask_version "$tool")
fi
case $version in
    [0-9]*.[0-9]*) ;;
    *) refuse "TensorRT version $version" "give it as 8.2 or 10.3.0" ;;
esac
oldest=$(value TENSORRT_MIN)
below=$(value TENSORRT_BELOW)
found=$(number "$version")
if [ "$found" -lt "$(number "$oldest")" ] || [ "$found" -ge "$(number "$below")" ]; then
    refuse "TensorRT $version" "this bundle is for $oldest or newer and older than $below: export for another target"
fi

input=$(value INPUT)
shape=$(value SHAPE)
memory=$(value WORKSPACE_MIB)
mkdir -p "$here/work"
set -- "--onnx=$here/model.onnx" "--saveEngine=$here/work/engine.plan.part" \
    "--minShapes=$input:1x$shape" "--optShapes=$input:1x$shape" "--maxShapes=$input:$(value MAX_BATCH)x$shape"
flags=$(value FLAGS)
if [ "$found" -lt 8004 ]; then
    set -- "$@" "--workspace=$memory" --buildOnly
elif [ "$found" -lt 9000 ]; then
    set -- "$@" "--memPoolSize=workspace:$memory" --buildOnly
elif [ "$found" -ge 10000 ]; then
    set -- "$@" "--memPoolSize=workspace:$memory" --skipInference
else
    refuse "TensorRT $version" "9.x was never released for a device"
fi
for flag in $flags; do
    # Since 11 the file alone holds the precision; the flag is gone.
    [ "$flag" = --stronglyTyped ] && [ "$found" -ge 11000 ] && continue
    set -- "$@" "$flag"
done
if [ -n "$dry" ]; then
    rmdir "$here/work" 2>/dev/null || true
    echo "$tool $*"
    exit 0
fi

echo "TensorRT $version: $tool $*"
began=$(date +%s)
"$tool" "$@" || refuse "trtexec ended with status $?" "read its words above; a parser error names the operator, a kill means too little memory: run setup.sh"
[ -s "$here/work/engine.plan.part" ] || refuse "trtexec wrote no engine" "read its words above"
plan=$(sha256sum "$here/work/engine.plan.part" | cut -d ' ' -f 1)
onnx=$(sha256sum "$here/model.onnx" | cut -d ' ' -f 1)
printf '{"tensorrt": "%s", "onnx_sha256": "%s", "plan_sha256": "%s", "bytes": %s, "seconds": %s, "flags": "%s"}\n' \
    "$version" "$onnx" "$plan" "$(wc -c <"$here/work/engine.plan.part" | tr -d ' ')" "$(($(date +%s) - began))" "$flags" >"$here/work/engine.json.part"
# The facts last: an engine without them doesn't count.
rm -f "$here/work/engine.json"
mv "$here/work/engine.plan.part" "$here/work/engine.plan"
mv "$here/work/engine.json.part" "$here/work/engine.json"
cat "$here/work/engine.json"
