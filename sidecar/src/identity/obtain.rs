//! One try to get a certificate: by the current one over mutual TLS; by that one although it has ended, because machines
//! sleep and control planes are away; else by the join token against the roots in the trust bundle's file. Keeps what it
//! got in `--state`.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use super::channel::dial;
use super::request::{IssueError, Proof, Request, check_is_ours};
use super::state::{State, StateError, bundle_from_file};
use super::trouble::{Kind, explain, kind};
use super::{IdentitySettings, Trouble};
use crate::tls::{Bundle, Credential, Material, Tls};

pub(super) struct Obtainer {
    settings: IdentitySettings,
    tls: Tls,
    state: Option<State>,
    /// The key whose answer may have been lost: asked with again, so that the token is not spent twice.
    pending: Option<Request>,
    /// The roots with which the last token was redeemed. When the file holds others now, the operator has changed the
    /// control plane's authority.
    bootstrap: Option<Bundle>,
    /// Generation of the bundle that `--state` has.
    kept_generation: u64,
    /// The files at the last try, to see when they change.
    files: [Option<Fingerprint>; 2],
}

/// Enough to see that a file was written anew.
type Fingerprint = (SystemTime, u64);

impl Obtainer {
    pub(super) fn new(settings: IdentitySettings, tls: Tls) -> Obtainer {
        let state = settings.state.clone().map(State::new);
        if state.is_none() {
            tracing::info!(
                "without --state the certificate does not survive a restart: a new join token is needed then"
            );
        }
        Obtainer { settings, tls, state, pending: None, bootstrap: None, kept_generation: 0, files: [None, None] }
    }

    /// Starts from the certificate of an earlier run. One that has expired still tells the bundle in force.
    pub(super) async fn restore(&mut self) -> Result<(), StateError> {
        let Some(state) = self.state.clone() else { return Ok(()) };
        let trust_domain = self.settings.trust_domain.clone();
        let pending = state.pending_key();
        self.pending = pending.and_then(|pem| Request::from_pem(&pem, self.settings.algorithm()));
        self.bootstrap = state.bootstrap(&trust_domain);
        let loaded = blocking(move || state.load(&trust_domain)).await?;
        let Some(credential) = loaded else { return Ok(()) };
        if let Err(message) = check_is_ours(&credential, &self.settings) {
            tracing::warn!(message, "the certificate kept in --state is not used");
            return Ok(());
        }
        self.kept_generation = credential.bundle().generation();
        if let Err(error) = self.tls.install(credential) {
            tracing::warn!(%error, "the certificate kept in --state is not used");
        }
        Ok(())
    }

    /// Tries once. On success the credential is in force and kept.
    pub(super) async fn obtain(&mut self) -> Result<(), (IssueError, Trouble)> {
        self.files = self.fingerprints();
        let now = self.tls.clock().now();
        let explained = |error: IssueError, settings: &IdentitySettings| {
            let trouble = explain(&error, settings, now);
            (error, trouble)
        };
        let (credential, key_pem) = self.ask(now).await.map_err(|error| explained(error, &self.settings))?;
        let generation = credential.bundle().generation();
        let installed = self.tls.install(credential.clone());
        installed.map_err(|error| explained(IssueError::Answer(error.to_string()), &self.settings))?;
        self.pending = None;
        tracing::info!(
            identity = %credential.identity(), not_after = crate::tls::clock::show(credential.not_after()), generation,
            "new certificate"
        );
        self.keep(credential, key_pem).await;
        Ok(())
    }

    async fn ask(&mut self, now: SystemTime) -> Result<(Credential, String), IssueError> {
        let current = self.tls.current();
        let current = current.as_deref().map(Material::credential);
        let mut refusal = None;
        if let Some(own) = current.filter(|own| own.check_time(now).is_ok()) {
            match self.renew(own).await {
                Err(error) if kind(&error) == Kind::OtherAuthority => refusal = Some(error),
                other => return other,
            }
        }
        // What stopped the renewal is the news, unless the token gets us further.
        let roots = match self.roots(current, now) {
            Ok(roots) => roots,
            Err(error) => return Err(refusal.unwrap_or(error)),
        };
        if let Some(own) = current {
            for root in &roots {
                match self.renew_late(own, root).await {
                    Err(error) if kind(&error) == Kind::Passing => return Err(refusal.unwrap_or(error)),
                    Err(error) => refusal = Some(refusal.unwrap_or(error)),
                    Ok(renewed) => return Ok(renewed),
                }
            }
        }
        for root in roots {
            match self.redeem(&root).await {
                Err(error @ IssueError::Token { .. }) => return Err(refusal.unwrap_or(error)),
                Err(error) if kind(&error) == Kind::OtherAuthority || is_spent(&error) => {
                    refusal = Some(refusal.unwrap_or(error));
                }
                other => return other,
            }
        }
        Err(refusal.unwrap_or_else(|| IssueError::TrustBundle { message: "no trust bundle is in use".to_owned() }))
    }

    /// By certificate, with a key of its own: a key lives no longer than its leaf.
    async fn renew(&mut self, own: &Credential) -> Result<(Credential, String), IssueError> {
        let channel =
            dial(&self.settings.control_plane, self.settings.mark, own.bundle(), Some(own), self.tls.clock()).await?;
        let request = Request::new(self.settings.algorithm())?;
        let credential = request.issue(channel, Proof::Certificate, &self.settings, self.tls.clock()).await?;
        Ok((credential, request.key_pem()))
    }

    /// By a certificate that has ended, or that the control plane takes for ended: nobody is mutually authenticated by it
    /// any more, its key can still show that it is here.
    async fn renew_late(&self, own: &Credential, roots: &Bundle) -> Result<(Credential, String), IssueError> {
        let channel = dial(&self.settings.control_plane, self.settings.mark, roots, None, self.tls.clock()).await?;
        let request = Request::new(self.settings.algorithm())?;
        let credential = request.issue(channel, Proof::Ended(own), &self.settings, self.tls.clock()).await?;
        Ok((credential, request.key_pem()))
    }

    /// By token, with the same key until it is answered.
    async fn redeem(&mut self, roots: &Bundle) -> Result<(Credential, String), IssueError> {
        let token = self.token()?;
        let channel = dial(&self.settings.control_plane, self.settings.mark, roots, None, self.tls.clock()).await?;
        let request = match self.pending.take() {
            Some(request) => request,
            None => Request::new(self.settings.algorithm())?,
        };
        let key_pem = request.key_pem();
        if let Some(state) = self.state.clone() {
            let key_pem = key_pem.clone();
            if let Err(error) = blocking(move || state.save_pending_key(&key_pem)).await {
                tracing::warn!(%error, "--state cannot be written: a restart will need a new join token");
            }
        }
        let answer = request.issue(channel, Proof::Token(token), &self.settings, self.tls.clock()).await;
        match answer {
            Ok(credential) => {
                self.bootstrap = Some(roots.clone());
                Ok((credential, key_pem))
            }
            Err(error) => {
                self.pending = Some(request);
                Err(error)
            }
        }
    }

    /// The roots to believe the control plane by when the token is redeemed, in order of preference: the bundle in
    /// force, then the file. While our certificate is valid the file counts only if it was replaced since by one with
    /// other roots, because a root that was retired may still be in an old file.
    fn roots(&self, current: Option<&Credential>, now: SystemTime) -> Result<Vec<Bundle>, IssueError> {
        let in_force = current.map(|own| own.bundle().clone());
        let file = bundle_from_file(&self.settings.trust_bundle, &self.settings.trust_domain);
        let Some(in_force) = in_force else {
            return Ok(vec![file.map_err(|error| IssueError::TrustBundle { message: error.to_string() })?]);
        };
        let valid = current.is_some_and(|own| own.check_time(now).is_ok());
        let replaced = |file: &Bundle| {
            !file.shares_root(&in_force) && self.bootstrap.as_ref().is_some_and(|then| then.roots() != file.roots())
        };
        let file = file.ok().filter(|file| !valid || replaced(file));
        Ok([in_force.clone()].into_iter().chain(file).collect())
    }

    fn token(&self) -> Result<String, IssueError> {
        let Some(path) = &self.settings.token_file else {
            return Err(IssueError::Token { message: "there is no --token-file to ask with".to_owned() });
        };
        let text = fs::read_to_string(path)
            .map_err(|error| IssueError::Token { message: format!("{}: {error}", path.display()) })?;
        match text.trim() {
            "" => Err(IssueError::Token { message: format!("{} is empty", path.display()) }),
            token => Ok(token.to_owned()),
        }
    }

    /// What cannot be written is told and otherwise does no harm now.
    async fn keep(&mut self, credential: Credential, key_pem: String) {
        let Some(state) = self.state.clone() else { return };
        self.kept_generation = credential.bundle().generation();
        let bootstrap = self.bootstrap.clone();
        let kept = blocking(move || {
            if let Some(bootstrap) = bootstrap {
                state.save_bootstrap(&bootstrap)?;
            }
            state.save(&credential, &key_pem)
        });
        if let Err(error) = kept.await {
            tracing::warn!(%error, "--state cannot be written: a restart will need a new join token");
        }
    }

    /// Keeps a bundle that discovery has put into force. True when the own certificate needs to be replaced because
    /// that bundle does not verify it.
    pub(super) async fn keep_bundle(&mut self, material: Option<&Material>) -> bool {
        let Some(credential) = material.map(Material::credential) else { return false };
        let bundle = credential.bundle().clone();
        if bundle.generation() == self.kept_generation {
            return false;
        }
        self.kept_generation = bundle.generation();
        if let Some(state) = self.state.clone()
            && let Err(error) = blocking(move || state.save_bundle(&bundle)).await
        {
            tracing::warn!(%error, "--state cannot be written: a restart will begin with an older trust bundle");
        }
        !credential.verifies()
    }

    /// Whether the token or the trust bundle was written since the last try.
    pub(super) fn files_changed(&self) -> bool {
        self.files != self.fingerprints()
    }

    fn fingerprints(&self) -> [Option<Fingerprint>; 2] {
        let of = |path: &Path| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        [of(&self.settings.trust_bundle), self.settings.token_file.as_deref().and_then(of)]
    }
}

/// The token was for the certificate that cannot be renewed any more: that one's refusal is the news.
fn is_spent(error: &IssueError) -> bool {
    matches!(error, IssueError::Refused(status) if status.message().starts_with("token_replayed:"))
}

/// Writing to disk waits for the disk: not on the thread that the control plane's streams live on.
async fn blocking<T, F>(work: F) -> Result<T, StateError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, StateError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StateError::Io { path: "--state".into(), error: std::io::Error::other(error) }),
    }
}
