//! Redirected connections: the application is where the peer meant its connection to go, as far as that is this
//! workload.

use std::net::SocketAddr;
use std::rc::Rc;

use futures_util::future::Either;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::{OriginalDst, Stream};
use crate::outcome::{Error, Reason, Stage};
use crate::redirect;

use super::caller::Caller;

/// Serves one redirected connection: to the application where the peer meant it to go. Not an async fn, which would keep
/// what it was called with for as long as the connection lives.
pub fn serve_redirected(
    worker: Rc<Worker>,
    stream: TcpStream,
    registered: Rc<Registered>,
) -> impl Future<Output = ()> + 'static {
    let original = OriginalDst::of(&stream).map(OriginalDst::address);
    if let Ok(original) = original
        && redirect::is_inbound_probe(original)
    {
        return Either::Right(Either::Left(answer_probe(worker, stream, original)));
    }
    match original.and_then(|original| application(&worker, original)) {
        Ok(application) => Either::Left(super::serve(worker, application, stream.into(), registered)),
        Err(error) => {
            let caller = Caller { peer: None, destination_service: String::new() };
            caller.refused(&worker, &registered, &error);
            Stream::from(stream).reset_on_close();
            Either::Right(Either::Right(std::future::ready(())))
        }
    }
}

/// `redirect check` asks whether its connection arrives here, and with the address that it dialled. Only this machine can
/// dial that address.
async fn answer_probe(worker: Rc<Worker>, mut stream: TcpStream, original: SocketAddr) {
    let way_back = if worker.dialer.keeps_source() {
        Box::pin(redirect::way_back_in(original.ip().to_canonical().is_ipv4())).await
    } else {
        Ok(())
    };
    let answer = way_back.map_or_else(|why| redirect::no_way_back_answer(&why), |()| redirect::answer(original));
    // A check that has gone does not miss its answer.
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// The application that a redirected connection is for. Nothing but this workload's own addresses is reached through its
/// sidecar, and no port of the sidecar itself.
fn application(worker: &Worker, original: SocketAddr) -> Result<SocketAddr, Error> {
    if let Some(application) = worker.own.application_behind(original) {
        return Ok(application);
    }
    let refuse = |reason, detail| Err(Error::downstream(Stage::Accept, reason, detail));
    if worker.dialer.is_own_port(original.port()) {
        return refuse(Reason::OwnPort, format!("{original}: port {} is this sidecar's own", original.port()));
    }
    if !worker.is_reached_at(original.ip()) {
        return refuse(Reason::ForeignAddress, format!("{original} is no address of this network namespace"));
    }
    Ok(original)
}
