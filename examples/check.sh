#!/usr/bin/env bash
# Runs the examples to their end, on free ports: examples/check.sh BIN_DIR [EXAMPLE...]
# BIN_DIR holds `outrigger` (target/debug, target/release). Exit code 0 when all examples verified what
# they promise, 1 otherwise, 2 for a wrong call. `python` needs PyPI, or VENV=DIR with its requirements installed;
# `transparent` needs root or user namespaces, and nftables.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] && [ -d "$1" ] || { echo "usage: $0 BIN_DIR [EXAMPLE...]" >&2; exit 2; }
OUTRIGGER_BIN_DIR=$(cd "$1" && pwd)
export OUTRIGGER_BIN_DIR
shift
[ $# -gt 0 ] || set -- two-services python transparent

# Every port that an example lets its user change, set to one that is free and outside of what the system gives away.
variables=$(sed -nE 's/^: (.*)$/\1/p' "$here"/*/run.sh | grep -oE '\$\{[A-Z_]+' | tr -d '${' | sort -u)
ports=$(python3 - "$(wc -w <<<"$variables")" <<'PYTHON'
import random, socket, sys

wanted, held = int(sys.argv[1]), []
while len(held) < wanted:
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", random.randrange(20000, 32000)))
        held.append(one)
    except OSError:
        one.close()
print(*(one.getsockname()[1] for one in held))
PYTHON
) || { echo "cannot find free ports; python3 is needed" >&2; exit 1; }
# shellcheck disable=SC2086
set_ports() {
    local ports=($2) index=0 name
    for name in $1; do
        export "$name=${ports[index]}"
        index=$((index + 1))
    done
}
set_ports "$variables" "$ports"

status=0
for example in "$@"; do
    echo "=== $example"
    if "$here/$example/run.sh" </dev/null; then
        echo "=== $example: passed"
    else
        echo "=== $example: FAILED" >&2
        status=1
    fi
done
exit $status
