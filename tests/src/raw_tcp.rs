//! TCP segments as an attacker with a raw socket writes them: any flags, an option that makes a listening socket drop them
//! in silence, whole or in pieces. The kernel of the machine that sends them knows nothing of the connection and answers what
//! comes back with a reset, unless a test stops it: [`silence_resets`].

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::eventually::eventually;
use crate::namespace::Namespace;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;

const TCP: u8 = 6;
const FRAGMENT: u8 = 44;

#[derive(Clone, Debug, Default)]
pub struct Segment {
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    /// With a TCP MD5 option (RFC 2385), for which no key is set anywhere.
    pub md5: bool,
    pub payload: Vec<u8>,
}

impl Segment {
    pub fn of(flags: u8) -> Segment {
        Segment { flags, seq: 1_000, ..Segment::default() }
    }
}

/// One 5-tuple, seen from its client.
pub struct RawTcp {
    sending: Socket,
    receiving: Socket,
    from: SocketAddr,
    to: SocketAddr,
}

impl RawTcp {
    pub fn open(at: &Namespace, from: SocketAddr, to: SocketAddr) -> RawTcp {
        let (sending, receiving) = at.enter(|| {
            let domain = Domain::for_address(to);
            let sending = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).unwrap();
            let receiving = Socket::new(domain, Type::RAW, Some(Protocol::TCP)).unwrap();
            (sending, receiving)
        });
        match to {
            SocketAddr::V4(_) => {
                sending.set_header_included_v4(true).unwrap();
                no_defragmentation(&sending);
            }
            SocketAddr::V6(_) => sending.set_header_included_v6(true).unwrap(),
        }
        receiving.set_nonblocking(true).unwrap();
        RawTcp { sending, receiving, from, to }
    }

    pub fn send(&self, segment: &Segment) {
        self.put(self.packet(&self.tcp(segment), TCP, 0));
    }

    /// In the smallest pieces that a kernel takes: of eight bytes in IPv4, so that the flags are in another one than the
    /// ports, and of 1,280 with all headers in IPv6, where there has to be a payload to be cut.
    pub fn send_in_pieces(&self, segment: &Segment) {
        self.send_pieces(segment, |_| true);
    }

    /// Of these pieces those that `which` wants, by their number.
    pub fn send_pieces(&self, segment: &Segment, which: impl Fn(usize) -> bool) {
        let mut segment = segment.clone();
        let mut size = 8;
        if self.to.is_ipv6() {
            size = 1_280 - 40 - 8;
            segment.payload.resize(1_300, b' ');
        }
        let tcp = self.tcp(&segment);
        let pieces: Vec<&[u8]> = tcp.chunks(size).collect();
        for (index, piece) in pieces.iter().enumerate().filter(|(index, _)| which(*index)) {
            let (offset, more) = ((index * size / 8) as u16, index + 1 < pieces.len());
            let packet = match self.to {
                SocketAddr::V4(_) => self.packet(piece, TCP, offset | if more { 0x2000 } else { 0 }),
                SocketAddr::V6(_) => {
                    let field = (offset << 3) | u16::from(more);
                    let mut payload = vec![TCP, 0];
                    payload.extend_from_slice(&field.to_be_bytes());
                    payload.extend_from_slice(&7_777_u32.to_be_bytes());
                    payload.extend_from_slice(piece);
                    self.packet(&payload, FRAGMENT, 0)
                }
            };
            self.put(packet);
        }
    }

    /// What came back on this 5-tuple since the last time.
    pub fn received(&self) -> Vec<Segment> {
        let mut all = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let count = match io::Read::read(&mut &self.receiving, &mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return all,
                Err(error) => panic!("a raw socket: {error}"),
            };
            let mut tcp = &buffer[..count];
            if self.to.is_ipv4() {
                tcp = &tcp[usize::from(tcp[0] & 15) * 4..];
            }
            let u16_at = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
            let u32_at = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
            if (u16_at(0), u16_at(2)) == (self.to.port(), self.from.port()) {
                let head = usize::from(tcp[12] >> 4) * 4;
                let payload = tcp[head..].to_vec();
                all.push(Segment { flags: tcp[13], seq: u32_at(4), ack: u32_at(8), md5: false, payload });
            }
        }
    }

    /// Completes a handshake that was begun with [`SYN`] and sequence number 1,000, and gives what the server says first.
    pub async fn finish(&self) -> String {
        let answer = eventually("a SYN-ACK", async || {
            self.received().into_iter().find(|segment| segment.flags & (SYN | ACK) == SYN | ACK)
        })
        .await;
        let ack = answer.seq.wrapping_add(1);
        let said = eventually("what the server says", async || {
            // Again and again: what the server sends may be repeated before it is seen.
            self.send(&Segment { flags: ACK, seq: 1_001, ack, ..Segment::default() });
            self.received().into_iter().find(|segment| !segment.payload.is_empty())
        })
        .await;
        self.send(&Segment { flags: RST | ACK, seq: 1_001, ack, ..Segment::default() });
        String::from_utf8_lossy(&said.payload).trim_end().to_owned()
    }

    fn tcp(&self, segment: &Segment) -> Vec<u8> {
        let mut options = Vec::new();
        if segment.md5 {
            options.extend_from_slice(&[19, 18]);
            options.extend_from_slice(&[0xAB; 16]);
            options.extend_from_slice(&[1, 1]);
        }
        let mut tcp = Vec::new();
        tcp.extend_from_slice(&self.from.port().to_be_bytes());
        tcp.extend_from_slice(&self.to.port().to_be_bytes());
        tcp.extend_from_slice(&segment.seq.to_be_bytes());
        tcp.extend_from_slice(&segment.ack.to_be_bytes());
        tcp.push((((20 + options.len()) / 4) << 4) as u8);
        tcp.push(segment.flags);
        tcp.extend_from_slice(&64_000_u16.to_be_bytes());
        tcp.extend_from_slice(&[0; 4]);
        tcp.extend_from_slice(&options);
        tcp.extend_from_slice(&segment.payload);
        let mut pseudo = [octets(self.from.ip()), octets(self.to.ip())].concat();
        pseudo.extend_from_slice(&[0, TCP]);
        pseudo.extend_from_slice(&(tcp.len() as u16).to_be_bytes());
        pseudo.extend_from_slice(&tcp);
        let sum = checksum(&pseudo);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }

    /// With its IP header; the kernel adds the checksum of IPv4's.
    fn packet(&self, payload: &[u8], next: u8, fragment: u16) -> Vec<u8> {
        let mut packet = Vec::new();
        match self.to {
            SocketAddr::V4(_) => {
                packet.extend_from_slice(&[0x45, 0]);
                packet.extend_from_slice(&(20 + payload.len() as u16).to_be_bytes());
                packet.extend_from_slice(&7_777_u16.to_be_bytes());
                packet.extend_from_slice(&fragment.to_be_bytes());
                packet.extend_from_slice(&[64, next, 0, 0]);
            }
            SocketAddr::V6(_) => {
                packet.extend_from_slice(&[0x60, 0, 0, 0]);
                packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
                packet.extend_from_slice(&[next, 64]);
            }
        }
        packet.extend_from_slice(&octets(self.from.ip()));
        packet.extend_from_slice(&octets(self.to.ip()));
        packet.extend_from_slice(payload);
        packet
    }

    /// What the sender's own rules drop is an error here, or none, and both are well.
    fn put(&self, packet: Vec<u8>) {
        let to = SockAddr::from(SocketAddr::new(self.to.ip(), 0));
        match self.sending.send_to(&packet, &to) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => panic!("a raw socket: {error}"),
        }
    }
}

/// The kernel of this machine says nothing to what comes for connections that it does not know.
pub fn silence_resets(at: &Namespace) {
    at.run(
        "nft -f - <<'X'\ntable inet silence {\nchain output {\ntype filter hook output priority 10; policy accept;\nmeta mark \
         != 9 tcp flags & rst == rst drop\n}\n}\nX",
    );
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What this socket sends in pieces passes the packet filter in pieces.
#[expect(unsafe_code, reason = "setsockopt(2) with IP_NODEFRAG has no safe form")]
fn no_defragmentation(socket: &Socket) {
    const IP_NODEFRAG: libc::c_int = 22;
    let on: libc::c_int = 1;
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open while `socket` is borrowed, and the kernel reads one int.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, IP_NODEFRAG, (&raw const on).cast(), size) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
