//! What policies in Shadow mode would have done, as sidecars report it, for `outrigger policy report`. It is kept per
//! policy for as long as that policy stays as it is and in Shadow mode. A sidecar speaks for its own workload alone, about
//! policies of its namespace or of the whole mesh; what one service account can make this keep is bounded.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use outrigger_api::identity::{ROOT_NAMESPACE, SpiffeId};
use outrigger_api::peer_text::PeerText;
use outrigger_api::policy::authorization::Action;
use outrigger_api::resource::{AuthorizationPolicy, Resources};
use outrigger_api::wire::ShadowNote;

/// Of one report.
const MAX_NOTES: usize = 1_000;
/// Callers and requests that are told apart, of one policy as one service account reports them, and of all; what comes
/// beyond counts under `other`.
const MAX_OF_ACCOUNT: usize = 500;
const MAX_ALL: usize = 50_000;
/// Beyond any sidecar's rate within one report.
const MAX_COUNT: u64 = 1_000_000_000;
const MAX_PRINCIPAL: usize = 1_024;
const OTHER: &str = "other";

#[derive(Default)]
pub struct Shadows(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// The configuration that `watched` follows.
    followed: Option<Arc<Resources>>,
    /// By `KIND/NAMESPACE/NAME`.
    watched: BTreeMap<String, Watched>,
    kept: usize,
}

/// One policy in Shadow mode.
struct Watched {
    policy: AuthorizationPolicy,
    namespace: String,
    since: SystemTime,
    callers: BTreeMap<Caller, Seen>,
    /// Entries of `callers`, by the workload that reported them.
    of_account: HashMap<String, usize>,
}

/// Whose request to which workload, and what would have become of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Caller {
    /// SPIFFE id of the called workload, as its certificate says.
    pub called: String,
    /// SPIFFE id; empty for a caller that proved none; `other` beyond the bounds.
    pub principal: String,
    pub shape: String,
    /// denied, limited
    pub would: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    pub count: u64,
    pub first: SystemTime,
    pub last: SystemTime,
}

/// What is known of one policy.
#[derive(Clone, Debug)]
pub struct Trial {
    pub policy: String,
    pub action: Action,
    /// Since when it has been in Shadow mode as it is, or since this control plane started.
    pub since: SystemTime,
    pub callers: Vec<(Caller, Seen)>,
}

impl Shadows {
    /// Takes what the sidecar of `reporter` said. Every report is given to it, also one without notes: that is how it
    /// learns in time which policies came into Shadow mode.
    pub fn take(&self, resources: &Arc<Resources>, reporter: &SpiffeId, notes: &[ShadowNote], now: SystemTime) {
        let mut inner = self.following(resources, now);
        for note in notes.iter().take(MAX_NOTES) {
            inner.note(reporter, note, now);
        }
    }

    /// Every policy in Shadow mode, by name.
    pub fn trials(&self, resources: &Arc<Resources>, now: SystemTime) -> Vec<Trial> {
        let inner = self.following(resources, now);
        let trial = |(name, watched): (&String, &Watched)| Trial {
            policy: name.clone(),
            action: watched.policy.action,
            since: watched.since,
            callers: watched.callers.iter().map(|(caller, seen)| (caller.clone(), *seen)).collect(),
        };
        inner.watched.iter().map(trial).collect()
    }

    fn following(&self, resources: &Arc<Resources>, now: SystemTime) -> MutexGuard<'_, Inner> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !inner.followed.as_ref().is_some_and(|followed| Arc::ptr_eq(followed, resources)) {
            inner.follow(resources, now);
            inner.followed = Some(resources.clone());
        }
        inner
    }
}

impl Inner {
    fn follow(&mut self, resources: &Resources, now: SystemTime) {
        let mut before = std::mem::take(&mut self.watched);
        for policy in resources.authorization_policies.values().filter(|policy| policy.spec.shadow) {
            let (namespace, name) = (&policy.metadata.namespace, &policy.metadata.name);
            let full_name = format!("AuthorizationPolicy/{namespace}/{name}");
            let known = before.remove(&full_name).filter(|known| known.policy == policy.spec);
            let watched = known.unwrap_or_else(|| Watched {
                policy: policy.spec.clone(),
                namespace: namespace.clone(),
                since: now,
                callers: BTreeMap::new(),
                of_account: HashMap::new(),
            });
            self.watched.insert(full_name, watched);
        }
        self.kept = self.watched.values().map(|watched| watched.callers.len()).sum();
    }

    fn note(&mut self, reporter: &SpiffeId, note: &ShadowNote, now: SystemTime) {
        let Some(watched) = self.watched.get_mut(&note.policy) else { return };
        if watched.namespace != reporter.namespace() && watched.namespace != ROOT_NAMESPACE {
            return;
        }
        let would = match note.would.as_str() {
            "denied" => "denied",
            "limited" => "limited",
            _ => return,
        };
        let principal = if note.principal.is_empty() || note.principal == OTHER {
            note.principal.clone()
        } else {
            let parsed = SpiffeId::parse(&note.principal).ok();
            parsed.filter(|id| id.as_str().len() <= MAX_PRINCIPAL).map_or(OTHER.to_owned(), |id| id.to_string())
        };
        let called = reporter.to_string();
        let mut caller = Caller { called, principal, shape: PeerText(&note.shape).to_string(), would };
        if !watched.callers.contains_key(&caller) {
            let of_account = watched.of_account.entry(caller.called.clone()).or_default();
            if *of_account >= MAX_OF_ACCOUNT || self.kept >= MAX_ALL {
                caller = Caller { principal: OTHER.to_owned(), shape: OTHER.to_owned(), ..caller };
            }
            if !watched.callers.contains_key(&caller) {
                *of_account += 1;
                self.kept += 1;
            }
        }
        let seen = watched.callers.entry(caller).or_insert(Seen { count: 0, first: now, last: now });
        seen.count = seen.count.saturating_add(note.count.min(MAX_COUNT));
        seen.last = now;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use outrigger_api::compile::load;
    use outrigger_api::resource::SourceFile;

    use super::*;

    fn policy(namespace: &str, name: &str, spec: &str) -> String {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: \
             {namespace}}}\nspec: {spec}\n---\n"
        )
    }

    fn resources(documents: &[String]) -> Arc<Resources> {
        let parsed = load(&[SourceFile { name: "t.yaml".into(), text: documents.concat() }]);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        Arc::new(parsed.resources)
    }

    fn id(text: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://outrigger.local/ns/{text}")).unwrap()
    }

    fn note(policy: &str, principal: &str, shape: &str) -> ShadowNote {
        let policy = format!("AuthorizationPolicy/{policy}");
        ShadowNote { policy, would: "denied".into(), principal: principal.into(), shape: shape.into(), count: 2 }
    }

    fn said(shadows: &Shadows, resources: &Arc<Resources>, now: SystemTime) -> Vec<String> {
        let trials = shadows.trials(resources, now);
        let line = |trial: &Trial, caller: &Caller, seen: &Seen| {
            format!("{} {} {} {}", trial.policy, caller.principal, caller.shape, seen.count)
        };
        trials
            .iter()
            .flat_map(|trial| trial.callers.iter().map(move |(caller, seen)| line(trial, caller, seen)))
            .collect()
    }

    #[test]
    fn a_sidecar_speaks_of_policies_that_can_concern_it() {
        let shadow = "{mode: Shadow}";
        let all = resources(&[
            policy("shop", "trial", shadow),
            policy("bank", "trial", shadow),
            policy("outrigger-system", "all", shadow),
            policy("shop", "enforced", "{}"),
        ]);
        let shadows = Shadows::default();
        let now = SystemTime::UNIX_EPOCH;
        let caller = id("shop/sa/web").to_string();
        let mut notes: Vec<ShadowNote> =
            ["shop/trial", "bank/trial", "outrigger-system/all", "shop/enforced", "shop/none"]
                .map(|name| note(name, &caller, "GET /"))
                .into();
        notes.push(ShadowNote { would: "praised".into(), ..note("shop/trial", &caller, "GET /") });
        notes.push(note("shop/trial", "\u{1b}[2J", "GET /\n\u{1b}[2J"));
        shadows.take(&all, &id("shop/sa/pay"), &notes, now);
        assert_eq!(
            said(&shadows, &all, now),
            [
                "AuthorizationPolicy/outrigger-system/all spiffe://outrigger.local/ns/shop/sa/web GET / 2",
                "AuthorizationPolicy/shop/trial other GET /\\n\\u{1b}[2J 2",
                "AuthorizationPolicy/shop/trial spiffe://outrigger.local/ns/shop/sa/web GET / 2",
            ]
        );
    }

    #[test]
    fn another_policy_of_that_name_begins_anew() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let first = resources(&[policy("shop", "trial", "{mode: Shadow}")]);
        let shadows = Shadows::default();
        shadows.take(&first, &id("shop/sa/pay"), &[], at(1));
        shadows.take(&first, &id("shop/sa/pay"), &[note("shop/trial", "", "GET /")], at(2));
        let cases = [
            (
                "the same beside another",
                vec![policy("shop", "trial", "{mode: Shadow}"), policy("shop", "x", "{}")],
                1,
                1,
            ),
            ("other rules", vec![policy("shop", "trial", "{mode: Shadow, rules: [{}]}")], 9, 0),
        ];
        for (what, documents, since, callers) in cases {
            let resources = resources(&documents);
            let trials = shadows.trials(&resources, at(9));
            assert_eq!((trials[0].since, trials[0].callers.len()), (at(since), callers), "{what}");
        }
        let enforced = resources(&[policy("shop", "trial", "{}")]);
        assert!(shadows.trials(&enforced, at(10)).is_empty());
    }

    #[test]
    fn what_an_account_can_make_it_keep_is_bounded() {
        let all = resources(&[policy("shop", "trial", "{mode: Shadow}")]);
        let shadows = Shadows::default();
        let now = SystemTime::UNIX_EPOCH;
        for round in 0..3 {
            let long = "x".repeat(10_000);
            let shape = |n: usize| format!("GET /{round}/{n}/{long}");
            let notes: Vec<ShadowNote> = (0..2 * MAX_NOTES).map(|n| note("shop/trial", "", &shape(n))).collect();
            shadows.take(&all, &id("shop/sa/mallory"), &notes, now);
        }
        let trials = shadows.trials(&all, now);
        assert_eq!(trials[0].callers.len(), MAX_OF_ACCOUNT + 1);
        assert_eq!(trials[0].callers.iter().map(|(_, seen)| seen.count).sum::<u64>(), 3 * 2 * MAX_NOTES as u64);
        assert!(trials[0].callers.iter().all(|(caller, _)| caller.shape.chars().count() <= 201));
        // Another account has its own share.
        shadows.take(&all, &id("shop/sa/pay"), &[note("shop/trial", "", "GET /honest")], now);
        assert!(said(&shadows, &all, now).iter().any(|line| line.contains("/honest")));
    }
}
