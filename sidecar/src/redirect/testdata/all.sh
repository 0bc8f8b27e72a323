#!/bin/sh
# Outrigger: brings this network namespace's TCP connections to the sidecar, by iptables and ip6tables.
#   sh FILE          puts the rules in force; twice is as once
#   sh FILE remove   takes exactly them away
# All rules are in chains of their own, into which one jump each leads: OUTRIGGER_OUTBOUND and OUTRIGGER_INBOUND in the table
# nat, and what drops connections that got past them, OUTRIGGER_BYPASS_IN in mangle (where others' ACCEPT does not come
# first) and OUTRIGGER_BYPASS_OUT in filter. With --keep-source-address there are OUTRIGGER_SOURCE in raw and
# OUTRIGGER_SOURCE_BACK in mangle besides.
#   iptables -t mangle -nvL OUTRIGGER_BYPASS_IN; iptables -nvL OUTRIGGER_BYPASS_OUT     how many were dropped
set -eu

# The jump into a chain of ours, unless it is there.
jump() {
    "$1" -w 30 -t "$2" -C "$3" -j "$4" 2>/dev/null || echo "-I $3 -j $4"
}

# apply PROGRAM TABLE BUILT-IN OURS [BUILT-IN OURS], rules on stdin. Naming a chain of ours empties it; --noflush leaves
# everybody else's alone. What is there is asked before iptables-restore begins: it may hold a lock from its first line on.
apply() {
    jumps=$(
        jump "$1" "$2" "$3" "$4"
        [ $# = 4 ] || jump "$1" "$2" "$5" "$6"
    )
    {
        printf '%s\n' "*$2" ":$4 - [0:0]"
        [ $# = 4 ] || printf '%s\n' ":$6 - [0:0]"
        cat
        printf '%s\n' "$jumps" COMMIT
    } | "$1-restore" -w 30 --noflush
}

# A jump and the chain to which it leads.
gone() {
    ! "$1" -w 30 -t "$2" -C "$3" -j "$4" 2>/dev/null || echo "-D $3 -j $4"
    ! "$1" -w 30 -t "$2" -n -L "$4" >/dev/null 2>&1 || printf '%s\n' "-F $4" "-X $4"
}

taken() {
    [ -z "$3" ] || printf '%s\n' "*$2" "$3" COMMIT | "$1-restore" -w 30 --noflush
}

# The chains of --keep-source-address, where they are: a table that is only asked may be made by that.
no_source() {
    "$1-save" 2>/dev/null | grep -q '^:OUTRIGGER_SOURCE' || return 0
    taken "$1" mangle "$(gone "$1" mangle OUTPUT OUTRIGGER_SOURCE_BACK)"
    taken "$1" raw "$(gone "$1" raw OUTPUT OUTRIGGER_SOURCE)"
}

# What drops goes before what redirects.
remove() {
    no_source "$1"
    taken "$1" mangle "$(gone "$1" mangle INPUT OUTRIGGER_BYPASS_IN)"
    taken "$1" filter "$(gone "$1" filter OUTPUT OUTRIGGER_BYPASS_OUT)"
    ours=$(
        gone "$1" nat OUTPUT OUTRIGGER_OUTBOUND
        gone "$1" nat PREROUTING OUTRIGGER_INBOUND
    )
    taken "$1" nat "$ours"
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

# The way back of --keep-source-address: what the application answers to a client's address is marked, and led to the sidecar.
way_back() {
    ip route replace local default dev lo table 15006
    ip -4 rule list | grep -q 'fwmark 0x3a9e lookup 15006' || ip rule add fwmark 15006 lookup 15006 priority 15006
    ! grep -qs ' lo$' /proc/net/if_inet6 || {
        ip -6 route replace local ::/0 dev lo table 15006
        ip -6 rule list | grep -q 'fwmark 0x3a9e lookup 15006' || ip -6 rule add fwmark 15006 lookup 15006 priority 15006
    }
}

no_way_back() {
    ip rule del fwmark 15006 lookup 15006 priority 15006 2>/dev/null || :
    ip route del local default dev lo table 15006 2>/dev/null || :
    ip -6 rule del fwmark 15006 lookup 15006 priority 15006 2>/dev/null || :
    ip -6 route del local ::/0 dev lo table 15006 2>/dev/null || :
}

case "${1:-apply}" in
apply) ;;
remove)
    no_routes
    no_way_back
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
no_way_back

no_source iptables
apply iptables nat OUTPUT OUTRIGGER_OUTBOUND PREROUTING OUTRIGGER_INBOUND <<'RULES'
# What is opened here. The first rule that says RETURN leaves a connection alone.
# Connections that were there before these rules go on.
-A OUTRIGGER_OUTBOUND -p tcp ! --syn -j RETURN
# `redirect check` asks here: whether the sidecar answers, and whether these rules are in force.
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15002 -j REDIRECT --to-ports 15001
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15003 -j REDIRECT --to-ports 15004
# It asks the inbound rules, too: what arrives over loopback is not asked in PREROUTING.
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15007 -j OUTRIGGER_INBOUND
-A OUTRIGGER_OUTBOUND -d 127.15.0.1 -p tcp --dport 15008 -j OUTRIGGER_INBOUND
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
# `redirect check` asks here, by way of the outbound chain.
-A OUTRIGGER_INBOUND -d 127.15.0.1 -p tcp --dport 15007 -j REDIRECT --to-ports 15006
-A OUTRIGGER_INBOUND -d 127.15.0.1 -p tcp --dport 15008 -j REDIRECT --to-ports 15004
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
apply iptables mangle INPUT OUTRIGGER_BYPASS_IN <<'RULES'
# What begins a connection to here past the sidecar: dropped and counted.
# `redirect check` asks here.
-A OUTRIGGER_BYPASS_IN -d 127.15.0.1 -p tcp --dport 15009 -j DROP
# What never left this machine.
-A OUTRIGGER_BYPASS_IN -i lo -j RETURN
# What was redirected.
-A OUTRIGGER_BYPASS_IN -p tcp --dport 15006 -j RETURN
# The sidecar's metrics and health.
-A OUTRIGGER_BYPASS_IN -p tcp --dport 15020 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp --dport 15021 -j RETURN
# --exclude-cidrs
-A OUTRIGGER_BYPASS_IN -s 10.0.0.0/8 -j RETURN
-A OUTRIGGER_BYPASS_IN -s 192.0.2.7/32 -j RETURN
# --exclude-inbound-ports
-A OUTRIGGER_BYPASS_IN -p tcp --dport 22 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp --dport 9100 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 22 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 9100 -j RETURN
# A beginning, whatever other flags it has. Packets come here in one piece.
-A OUTRIGGER_BYPASS_IN -p tcp --tcp-flags SYN,ACK SYN -j DROP
RULES
apply iptables filter OUTPUT OUTRIGGER_BYPASS_OUT <<'RULES'
# What begins a connection past the sidecar, though it should have been redirected: dropped and counted.
# `redirect check` asks here.
-A OUTRIGGER_BYPASS_OUT -d 127.15.0.1 -p tcp --dport 15010 -j DROP
-A OUTRIGGER_BYPASS_OUT ! -p tcp -j RETURN
# The sidecar's own.
-A OUTRIGGER_BYPASS_OUT -m owner --uid-owner 4711 -j RETURN
# --exclude-uids
-A OUTRIGGER_BYPASS_OUT -m owner --uid-owner 0 -j RETURN
-A OUTRIGGER_BYPASS_OUT -m owner --uid-owner 104 -j RETURN
# What was redirected, and what stays on this machine.
-A OUTRIGGER_BYPASS_OUT -o lo -j RETURN
-A OUTRIGGER_BYPASS_OUT -d 127.0.0.0/8 -j RETURN
# --exclude-cidrs
-A OUTRIGGER_BYPASS_OUT -d 10.0.0.0/8 -j RETURN
-A OUTRIGGER_BYPASS_OUT -d 192.0.2.7/32 -j RETURN
-A OUTRIGGER_BYPASS_OUT -m conntrack --ctdir ORIGINAL --ctorigdst 10.0.0.0/8 -j RETURN
-A OUTRIGGER_BYPASS_OUT -m conntrack --ctdir ORIGINAL --ctorigdst 192.0.2.7/32 -j RETURN
# --exclude-outbound-ports
-A OUTRIGGER_BYPASS_OUT -p tcp --dport 3306 -j RETURN
-A OUTRIGGER_BYPASS_OUT -p tcp --dport 5432 -j RETURN
-A OUTRIGGER_BYPASS_OUT -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 3306 -j RETURN
-A OUTRIGGER_BYPASS_OUT -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 5432 -j RETURN
# A beginning, whatever other flags it has.
-A OUTRIGGER_BYPASS_OUT -p tcp --tcp-flags SYN,ACK SYN -j DROP
# Pieces that could hide one: the kernel's own TCP is never in pieces here, a raw socket's may be.
-A OUTRIGGER_BYPASS_OUT -p tcp -f -j DROP
RULES

has_v6 || exit 0
no_source ip6tables
apply ip6tables nat OUTPUT OUTRIGGER_OUTBOUND PREROUTING OUTRIGGER_INBOUND <<'RULES'
# What is opened here. The first rule that says RETURN leaves a connection alone.
# Connections that were there before these rules go on.
-A OUTRIGGER_OUTBOUND -p tcp ! --syn -j RETURN
# `redirect check` asks here: whether the sidecar answers, and whether these rules are in force.
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15002 -j REDIRECT --to-ports 15001
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15003 -j REDIRECT --to-ports 15004
# It asks the inbound rules, too: what arrives over loopback is not asked in PREROUTING.
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15007 -j OUTRIGGER_INBOUND
-A OUTRIGGER_OUTBOUND -d ::1 -p tcp --dport 15008 -j OUTRIGGER_INBOUND
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
# `redirect check` asks here, by way of the outbound chain.
-A OUTRIGGER_INBOUND -d ::1 -p tcp --dport 15007 -j REDIRECT --to-ports 15006
-A OUTRIGGER_INBOUND -d ::1 -p tcp --dport 15008 -j REDIRECT --to-ports 15004
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
apply ip6tables mangle INPUT OUTRIGGER_BYPASS_IN <<'RULES'
# What begins a connection to here past the sidecar: dropped and counted.
# `redirect check` asks here.
-A OUTRIGGER_BYPASS_IN -d ::1 -p tcp --dport 15009 -j DROP
# What never left this machine.
-A OUTRIGGER_BYPASS_IN -i lo -j RETURN
# What was redirected.
-A OUTRIGGER_BYPASS_IN -p tcp --dport 15006 -j RETURN
# The sidecar's metrics and health.
-A OUTRIGGER_BYPASS_IN -p tcp --dport 15020 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp --dport 15021 -j RETURN
# --exclude-cidrs
-A OUTRIGGER_BYPASS_IN -s 2001:db8::7/128 -j RETURN
-A OUTRIGGER_BYPASS_IN -s fd00::/8 -j RETURN
# --exclude-inbound-ports
-A OUTRIGGER_BYPASS_IN -p tcp --dport 22 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp --dport 9100 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 22 -j RETURN
-A OUTRIGGER_BYPASS_IN -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 9100 -j RETURN
# A beginning, whatever other flags it has. Packets come here in one piece.
-A OUTRIGGER_BYPASS_IN -p tcp --tcp-flags SYN,ACK SYN -j DROP
RULES
apply ip6tables filter OUTPUT OUTRIGGER_BYPASS_OUT <<'RULES'
# What begins a connection past the sidecar, though it should have been redirected: dropped and counted.
# `redirect check` asks here.
-A OUTRIGGER_BYPASS_OUT -d ::1 -p tcp --dport 15010 -j DROP
-A OUTRIGGER_BYPASS_OUT ! -p tcp -j RETURN
# The sidecar's own.
-A OUTRIGGER_BYPASS_OUT -m owner --uid-owner 4711 -j RETURN
# --exclude-uids
-A OUTRIGGER_BYPASS_OUT -m owner --uid-owner 0 -j RETURN
-A OUTRIGGER_BYPASS_OUT -m owner --uid-owner 104 -j RETURN
# What was redirected, and what stays on this machine.
-A OUTRIGGER_BYPASS_OUT -o lo -j RETURN
-A OUTRIGGER_BYPASS_OUT -d ::1 -j RETURN
# --exclude-cidrs
-A OUTRIGGER_BYPASS_OUT -d 2001:db8::7/128 -j RETURN
-A OUTRIGGER_BYPASS_OUT -d fd00::/8 -j RETURN
-A OUTRIGGER_BYPASS_OUT -m conntrack --ctdir ORIGINAL --ctorigdst 2001:db8::7/128 -j RETURN
-A OUTRIGGER_BYPASS_OUT -m conntrack --ctdir ORIGINAL --ctorigdst fd00::/8 -j RETURN
# --exclude-outbound-ports
-A OUTRIGGER_BYPASS_OUT -p tcp --dport 3306 -j RETURN
-A OUTRIGGER_BYPASS_OUT -p tcp --dport 5432 -j RETURN
-A OUTRIGGER_BYPASS_OUT -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 3306 -j RETURN
-A OUTRIGGER_BYPASS_OUT -p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport 5432 -j RETURN
# A beginning, whatever other flags it has.
-A OUTRIGGER_BYPASS_OUT -p tcp --tcp-flags SYN,ACK SYN -j DROP
RULES
