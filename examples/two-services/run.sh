#!/usr/bin/env bash
# Two services, a sidecar beside each, a control plane: all on loopback, without root. Ends by itself and leaves
# nothing behind; with --keep it stays up until Ctrl-C, to play with.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# Ports; set the variable to change one.
: "${CONTROL_PLANE:=15012}" "${CONTROL_PLANE_ADMIN:=15014}"
: "${CATALOG_APP:=8080}" "${CATALOG_MESH:=8443}" "${CATALOG_ADMIN:=15000}" "${CATALOG_METRICS:=15020}" "${CATALOG_HEALTH:=15021}"
: "${WEB_OUT:=9080}" "${WEB_PROXY:=9081}" "${WEB_ADMIN:=15100}" "${WEB_METRICS:=15120}" "${WEB_HEALTH:=15121}"

# `cargo build --release` makes it.
outrigger=${OUTRIGGER_BIN_DIR:-$here/../../target/release}/outrigger
[ -x "$outrigger" ] || { echo "$outrigger is not there: cargo build --release, or set OUTRIGGER_BIN_DIR" >&2; exit 2; }

work=$(mktemp -d)
pids=()
clean_up() {
    # The last one started ends first, so that the control plane hears of sidecars that leave.
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
        kill "${pids[i]}" 2>/dev/null || true
        wait "${pids[i]}" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }

fail() { echo "FAILED: $*" >&2; exit 1; }

# start NAME COMMAND...: runs it in the background; stdout and stderr go to files.
start() {
    local name=$1
    shift
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

# get URL: curl past any proxy.
get() { curl -sS --noproxy '*' "$@"; }

expect() { grep -q "$1" <<<"$2" || fail "expected $1 in what is shown above"; }

say "control plane: makes a certificate authority, reads $here/config"
mkdir "$work/config"
sed "s/targetPort: 8080/targetPort: $CATALOG_APP/" "$here/config/shop.yaml" >"$work/config/shop.yaml"
start control-plane "$outrigger" control-plane --config "$work/config" --state "$work/state" \
    --listen "127.0.0.1:$CONTROL_PLANE" --admin-listen "127.0.0.1:$CONTROL_PLANE_ADMIN"
ready control-plane

say "join tokens: what each sidecar may claim to be"
(umask 077
"$outrigger" token create --state "$work/state" --namespace shop --service-account catalog --label app=catalog >"$work/catalog.token"
"$outrigger" token create --state "$work/state" --namespace shop --service-account web >"$work/web.token")

mesh=(--control-plane "127.0.0.1:$CONTROL_PLANE" --trust-bundle "$work/state/trust-bundle.pem" --namespace shop
    --drain-delay 0s)

say "catalog on 127.0.0.1:$CATALOG_APP; its sidecar takes mutual TLS for it on 127.0.0.1:$CATALOG_MESH"
start catalog python3 "$here/catalog.py" "$CATALOG_APP"
wait_for catalog get --fail "http://127.0.0.1:$CATALOG_APP/tea"
start catalog-sidecar "$outrigger" sidecar run "${mesh[@]}" --name catalog --service-account catalog \
    --token-file "$work/catalog.token" --state "$work/catalog" --label app=catalog \
    --inbound "127.0.0.1:$CATALOG_MESH=127.0.0.1:$CATALOG_APP" --admin-listen "127.0.0.1:$CATALOG_ADMIN" \
    --metrics-listen "127.0.0.1:$CATALOG_METRICS" --health-listen "127.0.0.1:$CATALOG_HEALTH"
ready catalog-sidecar

say "web's sidecar: 127.0.0.1:$WEB_OUT is catalog:80, 127.0.0.1:$WEB_PROXY is a proxy to every service (curl is web)"
start web-sidecar "$outrigger" sidecar run "${mesh[@]}" --name web --service-account web \
    --token-file "$work/web.token" --state "$work/web" \
    --outbound "127.0.0.1:$WEB_OUT=catalog:80" --http-proxy "127.0.0.1:$WEB_PROXY" --admin-listen "127.0.0.1:$WEB_ADMIN" \
    --metrics-listen "127.0.0.1:$WEB_METRICS" --health-listen "127.0.0.1:$WEB_HEALTH"
ready web-sidecar

caller='called by spiffe://outrigger.local/ns/shop/sa/web'

say "curl http://127.0.0.1:$WEB_OUT/tea"
answer=$(get --fail "http://127.0.0.1:$WEB_OUT/tea")
echo "$answer"
expect "$caller" "$answer"

say "http_proxy=http://127.0.0.1:$WEB_PROXY curl http://catalog/tea"
answer=$(no_proxy='' http_proxy="http://127.0.0.1:$WEB_PROXY" curl -sS --fail http://catalog/tea)
echo "$answer"
expect "$caller" "$answer"

say "around the sidecar: plaintext to the mesh port is closed before catalog sees a byte"
if get "http://127.0.0.1:$CATALOG_MESH/tea"; then fail "plaintext was let in"; fi

say "what does not exist is refused, and says why"
answer=$(no_proxy='' http_proxy="http://127.0.0.1:$WEB_PROXY" curl -sS -i http://nothing.shop/)
echo "$answer"
expect unknown_destination "$answer"

say "curl http://127.0.0.1:$CATALOG_METRICS/metrics | grep outrigger_http_requests_total"
metrics=$(get "http://127.0.0.1:$CATALOG_METRICS/metrics" | grep '^outrigger_http_requests_total')
echo "$metrics"
expect '{.*source_workload="web".*mtls="true".*} 2$' "$metrics"

say "outrigger status"
"$outrigger" status --control-plane-admin "127.0.0.1:$CONTROL_PLANE_ADMIN"

if [ "${1:-}" = --keep ]; then
    say "up until Ctrl-C; logs are in $work"
    wait
fi
say "everything was as it should be"
