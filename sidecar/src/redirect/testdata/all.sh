#!/bin/sh
# Outrigger: brings this network namespace's TCP connections to the sidecar, by iptables and ip6tables.
#   sh FILE          puts the rules in force; twice is as once
#   sh FILE remove   takes exactly them away
# All rules are in the chains OUTRIGGER_OUTBOUND and OUTRIGGER_INBOUND of the table nat, into which one jump each leads.
set -eu

# The jump into a chain of ours, unless it is there.
jump() {
    "$1" -w 30 -t nat -C "$2" -j "$3" 2>/dev/null || echo "-I $2 -j $3"
}

# Rules come on stdin. Naming a chain of ours empties it; --noflush leaves everybody else's alone. What is there is asked
# before iptables-restore begins: it may hold a lock from its first line on.
apply() {
    jumps=$(
        jump "$1" OUTPUT OUTRIGGER_OUTBOUND
        jump "$1" PREROUTING OUTRIGGER_INBOUND
    )
    {
        printf '%s\n' '*nat' ':OUTRIGGER_OUTBOUND - [0:0]' ':OUTRIGGER_INBOUND - [0:0]'
        cat
        printf '%s\n' "$jumps" COMMIT
    } | "$1-restore" -w 30 --noflush
}

# A jump and the chain to which it leads.
gone() {
    ! "$1" -w 30 -t nat -C "$2" -j "$3" 2>/dev/null || echo "-D $2 -j $3"
    ! "$1" -w 30 -t nat -n -L "$3" >/dev/null 2>&1 || printf '%s\n' "-F $3" "-X $3"
}

remove() {
    ours=$(
        gone "$1" OUTPUT OUTRIGGER_OUTBOUND
        gone "$1" PREROUTING OUTRIGGER_INBOUND
    )
    [ -z "$ours" ] || printf '%s\n' '*nat' "$ours" COMMIT | "$1-restore" -w 30 --noflush
}

# Kernels without IPv6 have nothing to redirect there.
has_v6() {
    [ -e /proc/net/if_inet6 ]
}

# The routes to virtual addresses of services, which stand beside the rules of --dns, and alone do no harm.
routes() {
    ip route replace local 240.240.0.0/16 dev lo src 127.0.0.1 metric 15053
    ! grep -qs ' lo$' /proc/net/if_inet6 || ip -6 route replace local fd3a:94e7:c15b::/64 dev lo metric 15053
}

no_routes() {
    ip route del local 240.240.0.0/16 dev lo metric 15053 2>/dev/null || :
    ip -6 route del local fd3a:94e7:c15b::/64 dev lo metric 15053 2>/dev/null || :
}

case "${1:-apply}" in
apply) ;;
remove)
    no_routes
    remove iptables
    ! has_v6 || remove ip6tables
    exit
    ;;
*)
    echo "usage: sh FILE [apply|remove]" >&2
    exit 2
    ;;
esac

routes

apply iptables <<'RULES'
# What is opened here. The first rule that says RETURN leaves a connection alone.
# Connections that were there before these rules go on.
-A OUTRIGGER_OUTBOUND -p tcp ! --syn -j RETURN
# `redirect check` asks here: whether the sidecar answers, and whether these rules are in force.
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15002 -j REDIRECT --to-ports 15001
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15003 -j REDIRECT --to-ports 15004
# The sidecar's own.
-A OUTRIGGER_OUTBOUND -m owner --uid-owner 4711 -j RETURN
# --exclude-uids
-A OUTRIGGER_OUTBOUND -m owner --uid-owner 0 -j RETURN
-A OUTRIGGER_OUTBOUND -m owner --uid-owner 104 -j RETURN
# The sidecar asks here whether it is known: this is for all others.
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15005 -j REDIRECT --to-ports 15001
# --dns: questions about names, to servers on loopback as well.
-A OUTRIGGER_OUTBOUND -p udp --dport 53 -j REDIRECT --to-ports 15053
-A OUTRIGGER_OUTBOUND -p tcp --dport 53 -j REDIRECT --to-ports 15053
# --dns: virtual addresses of services, which are nobody's on any network.
-A OUTRIGGER_OUTBOUND -d 240.240.0.0/16 -p tcp -j REDIRECT --to-ports 15001
# What stays on this machine: loopback and its own addresses.
-A OUTRIGGER_OUTBOUND -o lo -j RETURN
# --exclude-cidrs
-A OUTRIGGER_OUTBOUND -d 10.0.0.0/8 -j RETURN
-A OUTRIGGER_OUTBOUND -d 192.0.2.7/32 -j RETURN
# --exclude-outbound-ports
-A OUTRIGGER_OUTBOUND -p tcp --dport 3306 -j RETURN
-A OUTRIGGER_OUTBOUND -p tcp --dport 5432 -j RETURN
-A OUTRIGGER_OUTBOUND -p tcp -j REDIRECT --to-ports 15001
# What others open to here.
-A OUTRIGGER_INBOUND -p tcp ! --syn -j RETURN
# What never left this machine, and what it forwards for others.
-A OUTRIGGER_INBOUND -i lo -j RETURN
-A OUTRIGGER_INBOUND -m addrtype ! --dst-type LOCAL -j RETURN
# The sidecar's metrics and health.
-A OUTRIGGER_INBOUND -p tcp --dport 15020 -j RETURN
-A OUTRIGGER_INBOUND -p tcp --dport 15021 -j RETURN
# --exclude-cidrs
-A OUTRIGGER_INBOUND -s 10.0.0.0/8 -j RETURN
-A OUTRIGGER_INBOUND -s 192.0.2.7/32 -j RETURN
# --exclude-inbound-ports
-A OUTRIGGER_INBOUND -p tcp --dport 22 -j RETURN
-A OUTRIGGER_INBOUND -p tcp --dport 9100 -j RETURN
-A OUTRIGGER_INBOUND -p tcp -j REDIRECT --to-ports 15006
RULES

has_v6 || exit 0
apply ip6tables <<'RULES'
# What is opened here. The first rule that says RETURN leaves a connection alone.
# Connections that were there before these rules go on.
-A OUTRIGGER_OUTBOUND -p tcp ! --syn -j RETURN
# `redirect check` asks here: whether the sidecar answers, and whether these rules are in force.
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15002 -j REDIRECT --to-ports 15001
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15003 -j REDIRECT --to-ports 15004
# The sidecar's own.
-A OUTRIGGER_OUTBOUND -m owner --uid-owner 4711 -j RETURN
# --exclude-uids
-A OUTRIGGER_OUTBOUND -m owner --uid-owner 0 -j RETURN
-A OUTRIGGER_OUTBOUND -m owner --uid-owner 104 -j RETURN
# The sidecar asks here whether it is known: this is for all others.
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15005 -j REDIRECT --to-ports 15001
# --dns: questions about names, to servers on loopback as well.
-A OUTRIGGER_OUTBOUND -p udp --dport 53 -j REDIRECT --to-ports 15053
-A OUTRIGGER_OUTBOUND -p tcp --dport 53 -j REDIRECT --to-ports 15053
# --dns: virtual addresses of services, which are nobody's on any network.
-A OUTRIGGER_OUTBOUND -d fd3a:94e7:c15b::/64 -p tcp -j REDIRECT --to-ports 15001
# What stays on this machine: loopback and its own addresses.
-A OUTRIGGER_OUTBOUND -o lo -j RETURN
# --exclude-cidrs
-A OUTRIGGER_OUTBOUND -d 2001:db8::7/128 -j RETURN
-A OUTRIGGER_OUTBOUND -d fd00::/8 -j RETURN
# --exclude-outbound-ports
-A OUTRIGGER_OUTBOUND -p tcp --dport 3306 -j RETURN
-A OUTRIGGER_OUTBOUND -p tcp --dport 5432 -j RETURN
-A OUTRIGGER_OUTBOUND -p tcp -j REDIRECT --to-ports 15001
# What others open to here.
-A OUTRIGGER_INBOUND -p tcp ! --syn -j RETURN
# What never left this machine, and what it forwards for others.
-A OUTRIGGER_INBOUND -i lo -j RETURN
-A OUTRIGGER_INBOUND -m addrtype ! --dst-type LOCAL -j RETURN
# The sidecar's metrics and health.
-A OUTRIGGER_INBOUND -p tcp --dport 15020 -j RETURN
-A OUTRIGGER_INBOUND -p tcp --dport 15021 -j RETURN
# --exclude-cidrs
-A OUTRIGGER_INBOUND -s 2001:db8::7/128 -j RETURN
-A OUTRIGGER_INBOUND -s fd00::/8 -j RETURN
# --exclude-inbound-ports
-A OUTRIGGER_INBOUND -p tcp --dport 22 -j RETURN
-A OUTRIGGER_INBOUND -p tcp --dport 9100 -j RETURN
-A OUTRIGGER_INBOUND -p tcp -j REDIRECT --to-ports 15006
RULES
