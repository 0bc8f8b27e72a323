//! Every number that bounds what a peer can make a sidecar do, in one place; all listeners and connectors take theirs
//! from here. Nobody sets them on a command line: tests alone build other values, to make waiting short.

use std::time::Duration;

/// The limits in force. `Limits::default()` is what runs; sizes are bytes unless a field says otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    // --- HTTP heads and framing -------------------------------------------------------------------------------
    /// One HTTP/1 request or response head. As large as the largest head that common servers send, and no larger: it
    /// is held whole in memory (431 beyond).
    pub head_bytes: usize,
    /// Fields in one head or in one trailer section (431 beyond).
    pub header_count: usize,
    /// The request target (414 beyond).
    pub target_bytes: usize,
    /// Trailer fields of one message, summed over its sections, so that endless trailers end.
    pub trailer_bytes: usize,
    /// Chunk extensions of one message, summed: they carry nothing and could go on for ever.
    pub chunk_extension_bytes: usize,
    /// From the first byte of a head to its end (408 beyond): what ends a slowloris.
    pub head_timeout: Duration,
    /// Until the first byte of the first request on a port that is declared HTTP, and at the forward proxy: a connection
    /// that never asked anything is kept for less than one that did. It is closed without a word.
    pub first_byte_timeout: Duration,
    /// How long a stream may be silent, with nothing to be sent in either direction: a watch, a long poll, a bidirectional
    /// gRPC stream.
    pub stream_idle: Duration,
    /// How long bytes of a stream may wait for a reader that takes none, when that is shorter.
    pub stream_stalled: Duration,

    /// What of a request's body is kept until its answer begins, so that a request that nobody has processed, because the
    /// upstream refuses its stream or a sidecar cannot reach its application, is sent again.
    pub replay: usize,
    /// What all requests that came over HTTP/1 may keep together, per worker. Of those over HTTP/2 it is the budget of memory.
    pub replays_http1: usize,

    // --- HTTP/2 -----------------------------------------------------------------------------------------------
    /// Decoded header list, advertised as SETTINGS_MAX_HEADER_LIST_SIZE; h2 alone would take 16 MiB.
    pub h2_header_list: u32,
    /// The header list up to which the sidecar says itself that one is too large, in the metrics and in gRPC's words. What is
    /// larger still the library answers with 431, and four times that with the end of the connection.
    pub h2_header_list_taken: u32,
    /// Concurrent streams that an application's connection may open: more than a client library with one connection per
    /// channel ever has in practice, because such a library waits without a word for a stream to end. What the streams
    /// hold is bounded by the connection's window and by the process's memory budget. h2 alone has no limit.
    pub h2_streams_application: u32,
    /// Concurrent streams on a connection between two sidecars, which serves all clients of one worker.
    pub h2_streams_mesh: u32,
    /// A new connection is opened to an endpoint when the streams of the open ones reach this share (percent) of the
    /// peer's limit: waiting for a free stream costs more than a handshake.
    pub h2_streams_used_percent: u32,
    /// Flow-control window of one stream at first. It grows with bandwidth x round trip (`connect/http2/windows.rs`) ...
    pub h2_stream_window: u32,
    /// ... up to here, and is small again while the process's memory budget is nearly used up.
    pub h2_stream_window_most: u32,
    /// Flow-control window of one connection of an application at first. See [`Limits::h2_shared_window`] for the others.
    pub h2_connection_window: u32,
    pub h2_connection_window_most: u32,
    /// What small DATA frames may cost a connection before they have gone on, in bytes that each is short of 256: more than
    /// a stream's first window of single bytes, since gRPC sends each message in a frame of its own, and an application
    /// may pause. What they really cost is counted into the memory budget.
    pub h2_data_frames: usize,
    /// What is buffered for sending on one stream: one window.
    pub h2_send_buffer: usize,
    /// Streams that the peer reset and that we have not yet forgotten; beyond is GOAWAY (rapid reset, CVE-2023-44487).
    pub h2_pending_resets: usize,
    /// Streams that the peer made us reset; beyond is GOAWAY (MadeYouReset, CVE-2025-8671).
    pub h2_local_resets: usize,
    /// The same on a connection between two sidecars, which nobody's stream may end for the others.
    pub h2_local_resets_mesh: usize,
    /// How long a stream that we have reset is remembered, so that frames of it which were under way are not counted as
    /// the peer's mistakes; as many as may be open.
    pub h2_reset_memory: Duration,
    /// Streams less than a second old that an application may reset at once; an eighth of it comes back each second, and
    /// half a reset with each request. Beyond is GOAWAY (rapid reset).
    pub h2_early_resets: u32,
    /// How long other requests wait for a new upstream connection's SETTINGS before another one is opened.
    pub h2_settings_wait: Duration,
    /// Control frames (PING, SETTINGS, window updates ...) that a connection may send at once beyond what its requests
    /// and bytes account for, and again each second; beyond is GOAWAY. One answer at most waits to be written: h2 reads
    /// no further before it is.
    pub h2_control_frames: usize,

    // --- Accepting --------------------------------------------------------------------------------------------
    /// Accept to the end of the TLS handshake, and dialling likewise.
    pub handshake_timeout: Duration,
    /// Downstream connections open at once in the process; more are refused. See [`Limits::with_open_files`].
    pub connections: usize,
    /// File descriptors left for everything but downstream connections.
    pub spare_files: u64,
    /// Pause after an accept that failed for want of descriptors or memory, so that the failure is not spun on.
    pub accept_pause: Duration,

    // --- Detection --------------------------------------------------------------------------------------------
    /// How long a client of an undeclared port may be silent before the upstream is opened all the same, because it
    /// may be one where the server speaks first.
    pub detect_wait: Duration,
    /// How long first bytes that stop short of telling what they are, a word without an end, are waited for.
    pub detect_short: Duration,
    /// Connections of which nothing is known yet when `detect_wait` is over, per worker. The one that has been so for
    /// longest makes room for the next.
    pub detections_in_flight: usize,
    /// Upstream connections opened on suspicion, per worker (and one per destination).
    pub speculative_connects: usize,
    /// After so much silence of both sides an upstream that was opened on suspicion is given up when another
    /// destination wants its place.
    pub speculation_settles: Duration,
    /// After so much silence on the first upstream of a destination the other silent clients of a pool may open theirs.
    pub speculation_widens: Duration,
    /// How many may, of one destination; with more clients than that nobody may.
    pub speculative_beside: usize,
    /// How many may, per worker.
    pub speculative_beside_all: usize,
    /// How long it is remembered who speaks first on a service's port.
    pub detect_memory: Duration,

    // --- Connecting -------------------------------------------------------------------------------------------
    /// How long an endpoint is dialled alone; then another one is beside it. The kernel sends a lost first packet again
    /// after as long.
    pub connect_beside: Duration,
    /// Endpoints that one request or connection dials.
    pub connect_tries: u32,
    /// How long an address of a name of the outside is dialled alone (RFC 8305 section 5) ...
    pub name_beside: Duration,
    /// ... and how many of its addresses are dialled at most.
    pub name_addresses: usize,
    /// All tries together, and one alone when there is no other.
    pub connect_budget: Duration,
    /// Connecting to the own application, whose listen queue may be full.
    pub application_connect: Duration,
    /// How long the control plane's first answer about a destination is waited for.
    pub first_answer: Duration,
    /// Handshakes with upstreams in flight, per worker: a burst after a restart must not starve what runs.
    pub handshakes_in_flight: usize,

    // --- Idle connections -------------------------------------------------------------------------------------
    /// Keep-alive connection of an application that asks nothing more.
    pub client_idle: Duration,
    /// Pooled connection to another sidecar.
    pub mesh_pool_idle: Duration,
    /// Pooled connection to the application at first, and the margin later: it is given up this long before the
    /// application was seen to close idle ones.
    pub application_pool_idle: Duration,
    /// Idle connections kept per endpoint and worker, last in, first out.
    pub pool_idle_per_endpoint: usize,
    /// Opaque connection on which neither side sends.
    pub tunnel_idle: Duration,

    // --- Sockets ----------------------------------------------------------------------------------------------
    /// TCP keep-alive: idle time before the first probe ...
    pub keepalive: Duration,
    /// ... the pause between probes ...
    pub keepalive_interval: Duration,
    /// ... and probes without an answer that end a connection: a pulled cable is noticed in two minutes.
    pub keepalive_probes: u32,
    /// Bytes wait, and the peer has acknowledged nothing at all for this long: it is not there. A peer that acknowledges
    /// is, whatever its window.
    pub no_ack_timeout: Duration,
    /// Read-ahead of an opaque connection, each direction.
    pub copy_buffer: usize,

    // --- Names ------------------------------------------------------------------------------------------------
    /// Questions that wait for the control plane or an upstream; the next one is answered that it failed.
    pub dns_in_flight: usize,
    /// Clients that ask by TCP; the next one is closed.
    pub dns_tcp_clients: usize,
    /// The longest that a TCP client may take to ask or to take its answer.
    pub dns_tcp_idle: Duration,
    /// How long one upstream is waited for ...
    pub dns_server_timeout: Duration,
    /// ... and all of them together.
    pub dns_budget: Duration,
    /// How long the control plane is waited for when a name is asked for the first time.
    pub dns_first_answer: Duration,

    // --- Key sets ---------------------------------------------------------------------------------------------
    /// The largest answer of a key set's server.
    pub key_set_bytes: usize,
    /// The longest that one fetch may take; a policy may ask for less.
    pub key_set_fetch: Duration,
    /// Between a fetch and the next.
    pub key_set_refresh: Duration,
    /// After a failed fetch, and at least between two that tokens ask for.
    pub key_set_again: Duration,
    /// How long the last good key set counts.
    pub key_set_lifetime: Duration,

    // --- Process ----------------------------------------------------------------------------------------------
    /// Share of the memory limit (percent) at which new connections are refused ...
    pub memory_refuse_percent: u32,
    /// ... and under which they are accepted again. What open connections hold is bounded by their own limits.
    pub memory_accept_percent: u32,
    /// What all buffers may hold together, bytes; None: a share of the limit of memory (`outrigger_runtime::memory::Budget`).
    pub memory_buffers: Option<u64>,
    /// SIGTERM to exit, drain delay included.
    pub drain_total: Duration,

    // --- Control plane ----------------------------------------------------------------------------------------
    /// One message from the control plane.
    pub control_plane_message: usize,
    /// Renewal starts at this share (percent) of a leaf's life ...
    pub renew_at_percent: u32,
    /// ... earlier or later by up to this share, so that workloads started together do not renew together.
    pub renew_jitter_percent: u32,
    /// First pause after a renewal that failed; doubles up to the next field.
    pub renew_retry_first: Duration,
    pub renew_retry_longest: Duration,
    /// Bounds of the pause before the control plane is dialled again (full jitter).
    pub reconnect_shortest: Duration,
    pub reconnect_longest: Duration,
}

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            head_bytes: 64 * KIB,
            header_count: 100,
            target_bytes: 16 * KIB,
            trailer_bytes: 16 * KIB,
            chunk_extension_bytes: 16 * KIB,
            head_timeout: Duration::from_secs(10),
            first_byte_timeout: Duration::from_secs(60),
            stream_idle: Duration::from_secs(60 * 60),
            stream_stalled: Duration::from_secs(5 * 60),
            replay: 64 * KIB,
            replays_http1: 4 * MIB,

            h2_header_list: 64 * KIB as u32,
            h2_header_list_taken: 256 * KIB as u32,
            h2_streams_application: 1_000,
            h2_streams_mesh: 1_000,
            h2_streams_used_percent: 80,
            h2_stream_window: 64 * KIB as u32,
            h2_stream_window_most: 4 * MIB as u32,
            h2_connection_window: MIB as u32,
            h2_connection_window_most: 16 * MIB as u32,
            h2_data_frames: 32 * MIB,
            h2_send_buffer: 64 * KIB,
            h2_pending_resets: 20,
            h2_local_resets: 100,
            h2_local_resets_mesh: 1_000,
            h2_reset_memory: Duration::from_secs(10),
            h2_early_resets: 500,
            h2_settings_wait: Duration::from_secs(1),
            h2_control_frames: 1_000,

            handshake_timeout: Duration::from_secs(10),
            connections: 10_000,
            spare_files: 500,
            accept_pause: Duration::from_millis(100),

            detect_wait: Duration::from_millis(50),
            detect_short: Duration::from_millis(250),
            detections_in_flight: 1_024,
            speculative_connects: 16,
            speculation_settles: Duration::from_secs(1),
            speculation_widens: Duration::from_millis(150),
            speculative_beside: 64,
            speculative_beside_all: 256,
            detect_memory: Duration::from_secs(10 * 60),

            connect_beside: Duration::from_secs(1),
            connect_tries: 3,
            name_beside: Duration::from_millis(250),
            name_addresses: 8,
            connect_budget: Duration::from_secs(5),
            application_connect: Duration::from_secs(10),
            first_answer: Duration::from_secs(3),
            handshakes_in_flight: 32,

            client_idle: Duration::from_secs(60 * 60),
            mesh_pool_idle: Duration::from_secs(60),
            application_pool_idle: Duration::from_secs(3),
            pool_idle_per_endpoint: 64,
            tunnel_idle: Duration::from_secs(60 * 60),

            keepalive: Duration::from_secs(60),
            keepalive_interval: Duration::from_secs(20),
            keepalive_probes: 3,
            no_ack_timeout: Duration::from_secs(30),
            copy_buffer: 64 * KIB,

            dns_in_flight: 256,
            dns_tcp_clients: 64,
            dns_tcp_idle: Duration::from_secs(10),
            dns_server_timeout: Duration::from_secs(2),
            dns_budget: Duration::from_secs(5),
            dns_first_answer: Duration::from_millis(500),

            key_set_bytes: outrigger_api::policy::jwt::MOST_KEY_SET_BYTES,
            key_set_fetch: Duration::from_secs(5),
            key_set_refresh: Duration::from_secs(300),
            key_set_again: Duration::from_secs(10),
            key_set_lifetime: Duration::from_secs(24 * 60 * 60),

            memory_refuse_percent: 90,
            memory_accept_percent: 80,
            memory_buffers: None,
            drain_total: Duration::from_secs(30),

            control_plane_message: 16 * MIB,
            renew_at_percent: 50,
            renew_jitter_percent: 10,
            renew_retry_first: Duration::from_secs(1),
            renew_retry_longest: Duration::from_secs(150),
            reconnect_shortest: Duration::from_millis(200),
            reconnect_longest: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// The same limits for a process that may open `open_files` descriptors (`outrigger_runtime::open_files::raise`):
    /// connections are at most what the spare ones leave, at two descriptors each, one for either side. Where there are few,
    /// half of them are spare. At least one connection is always let in.
    pub fn with_open_files(self, open_files: u64) -> Limits {
        let spare = self.spare_files.min(open_files / 2);
        let left = usize::try_from((open_files - spare) / 2).unwrap_or(usize::MAX);
        Limits { connections: self.connections.min(left).max(1), ..self }
    }

    /// Window of a connection that requests of several clients share, while so many bytes are held on it: room for every
    /// stream's first window beyond that, so that streams which nobody reads never stop the others. What is held is bounded by
    /// the process's memory budget.
    pub fn h2_shared_window(&self, streams: u32, held: u32) -> u32 {
        const MOST: u32 = i32::MAX.cast_unsigned();
        let first = self.h2_stream_window.saturating_mul(streams).max(self.h2_connection_window);
        first.saturating_add(held).min(MOST)
    }

    /// Window of an application's own connection, whose streams have such a window: its streams may stop each other.
    pub fn h2_own_window(&self, window: u32) -> u32 {
        window.saturating_mul(4).clamp(self.h2_connection_window, self.h2_connection_window_most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_the_descriptors() {
        for (open_files, connections) in
            [(0, 1), (256, 64), (500, 125), (1_024, 262), (20_500, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(Limits::default().with_open_files(open_files).connections, connections, "{open_files}");
        }
    }

    #[test]
    fn limits_agree_with_each_other() {
        let limits = Limits::default();
        assert!(limits.target_bytes < limits.head_bytes);
        assert!(limits.first_byte_timeout < limits.client_idle);
        assert!(limits.stream_stalled < limits.stream_idle);
        assert!(limits.replay < limits.replays_http1);
        assert!(limits.connect_beside * limits.connect_tries <= limits.connect_budget);
        assert!(limits.name_beside * limits.name_addresses as u32 <= limits.connect_budget);
        assert!(limits.connect_budget < limits.application_connect);
        assert!(limits.h2_stream_window <= limits.h2_connection_window);
        assert!(limits.h2_stream_window_most <= limits.h2_connection_window_most);
        assert_eq!(limits.h2_shared_window(1_000, 1), 64_000 * KIB as u32 + 1);
        assert_eq!(limits.h2_shared_window(1_000, u32::MAX), i32::MAX.cast_unsigned());
        assert_eq!(limits.h2_own_window(limits.h2_stream_window), limits.h2_connection_window);
        assert_eq!(limits.h2_own_window(limits.h2_stream_window_most), limits.h2_connection_window_most);
        assert!(limits.memory_accept_percent < limits.memory_refuse_percent);
        assert!(limits.renew_retry_first < limits.renew_retry_longest);
        assert!(limits.dns_server_timeout < limits.dns_budget);
        assert!(limits.reconnect_shortest < limits.reconnect_longest);
    }
}
