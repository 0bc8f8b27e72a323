#!/usr/bin/env bash
# Two machines (network namespaces) with a sidecar each, and applications that know nothing of it. As root, or as anybody
# where user namespaces are allowed. Ends by itself and leaves nothing behind; with --shell it opens a shell on the machine
# `web`, and ends with that.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# `cargo build --release` makes it.
outrigger=${OUTRIGGER_BIN_DIR:-$here/../../target/release}/outrigger
[ -x "$outrigger" ] || { echo "$outrigger is not there: cargo build --release, or set OUTRIGGER_BIN_DIR" >&2; exit 2; }
for program in unshare nsenter ip nft curl python3; do
    command -v "$program" >/dev/null || { echo "$program is not there: apt-get install util-linux iproute2 nftables curl python3" >&2; exit 2; }
done

# All of it happens in namespaces of its own: nothing is done to this machine's network or files.
if [ -z "${TRANSPARENT_INSIDE:-}" ]; then
    user=()
    [ "$(id -u)" = 0 ] || user=(--user --map-root-user)
    unshare "${user[@]}" --net --mount true || { echo "needs root, or a kernel that lets users make namespaces" >&2; exit 2; }
    TRANSPARENT_INSIDE=yes exec unshare "${user[@]}" --net --mount "$0" "$@"
fi

work=$(mktemp -d)
pids=()
clean_up() {
    # The last one started ends first, so that the control plane hears of sidecars that leave.
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
        kill "${pids[i]}" 2>/dev/null || true
        wait "${pids[i]}" 2>/dev/null || true
    done
    umount /etc/hosts "${resolv_conf:-}" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }

fail() { echo "FAILED: $*" >&2; exit 1; }

# start NAME MACHINE COMMAND...: runs it there in the background; stdout and stderr go to files. What is started is the
# program itself and no shell around it, so that it is the program that ends.
start() {
    local name=$1 machine=$2
    shift 2
    [ "$machine" = here ] || set -- nsenter --net="/run/netns/$machine" "$@"
    "$@" >"$work/$name.out" 2>"$work/$name.log" &
    pids+=($!)
}

# wait_for NAME COMMAND...: until the command succeeds, as long as the process that was started last lives.
wait_for() {
    local name=$1 pid=${pids[-1]}
    shift
    for _ in $(seq 150); do
        kill -0 "$pid" 2>/dev/null || break
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    cat "$work/$name.log" >&2
    fail "$name does not serve; its log is above"
}

# The line with which control plane and sidecars say that they serve.
ready() { wait_for "$1" grep -qx ready "$work/$1.out"; }

expect() { grep -q "$1" <<<"$2" || fail "expected $1 in what is shown above"; }

# on MACHINE COMMAND...: runs it there.
on() { nsenter --net="/run/netns/$1" "${@:2}"; }

# machine NAME ADDRESS: a namespace with one link, to this one, which is everybody's gateway.
machine() {
    ip netns add "$1"
    ip link add "$1" type veth peer name eth0 netns "$1"
    ip link set "$1" master mesh up
    on "$1" ip link set lo up
    on "$1" ip addr add "$2/24" dev eth0
    on "$1" ip link set eth0 up
    on "$1" ip route add default via 10.77.0.1
}

say "two machines: web, 10.77.0.2, and catalog, 10.77.0.3; catalog.shop is 10.96.0.10, which is nobody's address"
mount -t tmpfs tmpfs /run
# Names: /etc/hosts has none, and at the name server that is given nobody listens.
printf '127.0.0.1 localhost %s\n' "$(uname -n)" >"$work/hosts"
mount --bind "$work/hosts" /etc/hosts
echo 'nameserver 10.77.0.1' >"$work/resolv.conf"
resolv_conf=$(readlink -m /etc/resolv.conf)
[ -e "$resolv_conf" ] || { mkdir -p "$(dirname "$resolv_conf")"; : >"$resolv_conf"; }
mount --bind "$work/resolv.conf" "$resolv_conf"
ip link set lo up
ip link add mesh type bridge
ip addr add 10.77.0.1/24 dev mesh
ip link set mesh up
machine web 10.77.0.2
machine catalog 10.77.0.3

say "control plane: makes a certificate authority, reads $here/config"
start control-plane here "$outrigger" control-plane --config "$here/config" --state "$work/state" --listen 10.77.0.1:15012
ready control-plane

say "a token, a sidecar and the redirect rules on each machine"
# sidecar MACHINE FLAGS...: where every process is root, the sidecar's own sockets are known by a mark.
sidecar() {
    local machine=$1
    shift
    (umask 077
    "$outrigger" token create --state "$work/state" --namespace shop --service-account "$machine" "$@" >"$work/$machine.token")
    start "$machine-sidecar" "$machine" "$outrigger" sidecar run --transparent --mark 1337 --dns-listen 127.0.0.1:15053 \
        --control-plane 10.77.0.1:15012 --trust-bundle "$work/state/trust-bundle.pem" \
        --namespace shop --service-account "$machine" --name "$machine" "$@" \
        --token-file "$work/$machine.token" --state "$work/$machine" --drain-delay 0s
    ready "$machine-sidecar"
    on "$machine" "$outrigger" sidecar redirect apply --mark 1337 --dns
}
sidecar catalog --label app=catalog
sidecar web
start catalog catalog python3 "$here/catalog.py" 8080
wait_for catalog on catalog curl -sf http://127.0.0.1:8080/

say "on web: outrigger sidecar redirect check"
on web "$outrigger" sidecar redirect check

say "on web: getent hosts catalog catalog.shop.svc.cluster.local tea"
names=$(on web getent ahosts catalog && on web getent hosts catalog.shop.svc.cluster.local && on web getent ahosts tea)
echo "$names"
expect '^10.96.0.10 ' "$names"
expect '^240.240.0.1 ' "$names"

say "on web: curl http://catalog.shop/tea"
answer=$(on web curl -sS --noproxy '*' --fail http://catalog.shop/tea)
echo "$answer"
expect 'called by spiffe://outrigger.local/ns/shop/sa/web' "$answer"

say "on web: curl http://tea/, a service that has no address but the mesh's"
answer=$(on web curl -sS --noproxy '*' --fail http://tea/)
echo "$answer"
expect 'called by spiffe://outrigger.local/ns/shop/sa/web' "$answer"

say "from a machine without a sidecar, to the application's own port: refused, the mesh is STRICT"
if curl -sS --noproxy '*' http://10.77.0.3:8080/tea; then fail "plaintext was let in"; fi

say "on catalog: curl http://127.0.0.1:15020/metrics | grep outrigger_http_requests_total"
metrics=$(on catalog curl -sS --noproxy '*' http://127.0.0.1:15020/metrics | grep '^outrigger_http_requests_total')
echo "$metrics"
expect '{direction="inbound".*source_workload="web".*mtls="true".*} 2$' "$metrics"

if [ "${1:-}" = --shell ]; then
    say "a shell on web: try curl http://catalog.shop/, or outrigger sidecar redirect remove; exit ends it all"
    PATH=$(dirname "$outrigger"):$PATH on web "${SHELL:-bash}" -i || true
fi

say "undone: outrigger sidecar redirect remove"
for machine in web catalog; do
    on "$machine" "$outrigger" sidecar redirect remove
    [ -z "$(on "$machine" nft list ruleset)" ] || fail "something is left on $machine"
    ! on "$machine" ip route show table all | grep -q 240.240 || fail "a route is left on $machine"
done

say "everything was as it should be"
