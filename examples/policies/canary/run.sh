#!/usr/bin/env bash
# Checks the route, runs its test, and shows the way of one call. Exit code 0 when all is as expected.
set -euo pipefail
cd "$(dirname "$0")"
PATH="${OUTRIGGER_BIN_DIR:+$OUTRIGGER_BIN_DIR:}$PATH"
outrigger validate config
outrigger test config
outrigger explain config --from shop/checkout --to payments.shop GET /v1/charges
