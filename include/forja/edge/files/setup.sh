#!/bin/sh
# Sets this device up for inference: power mode, clocks, swap. Says what it changes, and takes it back.
#
#   sudo ./setup.sh [--etc DIR] [--var DIR]     checks the bundle first, with the keys of this device
#   ./setup.sh --dry-run                        only says what it would do
#   sudo ./setup.sh --undo                      back to what it found
#
# The power mode stays over a start of the device, clocks and swap don't: run it again then. Exit status 0: done; 2: used wrongly; 3: refused.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
etc=${FORJA_EDGE_ETC:-/etc/forja-edge}
var=${FORJA_EDGE_VAR:-/var/lib/forja-edge}
conf=${FORJA_EDGE_NVPMODEL:-/etc/nvpmodel.conf}
meminfo=${FORJA_EDGE_MEMINFO:-/proc/meminfo}
dry=''
undo=''

refuse() {
    echo "refused: $1; to do: $2" >&2
    exit 3
}

# Read, not sourced: what is in the file is never run, whatever it says.
value() {
    sed -n "s/^$1=//p" "$here/bundle.env"
}

act() { # act WHAT COMMAND...: say it, and do it unless this is a dry run
    echo "$1"
    shift
    echo "    $*"
    [ -n "$dry" ] || "$@" >/dev/null || refuse "$* failed" "read its words above; ./setup.sh --undo takes back what was done"
}

while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=yes ;;
        --undo) undo=yes ;;
        --etc) etc=${2:?a folder after --etc} && shift ;;
        --var) var=${2:?a folder after --var} && shift ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
    shift
done
if [ -z "$dry" ]; then
    [ "$(id -u)" = 0 ] || refuse "power mode, clocks and swap need root" "sudo $0, or $0 --dry-run to see what it would do"
    [ -n "$undo" ] || python3 -B "$here/trust.py" --etc "$etc" --var "$var" "$here" || exit 3
fi
before=$var/setup.before
clocks=$var/clocks.before
swap=$var/swap

if [ -n "$undo" ]; then
    [ -f "$before" ] || refuse "nothing to undo: $before is missing" "nothing; setup.sh changed nothing on this device"
    mode=$(sed -n 's/^MODE=//p' "$before")
    [ ! -f "$clocks" ] || act "clocks: as before" jetson_clocks --restore "$clocks"
    [ -z "$mode" ] || act "power mode: back to $mode" nvpmodel -m "$mode"
    if [ -f "$swap" ]; then
        act "swap: $swap is taken off" swapoff "$swap"
        act "swap: and removed" rm -f "$swap"
    fi
    [ -n "$dry" ] || rm -f "$before" "$clocks"
    exit 0
fi

modes=$(value MODES)
wanted=$(value SWAP_MIB)
if [ -z "$modes" ] && [ "$wanted" = 0 ]; then
    echo "nothing to set: $(value TARGET) has no power mode, and needs no swap to build"
    exit 0
fi
[ -n "$dry" ] || mkdir -p "$var"

number='' # of the power mode: it differs between modules and JetPacks, so the device's own list counts
for name in $modes; do
    [ ! -r "$conf" ] || number=$(sed -n "s/^< *POWER_MODEL  *ID=\([0-9]*\)  *NAME=$name *>.*/\1/p" "$conf" | head -n 1)
    [ -z "$number" ] || break
done
if [ -n "$modes" ] && [ -z "$number" ]; then
    if [ -r "$conf" ]; then
        refuse "$conf knows none of: $modes" "choose one of $(sed -n 's/^< *POWER_MODEL  *ID=\([0-9]*\)  *NAME=\([^ >]*\).*/\1=\2/p' "$conf" | tr '\n' ' ')with nvpmodel -m by hand"
    fi
    number=$(value NVPMODEL)
    name=${modes%% *}
    [ -n "$number" ] || refuse "$conf is missing, and the mode's number differs between modules" "run nvpmodel -p --verbose and set it by hand"
fi
if [ -n "$number" ]; then
    if [ -z "$dry" ] && [ ! -f "$before" ]; then
        # nvpmodel -q ends with the number of the mode that is on.
        echo "MODE=$(nvpmodel -q 2>/dev/null | sed -n 's/^\([0-9][0-9]*\)$/\1/p' | tail -n 1)" >"$before"
        jetson_clocks --store "$clocks" >/dev/null || refuse "jetson_clocks can't store the clocks" "read its words above"
    fi
    act "power mode: $name" nvpmodel -m "$number"
    act "clocks: as high as the mode allows, until the next start" jetson_clocks
fi
has=$(($(sed -n 's/^SwapTotal: *\([0-9]*\) kB.*/\1/p' "$meminfo") / 1024))
if [ "$wanted" -gt "$has" ]; then
    missing=$((wanted - has))
    if [ ! -f "$swap" ]; then
        room=$(df -Pk "$(dirname -- "$var")" | awk 'NR == 2 { print int($4 / 1024) }')
        [ "$room" -gt "$missing" ] || refuse "$missing MiB of swap in $var, $room MiB are free" "make room, or build on a device of this kind that has some"
        act "swap: $missing MiB more (there are $has), in $swap" dd if=/dev/zero "of=$swap" bs=1048576 "count=$missing"
        act "swap: readable by root alone" chmod 600 "$swap"
        act "swap: made" mkswap "$swap"
    fi
    act "swap: on" swapon "$swap"
    [ -n "$dry" ] || [ -f "$before" ] || echo "MODE=" >"$before"
fi
echo "to undo: sudo $0 --undo"
