//! Who asks for what: the question as a person puts it, and as it is sent to a sidecar.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::facts::Claims;
use crate::identity::SpiffeId;
use crate::name::ServiceName;

/// Who asks for what.
#[derive(Clone, PartialEq, Debug)]
pub struct Question {
    /// None: a caller without an identity, in plaintext.
    pub from: Option<SpiffeId>,
    pub from_ip: Option<IpAddr>,
    pub to: ServiceName,
    /// The Service's port; None where it has one only.
    pub port: Option<u16>,
    /// None: a connection whose bytes nobody parses.
    pub request: Option<Asked>,
    /// Without a request: the server name that the application's own TLS asks for.
    pub sni: Option<String>,
    /// Those of a token, taken for verified.
    pub claims: Option<Claims>,
    /// A token beside the request's head, to be verified.
    pub token: Option<String>,
    /// Seconds since the Unix epoch, for rules about the time and for tokens.
    pub at: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
}

impl Asked {
    /// Path and query, also of a target in absolute form.
    pub(super) fn path_and_query(&self) -> &str {
        match self.target.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |begin| &rest[begin..]),
            None => &self.target,
        }
    }

    /// The authority: what the header says, else the name that is called.
    pub(super) fn host(&self, question: &Question) -> String {
        let mut hosts = self.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("host"));
        hosts.next().map_or_else(|| question.to.to_string(), |(_, value)| value.clone())
    }

    pub(super) fn is_grpc(&self) -> bool {
        let mut types = self.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-type"));
        types.any(|(_, value)| value.starts_with("application/grpc"))
    }
}

/// A question as it is sent to a sidecar's `/explain`, as JSON.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WrittenQuestion {
    /// A SPIFFE id; absent: plaintext.
    pub from: Option<String>,
    pub from_ip: Option<IpAddr>,
    /// `name.namespace`
    pub to: String,
    pub port: Option<u16>,
    pub request: Option<Asked>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sni: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claims: Option<serde_json::Map<String, serde_json::Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Seconds since the Unix epoch.
    pub at: u64,
}

impl From<&Question> for WrittenQuestion {
    fn from(question: &Question) -> WrittenQuestion {
        WrittenQuestion {
            from: question.from.as_ref().map(ToString::to_string),
            from_ip: question.from_ip,
            to: question.to.to_string(),
            port: question.port,
            request: question.request.clone(),
            sni: question.sni.clone(),
            claims: question.claims.as_ref().map(|claims| claims.values().clone()),
            token: question.token.clone(),
            at: question.at,
        }
    }
}

impl TryFrom<WrittenQuestion> for Question {
    type Error = String;

    fn try_from(written: WrittenQuestion) -> Result<Question, String> {
        let from = written.from.map(|text| SpiffeId::parse(&text).map_err(|error| error.to_string())).transpose()?;
        let to = ServiceName::parse(&written.to, "default").map_err(|error| error.to_string())?;
        let WrittenQuestion { from_ip, port, request, sni, token, at, .. } = written;
        let claims = written.claims.map(Claims::new);
        Ok(Question { from, from_ip, to, port, request, sni, claims, token, at })
    }
}
