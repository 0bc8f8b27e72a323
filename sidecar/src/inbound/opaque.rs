//! Bytes from others that are not parsed: the application is dialled for each connection, and both ways are copied.

use std::time::Instant;

use outrigger_api::name::Protocol;

use crate::connect::dial::Target;
use crate::connection::State;
use crate::net::Stream;
use crate::outcome::{Error, Reason, Stage};
use crate::policy::{self, Call, Judgement, Permit};
use crate::protocol::opaque::{self, Declared};
use crate::protocol::sni::{self, Sniffed};
use crate::telemetry::{self, TcpRecord, WireProtocol};
use crate::tls::MeshAlpn;

use super::{Refused, Walk, caller};

impl Walk {
    pub(super) async fn opaque(
        &self,
        mut stream: Stream,
        opened: Option<Stream>,
        protocol: WireProtocol,
        permit: Permit,
    ) -> Result<(), Refused> {
        if self.looks_at_sni()
            && let Err(error) = Box::pin(self.read_sni(&mut stream)).await
        {
            return Err(Box::new((error, Some(stream))));
        }
        let upstream = match opened {
            Some(upstream) => Ok(upstream),
            None => Box::pin(self.dial(permit)).await,
        };
        match upstream {
            Ok(upstream) => {
                self.copy(stream, upstream, protocol).await;
                Ok(())
            }
            Err(error) => Err(Box::new((error, Some(stream)))),
        }
    }

    pub(super) async fn server_first(&self, stream: Stream, upstream: Stream) -> Result<(), Refused> {
        self.count_detected(telemetry::Detected::ServerFirst);
        let protocol = if self.declared == Some(Protocol::Tls) { WireProtocol::Tls } else { WireProtocol::Tcp };
        self.copy(stream, upstream, protocol).await;
        Ok(())
    }

    fn looks_at_sni(&self) -> bool {
        self.worker.own_workload().is_some_and(|own| own.authorization.looks_at_sni())
    }

    /// Which name the client's own TLS asks for: known before the application is opened, where a rule looks at it. Bytes
    /// that are no TLS ask for none, and neither does a client that is silent for as long as detection waits.
    async fn read_sni(&self, stream: &mut Stream) -> Result<(), Error> {
        let failed = |error: std::io::Error| Error::downstream(Stage::Detect, Reason::ClientClosed, error.to_string());
        if let Sniffed::Tls(name) = sni::sniff(stream, self.worker.limits.detect_wait).await.map_err(failed)? {
            self.registered.asks_for(name);
        }
        Ok(())
    }

    /// What policy says of opaque bytes of this caller.
    fn judged_opaque(&self) -> Judgement {
        let Some(own) = self.worker.own_workload() else { return Judgement::default() };
        let identity = self.caller.peer.as_ref().map(|peer| &peer.identity);
        let sni = self.registered.asked_for();
        let client = self.registered.client.ip();
        let call = Call { identity, client, application: self.application, sni: sni.as_deref() };
        policy::judge_opaque(&own, &call)
    }

    /// True where the application may be opened before it is known what the client speaks: never where opaque bytes
    /// would be refused, since the client may yet speak HTTP, or prove who it is.
    pub(super) fn may_speculate(&self) -> bool {
        !self.looks_at_sni() && self.judged_opaque().refused.is_none()
    }

    /// Opens the application for bytes that are not parsed.
    pub(super) async fn dial(&self, _permit: Permit) -> Result<Stream, Error> {
        let judgement = self.judged_opaque();
        if let Some(error) = judgement.refused {
            return Err(error);
        }
        let identity = self.caller.peer.as_ref().map(|peer| &peer.identity);
        caller::note_policies(&self.worker.telemetry, &judgement, identity, String::new);
        let target = Target::application(self.application, self.source());
        Box::pin(self.worker.dialer.dial(&target, MeshAlpn::Tcp)).await.map(|dialled| dialled.stream)
    }

    async fn copy(&self, mut stream: Stream, upstream: Stream, protocol: WireProtocol) {
        let _hold = self.worker.drain.hold();
        self.registered.describe(|about| about.protocol = protocol.as_str());
        let edge = self.caller.edge(&self.worker, protocol);
        let record = TcpRecord::begin(&self.worker.telemetry, &edge, Instant::now());
        record.downstream(self.registered.client);
        record.upstream(self.application);
        self.registered.enter(State::Tunnel);
        self.registered.is_opaque();
        if protocol == WireProtocol::Tls {
            match Box::pin(sni::sniff(&mut stream, self.worker.limits.detect_wait)).await {
                Ok(Sniffed::Tls(name)) => {
                    self.registered.describe(|about| about.sni = name.clone());
                    record.sni(name);
                }
                Ok(Sniffed::Other) => {}
                Err(error) => {
                    upstream.reset_on_close();
                    if !opaque::is_close(&error) {
                        record.failed(Reason::ClientClosed, || error.to_string());
                    }
                    return;
                }
            }
        }
        let forth = |count| record.add_received(count);
        let back = |count| record.add_sent(count);
        let declared = if self.declared.is_some() { Declared::Opaque } else { Declared::Nothing };
        let screen = declared.screen(upstream.ahead());
        match opaque::copy(stream, upstream, &self.registered, screen, forth, back).await {
            Ok(()) => {}
            Err(error) => {
                let (reason, detail) = error.tell();
                record.failed(reason, || detail);
            }
        }
    }
}
