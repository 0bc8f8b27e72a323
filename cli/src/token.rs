//! `outrigger token create`: a join token from nothing but the control plane's state directory. The token is a secret:
//! it goes to stdout, alone, and nowhere else.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use outrigger_api::resource::{Labels, duration};
use outrigger_control_plane::ca::Grant;
use outrigger_control_plane::ca::token::{self, Asked, CreateError};
use outrigger_control_plane::config::{State, StateError};
use outrigger_runtime::stdout;

#[derive(clap::Args)]
#[command(after_help = "Example:
  outrigger token create --state ./state --namespace shop --service-account web --label app=web")]
pub(crate) struct Args {
    /// State directory of the control plane (its --state)
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Namespace of the workload
    #[arg(long, value_name = "NAMESPACE")]
    namespace: String,
    /// Service account of the workload; with the namespace it makes its identity
    #[arg(long, value_name = "ACCOUNT")]
    service_account: String,
    /// Label that the workload may register, by which Services select it; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Address, or network in CIDR notation, that the workload may register besides the one from which it connects to the
    /// control plane; may be repeated, and may be a list with commas
    #[arg(long, value_name = "IP|CIDR", value_delimiter = ',', value_parser = address)]
    address: Vec<IpNet>,
    /// How many workloads may join with it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// How long it may be used
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration::parse)]
    ttl: Duration,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

fn address(text: &str) -> Result<IpNet, String> {
    token::parse_address(text).ok_or_else(|| "expected an IP address, or a network such as 10.0.0.0/24".to_owned())
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("--label {key}={value}: {key} has the value {before:?} already")]
    TwoValues { key: String, value: String, before: String },
    #[error(transparent)]
    Create(#[from] CreateError),
}

pub(crate) fn command(args: &Args) -> ExitCode {
    match create(args) {
        Ok(token) => {
            stdout::say(&token);
            ExitCode::SUCCESS
        }
        Err(error) => {
            stdout::complain(&format!("outrigger token create: {error}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn create(args: &Args) -> Result<String, Refusal> {
    let mut labels = Labels::new();
    for (key, value) in &args.label {
        if let Some(before) = labels.insert(key.clone(), value.clone())
            && before != *value
        {
            return Err(Refusal::TwoValues { key: key.clone(), value: value.clone(), before });
        }
    }
    let state = State::of_control_plane(&args.state).map_err(CreateError::State)?;
    let asked = Asked {
        namespace: &args.namespace,
        service_account: &args.service_account,
        grant: Grant { labels, addresses: args.address.clone() },
        uses: args.uses,
        ttl: args.ttl,
    };
    Ok(token::create(&state, &asked, SystemTime::now())?)
}

/// 2 for what the line says, 1 for what the machine does not give.
fn exit_code(refusal: &Refusal) -> u8 {
    match refusal {
        Refusal::Create(CreateError::State(
            StateError::Absent(_) | StateError::Foreign(_) | StateError::Exposed(_),
        )) => 2,
        Refusal::Create(CreateError::State(_) | CreateError::Key(_) | CreateError::Random) => 1,
        Refusal::TwoValues { .. }
        | Refusal::Create(
            CreateError::Namespace(_)
            | CreateError::Reserved
            | CreateError::Account(_)
            | CreateError::Label(_)
            | CreateError::Address(_)
            | CreateError::Uses
            | CreateError::Ttl
            | CreateError::TooLong,
        ) => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(state: &std::path::Path, namespace: &str, label: &[(&str, &str)]) -> Args {
        Args {
            state: state.to_owned(),
            namespace: namespace.to_owned(),
            service_account: "web".to_owned(),
            label: label.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            address: Vec::new(),
            uses: 1,
            ttl: Duration::from_secs(60),
        }
    }

    #[test]
    fn a_token_is_one_word_and_mistakes_are_usage() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("trust-domain"), "outrigger.local\n").unwrap();
        let token = create(&args(directory.path(), "shop", &[("app", "web")])).unwrap();
        assert!(token.starts_with("outrigger1.") && !token.contains(char::is_whitespace), "{token}");
        let two = [("app", "web"), ("app", "cart")];
        for (wrong, says) in [
            (args(directory.path(), "outrigger-system", &[]), "--namespace"),
            (args(directory.path(), "Shop", &[]), "\"Shop\""),
            (args(directory.path(), "shop", &two), "app has the value \"web\" already"),
        ] {
            let refused = create(&wrong).unwrap_err();
            assert!(refused.to_string().contains(says), "{refused}");
            assert_eq!(exit_code(&refused), 2);
        }
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(exit_code(&create(&args(&file, "shop", &[])).unwrap_err()), 2);
    }

    #[test]
    fn a_state_with_a_typo_is_an_error_and_nothing_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let absent = directory.path().join("sate");
        for (path, says) in [(&absent, "there is no directory"), (&directory.path().to_owned(), "not the state of")] {
            let refused = create(&args(path, "shop", &[])).unwrap_err();
            assert!(refused.to_string().contains(says) && refused.to_string().contains("--state"), "{refused}");
            assert_eq!(exit_code(&refused), 2);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
