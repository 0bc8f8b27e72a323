//! Which RequestAuthentications are in force for one workload.

use crate::policy::jwt::{Authentication, Policy};
use crate::resource::{Labels, Resources};

/// Those of its namespace that select it and, as in Istio, those of the root namespace for the whole mesh, in the order of
/// namespace and name. targetRefs are decided per port, by the Service that it belongs to. One without rules asks for
/// nothing, unless it stands in for a broken document.
pub fn authentication(resources: &Resources, namespace: &str, labels: &Labels) -> Authentication {
    let mut policies = Vec::new();
    for policy in resources.request_authentications.values() {
        let (metadata, spec) = (&policy.metadata, &policy.spec);
        if !spec.attachment.selects(metadata, namespace, labels) || spec.rules.is_empty() && !spec.required {
            continue;
        }
        policies.push(Policy {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            services: spec.attachment.service_names(metadata),
            required: spec.required,
            rules: spec.rules.clone(),
        });
    }
    Authentication { policies }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::compile::load;
    use crate::resource::SourceFile;

    #[test]
    fn which_are_in_force() {
        let document = |namespace: &str, name: &str, spec: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: {name}, namespace: \
                 {namespace}}}\nspec: {spec}\n---\n"
            )
        };
        let rules = "jwtRules: [{issuer: a, jwksUri: 'https://a.test/keys'}]";
        let text = document("shop", "all", &format!("{{{rules}}}"))
            + &document("shop", "pay", &format!("{{selector: {{matchLabels: {{app: pay}}}}, {rules}}}"))
            + &document("shop", "other", &format!("{{selector: {{matchLabels: {{app: other}}}}, {rules}}}"))
            + &document("shop", "nothing", "{}")
            + &document("shop", "port", &format!("{{targetRefs: [{{kind: Service, group: '', name: p}}], {rules}}}"))
            + &document("bank", "bank", &format!("{{{rules}}}"))
            + &document("outrigger-system", "mesh", &format!("{{{rules}}}"))
            + &document("outrigger-system", "pays", &format!("{{selector: {{matchLabels: {{app: pay}}}}, {rules}}}"))
            + &document("outrigger-system", "others", &format!("{{selector: {{matchLabels: {{app: x}}}}, {rules}}}"));
        let parsed = load(&[SourceFile { name: "t.yaml".into(), text }]);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        let labels = BTreeMap::from([("app".to_owned(), "pay".to_owned())]);
        let in_force = authentication(&parsed.resources, "shop", &labels);
        let names: Vec<&str> = in_force.policies.iter().map(|policy| policy.name.as_str()).collect();
        assert_eq!(names, ["mesh", "pays", "all", "pay", "port"]);
        assert_eq!(in_force.policies[4].services, ["p.shop"]);
    }
}
