#!/usr/bin/env bash
# Two Python services, Flask and requests, grpcio both ways, with a sidecar beside each: on loopback, without root.
# Ends by itself and leaves nothing behind; with --keep it stays up until Ctrl-C.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# Ports; set the variable to change one.
: "${CONTROL_PLANE:=15012}" "${CONTROL_PLANE_ADMIN:=15014}"
: "${CATALOG_APP:=8080}" "${CATALOG_GRPC:=8081}" "${CATALOG_MESH:=8443}" "${CATALOG_GRPC_MESH:=8444}"
: "${CATALOG_ADMIN:=15000}" "${CATALOG_METRICS:=15020}" "${CATALOG_HEALTH:=15021}"
: "${WEB_APP:=8090}" "${WEB_PROXY:=9081}" "${WEB_ADMIN:=15100}" "${WEB_METRICS:=15120}" "${WEB_HEALTH:=15121}"

# `cargo build --release` makes it.
outrigger=${OUTRIGGER_BIN_DIR:-$here/../../target/release}/outrigger
[ -x "$outrigger" ] || { echo "$outrigger is not there: cargo build --release, or set OUTRIGGER_BIN_DIR" >&2; exit 2; }

work=$(mktemp -d)
pids=()
clean_up() {
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

ready() { wait_for "$1" grep -qx ready "$work/$1.out"; }

expect() { grep -qF -- "$1" <<<"$2" || fail "expected $1 in what is shown above"; }

# get URL: curl past any proxy.
get() { curl -sS --noproxy '*' "$@"; }

# VENV=DIR uses (or makes) a virtual environment that stays, instead of one for this run.
venv=${VENV:-$work/venv}
say "virtual environment with $(tr '\n' ' ' <"$here/requirements.txt")"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"

say "control plane, tokens"
mkdir "$work/config"
sed "s/targetPort: 8080/targetPort: $CATALOG_APP/; s/targetPort: 8081/targetPort: $CATALOG_GRPC/" \
    "$here/config/shop.yaml" >"$work/config/shop.yaml"
start control-plane "$outrigger" control-plane --config "$work/config" --state "$work/state" \
    --listen "127.0.0.1:$CONTROL_PLANE" --admin-listen "127.0.0.1:$CONTROL_PLANE_ADMIN"
ready control-plane
(umask 077
"$outrigger" token create --state "$work/state" --namespace shop --service-account catalog --label app=catalog >"$work/catalog.token"
"$outrigger" token create --state "$work/state" --namespace shop --service-account web >"$work/web.token")

mesh=(--control-plane "127.0.0.1:$CONTROL_PLANE" --trust-bundle "$work/state/trust-bundle.pem" --namespace shop
    --drain-delay 0s)

say "catalog and its sidecar"
start catalog "$venv/bin/python" "$here/catalog.py" "$CATALOG_APP" "$CATALOG_GRPC"
wait_for catalog get --fail "http://127.0.0.1:$CATALOG_APP/items/tea"
start catalog-sidecar "$outrigger" sidecar run "${mesh[@]}" --name catalog --service-account catalog \
    --token-file "$work/catalog.token" --state "$work/catalog" --label app=catalog \
    --inbound "127.0.0.1:$CATALOG_MESH=127.0.0.1:$CATALOG_APP" \
    --inbound "127.0.0.1:$CATALOG_GRPC_MESH=127.0.0.1:$CATALOG_GRPC" --admin-listen "127.0.0.1:$CATALOG_ADMIN" \
    --metrics-listen "127.0.0.1:$CATALOG_METRICS" --health-listen "127.0.0.1:$CATALOG_HEALTH"
ready catalog-sidecar

say "web and its sidecar; all that web is told is http_proxy=http://127.0.0.1:$WEB_PROXY"
start web-sidecar "$outrigger" sidecar run "${mesh[@]}" --name web --service-account web \
    --token-file "$work/web.token" --state "$work/web" --http-proxy "127.0.0.1:$WEB_PROXY" \
    --admin-listen "127.0.0.1:$WEB_ADMIN" --metrics-listen "127.0.0.1:$WEB_METRICS" --health-listen "127.0.0.1:$WEB_HEALTH"
ready web-sidecar
# Proxies and exceptions of this shell would win over it.
start web env -u https_proxy -u HTTPS_PROXY -u grpc_proxy -u no_proxy -u NO_PROXY -u no_grpc_proxy \
    http_proxy="http://127.0.0.1:$WEB_PROXY" "$venv/bin/python" "$here/web.py" "$WEB_APP"
wait_for web get "http://127.0.0.1:$WEB_APP/"

web="spiffe://outrigger.local/ns/shop/sa/web"

say "curl http://127.0.0.1:$WEB_APP/shop/tea"
answer=$(get --fail "http://127.0.0.1:$WEB_APP/shop/tea") || { cat "$work/web.log" >&2; fail "web did not answer"; }
echo "$answer"
expect "\"grpc\":{\"caller\":\"$web\",\"price\":450}" "$answer"
expect "\"http\":{\"caller\":\"$web\",\"name\":\"tea\",\"price\":450}" "$answer"
expect '"items":["tea","milk","sugar"]' "$answer"

say "an error of the application stays its own: HTTP 404, gRPC NOT_FOUND"
answer=$(get -w '%{http_code}' "http://127.0.0.1:$WEB_APP/shop/coffee")
echo "$answer"
expect 404 "$answer"
answer=$(get "http://127.0.0.1:$WEB_APP/grpc-error/coffee")
echo "$answer"
expect '"code":"NOT_FOUND"' "$answer"

say "what catalog's sidecar counted"
metrics=$(get "http://127.0.0.1:$CATALOG_METRICS/metrics" | grep '^outrigger_http_requests_total')
sed -E 's/.*protocol="([^"]*)".*code="([^"]*)",grpc_status="([^"]*)",mtls="([^"]*)".* ([0-9]+)$/\5 \1 requests, code \2, grpc_status \3, mtls \4/' <<<"$metrics"
expect 'protocol="http1",method="GET",code="200",grpc_status="",mtls="true",reason=""} 1' "$metrics"
expect 'protocol="grpc",method="POST",code="200",grpc_status="0",mtls="true",reason=""} 2' "$metrics"
expect 'protocol="grpc",method="POST",code="200",grpc_status="5",mtls="true",reason=""} 1' "$metrics"

if [ "${1:-}" = --keep ]; then
    say "up until Ctrl-C; logs are in $work"
    wait
fi
say "verified: HTTP with requests, gRPC unary, streaming and errors with grpcio, all through the sidecars with mutual TLS, caller known"
