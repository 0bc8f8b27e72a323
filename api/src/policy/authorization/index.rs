//! What makes a decision cheap where many rules are in force: for a caller, a method, a path and a host it tells which rules
//! can match at all, by sets of rules that were made when the policies arrived. Each rule that can is then looked at as
//! ever (`rule`), in the order of the decision, so that an answer never depends on this file. Nothing is allocated here per
//! request.

use std::collections::HashMap;

use super::affix::{Affixes, Bits, End, RULES, intersects, set, union};
use super::form::{Action, Attribute, Authorization, Lists, Policy, Rule, Source, Values};
use crate::facts::{Connection, Request, lower_host};
use crate::path::NormalPath;
use crate::policy::pattern::Pattern;

/// The rules of an [`Authorization`] in the order in which they decide, with what finds them.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) audit: Section,
    pub(super) deny: Section,
    pub(super) allow: Section,
    pub(super) trial: Section,
    pub(super) looks_at_time: bool,
    pub(super) looks_at_sni: bool,
}

/// The rules of policies that are asked one after the other: AUDIT, DENY, ALLOW, ALLOW in Shadow mode.
#[derive(Debug, Default)]
pub(super) struct Section {
    blocks: Vec<Block>,
}

/// At most [`RULES`] rules.
#[derive(Debug, Default)]
struct Block {
    /// Which policy and which of its rules, in the order of the decision.
    rules: Vec<(usize, usize)>,
    callers: Callers,
    methods: Words,
    hosts: Words,
    paths: Affixes,
}

/// Rules by who calls.
#[derive(Debug, Default)]
struct Callers {
    /// Rules that do not say exactly who.
    any: Bits,
    /// By what is behind `spiffe://`.
    principals: HashMap<String, Bits>,
    /// By namespace, then account.
    accounts: HashMap<String, HashMap<String, Bits>>,
    namespaces: HashMap<String, Bits>,
}

/// Rules by one word exactly.
#[derive(Debug, Default)]
struct Words {
    any: Bits,
    exact: HashMap<String, Bits>,
}

impl Index {
    pub(super) fn new(authorization: &Authorization) -> Index {
        let section = |which: &dyn Fn(&Policy) -> bool| {
            let mut section = Section::default();
            for (policy, form) in authorization.policies.iter().enumerate().filter(|(_, form)| which(form)) {
                (0..form.rules.len()).for_each(|rule| section.push((policy, rule), &form.rules[rule]));
            }
            section.blocks.iter_mut().for_each(|block| block.paths.settle());
            section
        };
        Index {
            audit: section(&|policy| policy.action == Action::Audit),
            deny: section(&|policy| policy.action == Action::Deny),
            allow: section(&|policy| policy.action == Action::Allow && !policy.shadow),
            trial: section(&|policy| policy.action == Action::Allow && policy.shadow),
            looks_at_time: authorization.looks_at_time(),
            looks_at_sni: authorization.looks_at_sni(),
        }
    }

    /// Bytes that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        let sections = [&self.audit, &self.deny, &self.allow, &self.trial];
        sections.iter().flat_map(|section| &section.blocks).map(Block::bytes).sum()
    }
}

impl Section {
    fn push(&mut self, place: (usize, usize), rule: &Rule) {
        if self.blocks.last().is_none_or(|block| block.rules.len() >= RULES) {
            self.blocks.push(Block::default());
        }
        if let Some(block) = self.blocks.last_mut() {
            block.push(place, rule);
        }
    }

    /// The rules that can match, in the order of the decision, until `each` answers false. `refusing`: conditions on what
    /// opaque bytes do not have count as holding.
    pub(super) fn candidates(
        &self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        refusing: bool,
        mut each: impl FnMut(usize, usize) -> bool,
    ) {
        if self.blocks.is_empty() {
            return;
        }
        let mut host = [0; 256];
        let host = request.and_then(|request| lower_host(request.host, &mut host));
        for block in &self.blocks {
            let candidates = block.candidates(connection, request, host, refusing);
            for (word, mut bits) in candidates.into_iter().enumerate() {
                while bits != 0 {
                    let number = word * 64 + bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    let Some((policy, rule)) = block.rules.get(number) else { return };
                    if !each(*policy, *rule) {
                        return;
                    }
                }
            }
        }
    }
}

impl Block {
    fn push(&mut self, place: (usize, usize), rule: &Rule) {
        let number = self.rules.len();
        self.rules.push(place);
        self.callers.push(number, rule);
        let methods = restriction(rule, |to| &to.methods, &Attribute::Method);
        self.methods.push(number, methods.as_deref());
        let hosts = restriction(rule, |to| &to.hosts, &Attribute::Host);
        self.hosts.push(number, hosts.as_deref());
        match restriction(rule, |to| &to.paths, &Attribute::Path) {
            None => self.paths.push(number, End::Beginning, ""),
            Some(paths) => paths.iter().for_each(|path| match path {
                Pattern::Exact(text) => self.paths.push_exact(number, text),
                Pattern::Prefix(text) => self.paths.push(number, End::Beginning, text),
                Pattern::Suffix(text) => self.paths.push(number, End::End, text),
                Pattern::Any => self.paths.push(number, End::Beginning, ""),
                Pattern::Template(template) => self.paths.push(number, End::Beginning, template.beginning()),
            }),
        }
    }

    fn candidates(
        &self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        host: Option<&str>,
        refusing: bool,
    ) -> Bits {
        let mut found = self.callers.of(connection);
        let Some(request) = request else { return found };
        intersects(&mut found, &self.methods.of(request.method));
        // A host that is too long to be one is compared with every rule.
        if let Some(host) = host {
            intersects(&mut found, &self.hosts.of(host));
        }
        intersects(&mut found, &self.of_path(request.path, refusing));
        found
    }

    /// DENY looks at a path without its `;parameters`, too.
    fn of_path(&self, path: &NormalPath<'_>, refusing: bool) -> Bits {
        let mut found = self.paths.of(&path.text);
        if refusing && let Some(bare) = path.without_parameters() {
            union(&mut found, &self.paths.of(&bare));
        }
        found
    }

    fn bytes(&self) -> usize {
        let word = |text: &String| text.capacity() + size_of::<(String, Bits)>() + 8;
        let words = |words: &HashMap<String, Bits>| words.keys().map(word).sum::<usize>();
        self.rules.capacity() * size_of::<(usize, usize)>()
            + words(&self.callers.principals)
            + words(&self.callers.namespaces)
            + self.callers.accounts.iter().map(|(name, accounts)| word(name) + words(accounts)).sum::<usize>()
            + words(&self.methods.exact)
            + words(&self.hosts.exact)
            + self.paths.bytes()
            + size_of::<Block>()
    }
}

impl Callers {
    fn push(&mut self, number: usize, rule: &Rule) {
        let exact = |source: &Source| {
            let principals = exact(&source.principals).is_some();
            principals || !source.service_accounts.any_of.is_empty() || exact(&source.namespaces).is_some()
        };
        if rule.from.is_empty() || !rule.from.iter().all(exact) {
            return set(&mut self.any, number);
        }
        for source in &rule.from {
            if let Some(principals) = self::exact(&source.principals) {
                principals.for_each(|text| set(self.principals.entry(text.to_owned()).or_default(), number));
            } else if !source.service_accounts.any_of.is_empty() {
                for account in &source.service_accounts.any_of {
                    let of_namespace = self.accounts.entry(account.namespace.clone()).or_default();
                    set(of_namespace.entry(account.name.clone()).or_default(), number);
                }
            } else if let Some(namespaces) = self::exact(&source.namespaces) {
                namespaces.for_each(|text| set(self.namespaces.entry(text.to_owned()).or_default(), number));
            }
        }
    }

    fn of(&self, connection: &Connection<'_>) -> Bits {
        let mut found = self.any;
        let Some(identity) = connection.identity else { return found };
        let principal = identity.as_str().strip_prefix("spiffe://").unwrap_or(identity.as_str());
        let account = || self.accounts.get(identity.namespace())?.get(identity.account());
        let sets = [self.principals.get(principal), account(), self.namespaces.get(identity.namespace())]
            .into_iter()
            .flatten();
        sets.for_each(|bits| union(&mut found, bits));
        found
    }
}

impl Words {
    fn push(&mut self, number: usize, patterns: Option<&[&Pattern]>) {
        let exact = |pattern: &&Pattern| matches!(pattern, Pattern::Exact(_));
        match patterns {
            Some(patterns) if patterns.iter().all(exact) => {
                for pattern in patterns {
                    if let Pattern::Exact(text) = pattern {
                        set(self.exact.entry(text.clone()).or_default(), number);
                    }
                }
            }
            Some(_) | None => set(&mut self.any, number),
        }
    }

    fn of(&self, word: &str) -> Bits {
        let mut found = self.any;
        if let Some(bits) = self.exact.get(word) {
            union(&mut found, bits);
        }
        found
    }
}

/// The texts of a list in which each stands for itself; None where it says nothing positive, or has patterns.
fn exact(lists: &Lists<Pattern>) -> Option<impl Iterator<Item = &str>> {
    let text = |pattern: &Pattern| matches!(pattern, Pattern::Exact(_));
    (!lists.any_of.is_empty() && lists.any_of.iter().all(text)).then(|| {
        lists.any_of.iter().filter_map(|pattern| match pattern {
            Pattern::Exact(text) => Some(text.as_str()),
            _ => None,
        })
    })
}

/// The patterns of which one has to match, if the rule has such: in every operation, or in a condition.
fn restriction<'r>(
    rule: &'r Rule,
    field: impl Fn(&'r super::form::Operation) -> &'r Lists<Pattern>,
    key: &Attribute,
) -> Option<Vec<&'r Pattern>> {
    let lists: Vec<&Lists<Pattern>> = rule.to.iter().map(field).collect();
    if !lists.is_empty() && lists.iter().all(|lists| !lists.any_of.is_empty()) {
        return Some(lists.into_iter().flat_map(|lists| &lists.any_of).collect());
    }
    let mut conditions = rule.when.iter().filter(|condition| condition.key == *key);
    conditions.find_map(|condition| match &condition.values {
        Values::Texts(lists) if !lists.any_of.is_empty() => Some(lists.any_of.iter().collect()),
        _ => None,
    })
}
