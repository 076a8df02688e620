#!/usr/bin/env bash
# The main job in under two minutes: a volume follows a container to another host.
#
#   packaging/demo.sh [path of nfsvol]          (or: make demo)
#
# Three computers are made of namespaces: `nas`, which serves a directory with nfsvol's embedded
# NFS server, and two Docker hosts, `alpha` and `beta`, each with a real dockerd and its own
# `nfsvol serve`. Nothing of this machine's Docker, mounts, network or files is touched: all of it
# is in memory and in namespaces of its own, which the kernel removes when this script ends,
# however it ends. What outlives them, the containers' cgroups, is removed by name.
set -euo pipefail

readonly LIMIT=300                 # seconds for everything; it needs about 15
readonly START_LIMIT=60            # seconds until a daemon answers
readonly SESSION=5                 # seconds until a dead host's volumes are free; 30 by default
readonly BRIDGE=10.89.0.1 NAS=10.89.0.2 ALPHA=10.89.0.11 BETA=10.89.0.12

fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }

# ---------------------------------------------------------------- outside: packages, namespaces

need() { # need COMMAND PACKAGE: note the package when the command is missing
    command -v "$1" >/dev/null 2>&1 || missing+=("$2")
}

install_missing() {
    local missing=() busybox
    need dockerd docker.io
    need docker docker.io
    need ip iproute2
    # The containers' only program, so it must stand alone.
    busybox=$(command -v busybox || true)
    if [ -z "$busybox" ] || ldd "$busybox" >/dev/null 2>&1; then missing+=(busybox-static); fi
    [ ${#missing[@]} -eq 0 ] || "$(dirname "$(realpath "$0")")/../crates/lab/setup" "${missing[@]}"
}

remove_cgroups() { # the directories that dockerd made for this run's containers
    local end=$((SECONDS + 10))
    while [ $SECONDS -lt $end ]; do
        find /sys/fs/cgroup -depth -type d -path "*/$1*" -exec rmdir {} + 2>/dev/null || true
        [ -n "$(find /sys/fs/cgroup -type d -name "$1" -print -quit 2>/dev/null)" ] || return 0
        sleep 0.2
    done
    fail "could not remove the cgroups named $1"
}

outside() {
    [ "$(id -u)" = 0 ] || fail "it needs root, for namespaces and dockerd: sudo make demo"
    local given=${1:-target/release/nfsvol} nfsvol
    nfsvol=$(realpath -e "$given" 2>/dev/null) || fail "no $given: cargo build --release first"
    [ -c /dev/fuse ] || fail "no /dev/fuse: modprobe fuse"
    install_missing
    local cgroup=nfsvol-demo-$$-$RANDOM status=0 child
    NFSVOL=$nfsvol CGROUP=$cgroup \
        unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private \
        "$BASH" "$(realpath "$0")" --inside </dev/null &
    child=$!
    # With unshare the first process inside dies, and with that one the kernel ends all others.
    trap 'kill -KILL $child 2>/dev/null; status=130' INT TERM HUP
    while kill -0 $child 2>/dev/null; do
        if [ $SECONDS -ge $LIMIT ]; then
            printf 'demo: not done after %d s\n' $LIMIT >&2
            kill -KILL $child
        fi
        sleep 0.1
    done
    wait $child 2>/dev/null || status=$((status ? status : $?))
    trap '' INT TERM HUP
    remove_cgroups "$cgroup"
    exit $status
}

# ---------------------------------------------------------------- inside: three computers

declare -A PID=()                  # computer -> its init

computer() { # computer NAME ADDRESS: a process tree with its own network, mounts, name, processes
    local name=$1 address=$2 dir=$WORK/$1
    mkdir -p "$dir"/{etc,etc.work,docker,state}
    unshare --mount --net --uts --ipc --pid --fork --kill-child --mount-proc \
        --propagation private "$BASH" -c '
        set -e
        hostname "$1"
        mount --make-rshared /
        mount -t tmpfs tmpfs /run
        mount -t tmpfs tmpfs /tmp
        mkdir -p /run/docker/plugins
        mount -t overlay overlay -o "lowerdir=/etc,upperdir=$2/etc,workdir=$2/etc.work" /etc
        rm -rf /etc/docker
        printf "127.0.0.1 localhost\n%s nas\n%s alpha\n%s beta\n" "$3" "$4" "$5" >/etc/hosts
        : >"$2/up"
        exec sleep infinity' init "$name" "$dir" $NAS $ALPHA $BETA 2>"$dir/console.log" &
    local unshare=$! init
    until [ -e "$dir/up" ]; do
        kill -0 $unshare || fail "$name did not come up: $(cat "$dir/console.log")"
        sleep 0.05
    done
    init=$(cat /proc/$unshare/task/$unshare/children)
    PID[$name]=${init% }
    ip link add "$name" type veth peer name eth0 netns "${PID[$name]}"
    ip link set "$name" master bridge up
    on "$name" ip link set lo up
    on "$name" ip addr add "$address/24" dev eth0
    on "$name" ip link set eth0 up
}

on() { # on COMPUTER COMMAND…
    nsenter --target "${PID[$1]}" --mount --net --uts --ipc --pid "${@:2}"
}

daemon() { # daemon COMPUTER NAME COMMAND…: started there, its output in a log
    on "$1" "${@:3}" >"$WORK/$1/$2.log" 2>&1 </dev/null &
}

answers() { # answers COMPUTER NAME COMMAND…: wait until the command succeeds
    local end=$((SECONDS + START_LIMIT))
    until on "$1" "${@:3}" >/dev/null 2>&1; do
        if [ $SECONDS -ge $end ]; then
            tail -n 20 "$WORK/$1/$2.log" >&2
            fail "$2 on $1 does not answer"
        fi
        sleep 0.1
    done
}

now() { date +%s%N; }

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step() { # step COMPUTER COMMAND…: shown with its output and time; the output is kept in $OUT
    local name=$1 began shown='' word status=0
    shift
    for word; do
        case $word in *[!a-zA-Z0-9_./:=,-]*) shown+=" '$word'" ;; *) shown+=" $word" ;; esac
    done
    printf '\n\033[36m%s$\033[0m%s\n' "$name" "$shown"
    began=$(now)
    OUT=$(on "$name" "$@" 2>&1) || status=$?
    [ -z "$OUT" ] || printf '%s\n' "$OUT" | sed 's/^/    /'
    printf '    \033[2m(%d ms)\033[0m\n' $((($(now) - began) / 1000000))
    if [ $status != 0 ]; then
        tail -n 30 "$WORK/$name/nfsvol.log" >&2 || true
        fail "that failed with status $status"
    fi
}

expect() { # expect TEXT: the last step's output holds it
    case $OUT in *"$1"*) ;; *) fail "expected the output to hold: $1" ;; esac
}

docker_host() { # docker_host NAME: dockerd and nfsvol
    local dir=$WORK/$1
    daemon "$1" nfsvol nfsvol serve --share nas:/srv/volumes --data-path fuse \
        --session ${SESSION}s --state-dir "$dir/state"
    daemon "$1" dockerd dockerd --host unix:///run/docker.sock --data-root "$dir/docker" \
        --exec-root /run/docker --pidfile /run/docker.pid --bridge none --iptables=false \
        --ip6tables=false --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "/$CGROUP/$1"
}

ready() { # ready NAME: both answer, and the image is there
    local root=$WORK/image
    answers "$1" nfsvol nfsvol status
    answers "$1" dockerd docker version
    tar -C "$root" -c . | on "$1" docker import --change 'VOLUME /data' --change 'CMD ["sh"]' \
        - shop >/dev/null
}

image() { # a file system with one program, and data that a new volume starts from
    local root=$WORK/image
    mkdir -p "$root"/{bin,data,etc,tmp}
    cp -L "$(command -v busybox)" "$root/bin/busybox"
    local tool
    for tool in sh ls cat echo id hostname date; do ln -s busybox "$root/bin/$tool"; done
    echo 'shop:x:1000:1000::/data:/bin/sh' >"$root/etc/passwd"
    echo 'orders of the shop' >"$root/data/orders"
    chown -R 1000:1000 "$root/data"
    chmod 0750 "$root/data"
    chmod 0640 "$root/data/orders"
}

inside() {
    export DOCKER_HOST=unix:///run/docker.sock
    # All that is written from here on is in memory, or on a computer's own mounts.
    WORK=/mnt
    mount -t tmpfs tmpfs $WORK
    mkdir $WORK/bin
    export DOCKER_CONFIG=$WORK/docker-config
    cp "$NFSVOL" $WORK/bin/nfsvol
    # Debian's client beside Debian's engine: a newer one elsewhere may refuse its API.
    if [ -x /usr/bin/docker ]; then ln -s /usr/bin/docker $WORK/bin/docker; fi
    export PATH=$WORK/bin:$PATH:/usr/sbin:/sbin
    ip link set lo up
    # With an address of its own: otherwise it changes as computers join.
    ip link add bridge address 02:4e:46:53:00:01 type bridge
    ip addr add $BRIDGE/24 dev bridge
    ip link set bridge up

    say "Three computers: nas (an NFS server), alpha and beta (Docker hosts)"
    local began
    began=$(now)
    computer nas $NAS
    computer alpha $ALPHA
    computer beta $BETA
    image
    # /srv as the nas sees it.
    mkdir -p $WORK/nas/srv/volumes
    on nas mount --bind $WORK/nas/srv /srv
    daemon nas nfsvol nfsvol embedded-server --listen $NAS:2049 --listen $NAS:111 \
        --state-dir $WORK/nas/state /srv/volumes
    docker_host alpha
    docker_host beta
    ready alpha
    ready beta
    printf '    nas$   nfsvol embedded-server --listen %s:2049 --listen %s:111 /srv/volumes\n' $NAS $NAS
    printf '    alpha$ nfsvol serve --share nas:/srv/volumes --data-path fuse --session 5s     (and dockerd)\n'
    printf '    beta$  nfsvol serve --share nas:/srv/volumes --data-path fuse --session 5s     (and dockerd)\n'
    printf '    \033[2m(%d ms until all of them answer)\033[0m\n' $((($(now) - began) / 1000000))

    say "A volume on alpha. It starts from the image's data, owners and modes kept"
    step alpha docker volume create -d nfsvol db
    step alpha docker run --rm --network none --user 1000:1000 -v db:/data shop \
        sh -c 'echo "1 bicycle, noted on $(hostname)" >>/data/orders; ls -ln /data; cat /data/orders'
    expect 'orders of the shop'
    expect '1 bicycle'
    expect '-rw-r-----    1 1000     1000'
    step alpha docker run --detach --name shop --network none --user 1000:1000 -v db:/data shop \
        sh -c 'echo "2 lamps, noted by a container that runs on" >>/data/orders; while :; do date >/data/alive; busybox sleep 0.2; done'
    # Close-to-open: what the container has closed is on the server.
    answers alpha nfsvol docker exec shop cat /data/alive
    step nas ls -la /srv/volumes /srv/volumes/db
    expect orders

    say "The power of alpha fails: dockerd, nfsvol, the running container, all at once"
    began=$(now)
    kill -KILL "${PID[alpha]}"
    while kill -0 "${PID[alpha]}" 2>/dev/null; do sleep 0.02; done
    local dead=$SECONDS
    printf '    \033[2m(%d ms)\033[0m\n' $((($(now) - began) / 1000000))

    say "beta has the volume, and the data"
    step beta docker volume inspect --format '{{.Name}} ({{.Driver}}) on {{.Status.share}}' db
    expect 'db (nfsvol) on nas:/srv/volumes'
    step beta docker run --rm --network none --user 1000:1000 -v db:/data shop \
        sh -c 'echo "3 bells, noted on beta" >>/data/orders; cat /data/orders'
    expect '1 bicycle'
    expect '2 lamps'
    expect '3 bells'
    step beta docker volume ls
    expect db

    say "Removed by mistake, and brought back: once alpha's hold has ended with its session"
    while [ $((SECONDS - dead)) -le $((SESSION + 1)) ]; do sleep 0.2; done
    step beta docker volume rm db
    step beta nfsvol trash ls
    expect db
    step beta nfsvol restore db
    step beta docker run --rm --network none -v db:/data shop cat /data/orders
    expect '3 bells'

    printf '\nDone in %d s. All of it goes away now.\n' $SECONDS
    printf 'The embedded server is for trying out. With a real one it is the same:\n'
    printf '    nfsvol serve --share YOUR-NAS:/export\n'
}

case ${1:-} in
--inside) inside ;;
-h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" ;;
*) outside "$@" ;;
esac
