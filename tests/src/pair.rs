//! The mesh of most promises: one application, the sidecar in front of it, and the sidecar of its caller. [`Pair`] is
//! the whole of it; a test whose sidecars differ starts them itself from [`Mesh::far`] and [`Mesh::near`].

use std::net::SocketAddr;

use outrigger_sidecar::config::Limits;

use crate::application::{Application, Backend};
use crate::mesh::{Mesh, MeshOptions};
use crate::sidecar::{Sidecar, SidecarBuilder};

pub struct Pair<App = Application> {
    pub app: App,
    /// `cart-1`, the caller's.
    pub near: Sidecar,
    /// `catalog-1`, in front of the application.
    pub far: Sidecar,
    pub mesh: Mesh,
}

/// An application, or the address of one that a test keeps to itself.
pub trait Listens {
    fn address(&self) -> SocketAddr;
}

impl<App: Listens> Pair<App> {
    /// Under STRICT. `protocol` is the Service's `appProtocol`; the sidecar declares none of its own.
    pub async fn start(app: App, protocol: Option<&str>) -> Pair<App> {
        Pair::start_with(MeshOptions::default(), app, protocol, |_| {}).await
    }

    /// With these limits in both sidecars.
    pub async fn start_with(
        options: MeshOptions,
        app: App,
        protocol: Option<&str>,
        limits: impl Fn(&mut Limits),
    ) -> Pair<App> {
        let mesh = Mesh::start(options).await;
        let far = mesh.far(app.address(), protocol).limits(&limits).start().await;
        let near = mesh.near().limits(&limits).start().await;
        Pair { app, near, far, mesh }
    }
}

impl Mesh {
    /// Writes the Service `catalog.shop:80`, and begins the sidecar `catalog-1` in front of its application.
    pub fn far(&self, app: SocketAddr, protocol: Option<&str>) -> SidecarBuilder<'_> {
        self.service("catalog.shop", 80, app.port(), protocol);
        self.sidecar("catalog-1").label("app", "catalog").inbound(app)
    }

    /// Begins the sidecar `cart-1`, with a listener for `catalog:80`.
    pub fn near(&self) -> SidecarBuilder<'_> {
        self.sidecar("cart-1").outbound("catalog:80")
    }
}

impl Listens for Application {
    fn address(&self) -> SocketAddr {
        Application::address(self)
    }
}

impl Listens for Backend {
    fn address(&self) -> SocketAddr {
        Backend::address(self)
    }
}

impl Listens for SocketAddr {
    fn address(&self) -> SocketAddr {
        *self
    }
}
