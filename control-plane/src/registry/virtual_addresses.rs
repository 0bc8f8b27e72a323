//! Which service has which virtual address. Pure: `app` keeps it in the state directory, and gives an address out only
//! after it is there. A service that is gone keeps its number for a day, so that nobody who remembers the address
//! reaches another service by it; when the service comes back meanwhile it has its old one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outrigger_api::name::ServiceName;
use outrigger_api::resource::Resources;
use outrigger_api::virtual_address::{self, LAST_NUMBER};
use serde::{Deserialize, Serialize};

/// How long a number is nobody else's after its service went.
pub const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The numbers that are taken, by service. Serialises as a list of [`Taken`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtualAddresses {
    taken: BTreeMap<ServiceName, Taken>,
    /// Services that got none because all numbers are taken.
    without: Vec<ServiceName>,
}

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Taken {
    service: String,
    namespace: String,
    number: u16,
    /// Unix seconds since when the service is gone.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    gone: Option<u64>,
}

/// Why a file is not one.
#[derive(Debug, thiserror::Error)]
pub enum Damaged {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("{0} is not the name of a service")]
    Name(String),
    #[error("the number {0} is not one, or is there twice")]
    Number(u16),
    #[error("{0} is there twice")]
    Twice(ServiceName),
}

impl VirtualAddresses {
    pub fn parse(bytes: &[u8]) -> Result<VirtualAddresses, Damaged> {
        let mut parsed = VirtualAddresses::default();
        let mut numbers = BTreeSet::new();
        for taken in serde_json::from_slice::<Vec<Taken>>(bytes)? {
            let name = ServiceName::new(&taken.service, &taken.namespace)
                .map_err(|_| Damaged::Name(format!("{:?} in {:?}", taken.service, taken.namespace)))?;
            if virtual_address::addresses(taken.number).is_none() || !numbers.insert(taken.number) {
                return Err(Damaged::Number(taken.number));
            }
            if parsed.taken.insert(name.clone(), taken).is_some() {
                return Err(Damaged::Twice(name));
            }
        }
        Ok(parsed)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let lines: Vec<&Taken> = self.taken.values().collect();
        serde_json::to_vec_pretty(&lines).unwrap_or_default()
    }

    /// What holds after a change of configuration.
    pub fn settled(&self, resources: &Resources, now: SystemTime) -> VirtualAddresses {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let wanted: BTreeSet<ServiceName> = resources
            .services
            .values()
            .filter(|service| service.spec.cluster_ips.is_empty() && !service.spec.headless)
            .filter_map(|service| ServiceName::new(&service.metadata.name, &service.metadata.namespace).ok())
            .collect();
        let mut next = VirtualAddresses { taken: self.taken.clone(), without: Vec::new() };
        next.taken.retain(|name, taken| {
            taken.gone = (!wanted.contains(name)).then(|| taken.gone.unwrap_or(now));
            // A clock that was set back keeps a number for longer, never for less.
            taken.gone.is_none_or(|gone| now.saturating_sub(gone) < KEPT.as_secs())
        });
        let mut numbers: BTreeSet<u16> = next.taken.values().map(|taken| taken.number).collect();
        let mut free = 1..=LAST_NUMBER;
        for name in wanted {
            if next.taken.contains_key(&name) {
                continue;
            }
            let Some(number) = free.find(|number| !numbers.contains(number)) else {
                next.without.push(name);
                continue;
            };
            numbers.insert(number);
            let (service, namespace) = (name.name.to_string(), name.namespace.to_string());
            next.taken.insert(name, Taken { service, namespace, number, gone: None });
        }
        next
    }

    /// The addresses of a service, IPv4 first.
    pub fn of(&self, name: &ServiceName) -> Option<[IpAddr; 2]> {
        let taken = self.taken.get(name).filter(|taken| taken.gone.is_none())?;
        virtual_address::addresses(taken.number)
    }

    /// Services that wanted an address when none was free.
    pub fn without(&self) -> &[ServiceName] {
        &self.without
    }

    /// Whether the file has to be written.
    pub fn same_on_disk(&self, other: &VirtualAddresses) -> bool {
        self.taken == other.taken
    }
}

#[cfg(test)]
mod tests {
    use outrigger_api::resource::{Metadata, Resource, Service};

    use super::*;

    fn resources(names: &[&str]) -> Resources {
        let mut resources = Resources::default();
        for name in names {
            let metadata = Metadata { name: (*name).into(), namespace: "shop".into(), ..Metadata::default() };
            let key = ("shop".to_owned(), (*name).to_owned());
            resources.services.insert(key, Resource { metadata, spec: Service::default() });
        }
        resources
    }

    fn at(hours: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + hours * 3_600)
    }

    fn of(addresses: &VirtualAddresses, name: &str) -> Option<String> {
        addresses.of(&ServiceName::new(name, "shop").unwrap()).map(|ips| ips[0].to_string())
    }

    fn address(last: u8) -> Option<String> {
        Some(format!("240.240.0.{last}"))
    }

    #[test]
    fn services_without_a_cluster_ip_have_one_each_and_keep_it() {
        let mut some = resources(&["a", "b", "c", "d"]);
        let service = |name: &str| ("shop".to_owned(), name.to_owned());
        some.services.get_mut(&service("b")).unwrap().spec.cluster_ips.push([10, 0, 0, 1].into());
        some.services.get_mut(&service("c")).unwrap().spec.headless = true;
        let addresses = VirtualAddresses::default().settled(&some, at(0));
        assert_eq!([of(&addresses, "a"), of(&addresses, "d")], [address(1), address(2)]);
        assert_eq!([of(&addresses, "b"), of(&addresses, "c")], [None, None]);
        let more = addresses.settled(&resources(&["0", "a", "d"]), at(1));
        assert_eq!([of(&more, "0"), of(&more, "a"), of(&more, "d")], [address(3), address(1), address(2)]);
        assert_eq!(VirtualAddresses::parse(&more.to_bytes()).unwrap(), more);
    }

    #[test]
    fn a_number_is_nobody_elses_for_a_day_and_its_services_again_when_it_comes_back() {
        let first = VirtualAddresses::default().settled(&resources(&["a"]), at(0));
        let gone = first.settled(&resources(&[]), at(1));
        assert_eq!(of(&gone, "a"), None);
        // Over a restart, and whatever happens meanwhile.
        let gone = VirtualAddresses::parse(&gone.to_bytes()).unwrap().settled(&resources(&["b"]), at(20));
        assert_eq!(of(&gone, "b"), address(2));
        let back = gone.settled(&resources(&["a", "b"]), at(24));
        assert_eq!([of(&back, "a"), of(&back, "b")], [address(1), address(2)]);
        let later = gone.settled(&resources(&["b", "c"]), at(25));
        assert_eq!([of(&later, "b"), of(&later, "c")], [address(2), address(1)]);
        let set_back = gone.settled(&resources(&["b", "c"]), UNIX_EPOCH);
        assert_eq!(of(&set_back, "c"), address(3));
    }

    #[test]
    fn when_all_are_taken_the_rest_has_none_and_nobody_loses_his() {
        let names: Vec<String> = (0..=u32::from(LAST_NUMBER)).map(|number| format!("s{number:05}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let first = VirtualAddresses::default().settled(&resources(&names[1..]), at(0));
        assert!(first.without().is_empty());
        let full = first.settled(&resources(&names), at(1));
        assert_eq!(full.without(), [ServiceName::new("s00000", "shop").unwrap()]);
        assert!(full.same_on_disk(&first));
    }

    #[test]
    fn a_damaged_file_is_told() {
        let line =
            |service: &str, number: u32| format!(r#"{{"service":"{service}","namespace":"shop","number":{number}}}"#);
        for lines in [
            vec![line("a", 0)],
            vec![line("a", 70_000)],
            vec![line("a", 1), line("b", 1)],
            vec![line("A b", 1)],
            vec![line("a", 1), line("a", 2)],
            vec!["{}".to_owned()],
        ] {
            VirtualAddresses::parse(format!("[{}]", lines.join(",")).as_bytes()).unwrap_err();
        }
        VirtualAddresses::parse(b"").unwrap_err();
    }
}
