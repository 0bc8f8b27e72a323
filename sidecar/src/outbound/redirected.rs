//! Redirected connections: the destination is where the application meant its connection to go. What nobody registered
//! passes through, whoever speaks first.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use outrigger_api::snapshot::Key;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::connect::backend::View;
use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::{OriginalDst, Stream};
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::policy::{self, Permit};
use crate::protocol::opaque::{CopyError, Declared, is_close};
use crate::protocol::peek;
use crate::protocol::sni::{self, Sniffed};
use crate::redirect;
use crate::telemetry::WireProtocol;

use super::opaque::{copy, dial};
use super::refusal::{refuse_connection, turn_away};
use super::walk;

/// Serves one redirected connection, to where the application meant it to go. What nobody registered passes through with
/// its bytes untouched.
pub async fn serve_redirected(worker: Rc<Worker>, stream: TcpStream, registered: Rc<Registered>) {
    let original = match OriginalDst::of(&stream) {
        Ok(original) => original.address(),
        Err(error) => return turn_away(&worker, stream, &registered, &error),
    };
    if redirect::is_probe(original) {
        return answer_probe(&worker, stream, original).await;
    }
    if redirect::is_exempt_target(original) {
        return;
    }
    registered.describe(|about| about.destination = original.to_string());
    let backend = worker.backend(&Key::Address(original));
    let view = backend.view(&worker).await;
    if worker.dialer.has_opened(registered.client, original) {
        let detail = format!(
            "this sidecar's own connection to {original} came back: the redirect rules do not exempt it. Run it as the user \
             of `redirect apply --uid` (1337), or with the same --mark for `run` and `redirect apply`"
        );
        let error = Error::own(Stage::Accept, Reason::OwnPort, detail);
        return turn_away(&worker, stream, &registered, &error);
    }
    match view {
        Ok(view) if view.service.is_none() => {
            pass(&worker, &view, stream.into(), &registered, policy::admit_outbound()).await;
        }
        Ok(_) | Err(_) => walk(&worker, &backend, stream.into(), &registered).await,
    }
}

/// `redirect check` asks whether its connection arrives here, and with the address that it dialled.
async fn answer_probe(worker: &Worker, mut stream: TcpStream, original: SocketAddr) {
    let comes_back = worker.dialer.comes_back(redirect::exempt_target(original)).await;
    let answer = if comes_back { redirect::complaint(original) } else { redirect::answer(original) };
    // Who asks sees an answer that is missing for himself.
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// What nobody registered: to where the application meant it to go, without a look at more than whether it is TLS. Either
/// side may speak first, or end first.
async fn pass(worker: &Rc<Worker>, view: &Rc<View>, mut stream: Stream, registered: &Rc<Registered>, permit: Permit) {
    let mut opened = match dial(worker, view, permit).await {
        Ok(opened) => opened,
        Err(error) => return refuse_connection(worker, Some(view), &stream, &error),
    };
    let spoken = sni::somebody_spoke(&mut stream, &mut opened.dialled.stream, worker.limits.tunnel_idle).await;
    let sniffed = match spoken {
        Ok(()) if stream.ahead().is_empty() => Ok(Sniffed::Other),
        Ok(()) => Box::pin(sni::sniff(&mut stream, worker.limits.detect_wait)).await.map_err(CopyError::Downstream),
        Err(error) => Err(error),
    };
    let protocol = match sniffed {
        Ok(Sniffed::Tls(_)) => WireProtocol::Tls,
        Ok(Sniffed::Other) => WireProtocol::Tcp,
        Err(error) => {
            opened.dialled.stream.reset_on_close();
            let error = match error {
                // It closed before either side had said anything: nothing failed.
                CopyError::Downstream(error) | CopyError::Upstream(error) if is_close(&error) => {
                    stream.reset_on_close();
                    return opened.record(worker, registered, WireProtocol::Tcp).finish(Instant::now());
                }
                CopyError::Downstream(error) => peek::left(&error),
                CopyError::Upstream(error) => {
                    Error::upstream(Stage::Forward, Reason::UpstreamReset, Retry::Never, error.to_string())
                }
                CopyError::Http(found) => Error::downstream(Stage::Detect, Reason::ProtocolMismatch, found),
                CopyError::Closed(reason) => Error::own(Stage::Forward, reason, "closed before anything was said"),
            };
            return refuse_connection(worker, Some(view), &stream, &error);
        }
    };
    copy(worker, stream, opened, registered, protocol, Declared::Opaque).await;
}
