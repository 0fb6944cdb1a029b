#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first. A call ends within MINUTES; the same command then
# goes on.
#
#     lab/studies/paper_scale.sh                      CIFAR-10, downloaded on first use
#     DATA=my_cifar10 lab/studies/paper_scale.sh a b  train/<class> and test/<class>; the first two parts
#     DATA=cifar10.tar.xz lab/studies/paper_scale.sh  an archive of such folders, unpacked once
#     until lab/studies/paper_scale.sh; do [ $? = 75 ] || break; done     as many calls as it takes
#     TOY=1 lab/studies/paper_scale.sh                toy sizes on a CPU, a few minutes: does it run?
#
#     a  the gpu recipe, 200 epochs          e  Figure 4's m
#     b  the released recipe, 200 epochs     f  SimCLR and BYOL for the time of a
#     c  Figure 3's pair                     g  lab.bench, throughput, the picture of speed
#     d  Figure 5's lambda
#
# MINUTES=9  a call's length          SEEDS="0 1 2"  [0]            RESULTS=DIR  [figures/results]
# JOBS=1     runs at the same time    DEVICE=cuda    as train.py    KEEP=DIR     keep the runs' folders
# PYTHON     [.venv/bin/python, else python3]
#
# Exit status: 0 all parts are done, 75 time was up or it was stopped, else that of the part that
# failed. Every tenth epoch is saved; TERM makes a run save in the middle of an epoch.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MINUTES=${MINUTES:-9} JOBS=${JOBS:-1} SEEDS=${SEEDS:-0} KEEP=${KEEP:-} DATA=${DATA:-}
scale=paper bench=(--repeats 10)
if [ -n "${TOY:-}" ]; then
    scale=demo bench=(--scale 0.01 --repeats 1)
    DEVICE=${DEVICE:-cpu} RESULTS=${RESULTS:-runs/toy}
fi
DEVICE=${DEVICE:-cuda} RESULTS=${RESULTS:-figures/results}
read -ra seeds <<<"$SEEDS"
# half a minute, or half of it all, is left for what runs to save
limit=$(awk -v m="$MINUTES" 'BEGIN { s = m * 60; printf "%d", (s > 60 ? s - 30 : s / 2) }')
child=

stop() {
    echo "$1; the same command goes on" >&2
    exit 75
}

interrupted() {
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    stop "stopped"
}
trap interrupted TERM INT

run() { # a command, with what is left of the time; --foreground: the signal goes to it alone, which tells its processes
    local status=0 left=$((limit - SECONDS))
    [ "$left" -gt 0 ] || stop "time is up"
    echo "[${SECONDS} s] $*" >&2
    timeout --foreground --preserve-status -s TERM "$left" "$@" &
    child=$!
    wait "$child" || status=$?
    child=
    case $status in
        0) ;;
        130 | 143) stop "time is up" ;;
        *) exit "$status" ;;
    esac
}

figure() { # module, further options
    local module=$1 name=${1##*.}
    shift
    run "$PYTHON" -m "$module" "$@" --scale "$scale" --device "$DEVICE" --seeds "${seeds[@]}" --jobs "$JOBS" \
        --results "$RESULTS/$name-$scale.json" ${DATA:+--dataset folder --data-dir "$DATA"} ${KEEP:+--keep "$KEEP"}
}

once() { # a file, and the command that makes it
    local file=$1
    shift
    [ -e "$file" ] || run "$@" --device "$DEVICE" "${bench[@]}" --results "$file"
}

throughput() {
    once "$RESULTS/bench/throughput-$DEVICE.json" "$PYTHON" -m lab.studies.throughput
}

part() {
    case $1 in
        a) figure lab.studies.paper_scale gpu ;;
        b) figure lab.studies.paper_scale released ;;
        c) figure figures.fig3_convergence ;;
        d) figure figures.fig5_lambda ;;
        e) figure figures.fig4_momentum ;;
        f)
            throughput
            figure lab.studies.paper_scale field --rates "$RESULTS/bench/throughput-$DEVICE.json"
            ;;
        g)
            for what in overhead input bank field; do
                once "$RESULTS/bench/$what-$DEVICE.json" "$PYTHON" -m lab.bench "$what"
            done
            throughput
            run "$PYTHON" -m lab.studies.speed --device "$DEVICE" --results "$RESULTS/bench" \
                --picture "$RESULTS/speed-$DEVICE.png"
            ;;
        *)
            echo "paper_scale.sh: no part $1, choose from a b c d e f g" >&2
            exit 2
            ;;
    esac
}

mkdir -p "$RESULTS/bench"
if [ -f "$DATA" ]; then # in a place of its own until it is whole
    if [ ! -d runs/unpacked ]; then
        mkdir -p runs/unpacking
        run tar -xf "$DATA" -C runs/unpacking
        mv runs/unpacking runs/unpacked
    fi
    DATA=runs/unpacked
fi
if [ "$scale" = paper ]; then # decoded or downloaded once, before several processes want it
    run "$PYTHON" -c 'import sys, data
try:
    data.load(*sys.argv[1:], size=32, cache_dir="runs/decoded")
except data.UserError as error:
    sys.exit(f"paper_scale.sh: {error}")' "$([ -n "$DATA" ] && echo folder || echo cifar10)" "${DATA:-data}"
fi
[ $# -gt 0 ] || set -- a b c d e f g
for name in "$@"; do
    part "$name"
done
echo "all done: $*" >&2
