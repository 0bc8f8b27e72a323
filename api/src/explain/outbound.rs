//! What a caller's sidecar knows of a destination: the routes that bind it, and the endpoints.

use std::sync::Arc;

use super::answer::{BackendShare, Explanation, Outcome};
use super::question::Question;
use super::route::{Share, follow};
use crate::name::ServicePort;
use crate::policy::trace::Step;
use crate::snapshot::{Destination, EndpointTls};

impl Explanation {
    /// Whether the called workload takes the request is for its own sidecar to say. `known`: what this sidecar knows of
    /// other destinations, to which routes may lead.
    pub fn outbound(
        question: &Question,
        destination: &Destination,
        known: impl Fn(&ServicePort) -> Option<Arc<Destination>>,
    ) -> Explanation {
        let mut answer = Explanation::begin();
        let front = ServicePort { service: destination.service.clone(), port: destination.port };
        let shares = match &destination.routes {
            None => vec![Share { to: front.clone(), weight: 1, share: 1.0, question: question.clone() }],
            Some(routes) => match follow(routes, &front, question, &mut answer) {
                Some(shares) => shares,
                None => return answer,
            },
        };
        answer.hint = "whether the called workload takes it, its own sidecar says".to_owned();
        for share in shares {
            let other = if share.to == front { None } else { known(&share.to) };
            let there = if share.to == front { Some(destination) } else { other.as_deref() };
            answer.add(question, &share, there);
        }
        answer
    }

    fn add(&mut self, question: &Question, share: &Share, there: Option<&Destination>) {
        let endpoints = there.map_or(&[][..], |there| &there.endpoints);
        let service = share.to.service.to_string();
        let (port, weight, endpoints_known) = (share.to.port, share.weight, endpoints.len());
        self.backends.push(BackendShare { service, port, weight, endpoints: endpoints_known, share: share.share });
        for endpoint in endpoints {
            let how = match &endpoint.tls {
                EndpointTls::Mutual(identity) => format!("mutual TLS, {identity} expected"),
                EndpointTls::Plaintext => "plaintext".to_owned(),
            };
            let name = format!("{}.{}", endpoint.instance, endpoint.namespace);
            self.steps.push(Step::new("balance", name, endpoint.address.to_string(), how));
        }
        let object = format!("Service/{}/{}", share.to.service.namespace, share.to.service.name);
        if there.is_none() {
            let why = "the application has not sent anything there yet: nothing is known of it here".to_owned();
            self.steps.push(Step::new("balance", object, "unknown", why));
        } else if endpoints.is_empty() && share.weight > 0 {
            self.hint = format!("{} has no endpoints", share.to.service);
            self.steps.push(Step::new("balance", object, "failed", "it has no endpoints".to_owned()));
            self.fail(question, Outcome::Failed, "destination_unavailable", 503, 14);
        }
    }
}
