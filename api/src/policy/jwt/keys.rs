//! Key sets (RFC 7517): which keys of a JWKS are of use, which algorithms each of them may verify, and the
//! verification itself. What a token says of its algorithm only chooses among those that its key allows.

use aws_lc_rs::signature::{
    self, EcdsaVerificationAlgorithm, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Keys of one set; a token without `kid` tries all of them.
const MOST_KEYS: usize = 64;
/// A JWKS in a document or from a server.
pub const MOST_BYTES: usize = 1 << 20;
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// A signature algorithm of RFC 7518, RFC 8037 and RFC 9864. There is none with a shared secret, and none without a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
}

impl Algorithm {
    /// The names are case-sensitive (RFC 7515 section 4.1.1).
    pub fn parse(name: &str) -> Option<Algorithm> {
        Some(match name {
            "RS256" => Algorithm::Rs256,
            "RS384" => Algorithm::Rs384,
            "RS512" => Algorithm::Rs512,
            "PS256" => Algorithm::Ps256,
            "PS384" => Algorithm::Ps384,
            "PS512" => Algorithm::Ps512,
            "ES256" => Algorithm::Es256,
            "ES384" => Algorithm::Es384,
            "ES512" => Algorithm::Es512,
            "EdDSA" | "Ed25519" => Algorithm::EdDsa,
            _ => return None,
        })
    }
}

/// A JWKS. It travels as its text, and is read anew where it arrives.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeySet {
    text: String,
    keys: Vec<Key>,
    /// Why the others are not used: `keys[1]: ...`.
    unusable: Vec<String>,
}

#[derive(Clone, Debug)]
struct Key {
    id: Option<String>,
    algorithms: &'static [Algorithm],
    material: Material,
}

#[derive(Clone, Debug)]
enum Material {
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    /// An uncompressed point.
    Point(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// Why no key of a set verified a signature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotVerified {
    /// No key can be the one that the token names.
    UnknownKey,
    /// A key is there and does not allow the token's algorithm.
    Algorithm,
    Signature,
}

impl KeySet {
    /// Keys that are of no use are left out (RFC 7517 section 5); a set without any other is an error.
    pub fn parse(text: &str) -> Result<KeySet, String> {
        if text.len() > MOST_BYTES {
            return Err(format!("the key set is larger than {MOST_BYTES} bytes"));
        }
        let set: Value = serde_json::from_str(text).map_err(|error| format!("the key set is no JSON: {error}"))?;
        let keys = set.get("keys").and_then(Value::as_array).ok_or("the key set has no list `keys`")?;
        if keys.len() > MOST_KEYS {
            return Err(format!("the key set has {} keys: at most {MOST_KEYS} are read", keys.len()));
        }
        let mut found = KeySet { text: text.to_owned(), keys: Vec::new(), unusable: Vec::new() };
        for (index, key) in keys.iter().enumerate() {
            match key.as_object().ok_or_else(|| "it is no object".to_owned()).and_then(Key::parse) {
                Ok(key) => found.keys.push(key),
                Err(why) => found.unusable.push(format!("keys[{index}]: {why}")),
            }
        }
        match (found.keys.is_empty(), found.unusable.first()) {
            (false, _) => Ok(found),
            (true, Some(why)) => Err(format!("the key set has no key that can be used: {why}")),
            (true, None) => Err("the key set is empty".to_owned()),
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn unusable(&self) -> &[String] {
        &self.unusable
    }

    /// Whether a key of the set signed `message`. With `id` (`kid`) the keys of that name and those without one, else all.
    pub fn verify(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), NotVerified> {
        let mut outcome = NotVerified::UnknownKey;
        for key in &self.keys {
            if let (Some(id), Some(own)) = (id, &key.id)
                && id != own
            {
                continue;
            }
            if !key.algorithms.contains(&algorithm) {
                if outcome == NotVerified::UnknownKey {
                    outcome = NotVerified::Algorithm;
                }
                continue;
            }
            if key.material.verifies(algorithm, message, signature) {
                return Ok(());
            }
            outcome = NotVerified::Signature;
        }
        Err(outcome)
    }
}

impl PartialEq for KeySet {
    fn eq(&self, other: &KeySet) -> bool {
        self.text == other.text
    }
}

impl Eq for KeySet {}

impl TryFrom<String> for KeySet {
    type Error = String;

    fn try_from(text: String) -> Result<KeySet, String> {
        KeySet::parse(&text)
    }
}

impl From<KeySet> for String {
    fn from(keys: KeySet) -> String {
        keys.text
    }
}

impl Key {
    fn parse(key: &Map<String, Value>) -> Result<Key, String> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        if let Some(purpose) = text("use").filter(|purpose| *purpose != "sig") {
            return Err(format!("its `use` is {:?}, not \"sig\"", shortened(purpose)));
        }
        if let Some(operations) = key.get("key_ops").and_then(Value::as_array)
            && !operations.iter().any(|operation| operation == "verify")
        {
            return Err("its `key_ops` do not have \"verify\"".to_owned());
        }
        let bytes = |name: &str| {
            let text = text(name).ok_or_else(|| format!("`{name}` is missing"))?;
            URL_SAFE_NO_PAD.decode(text).map_err(|_| format!("`{name}` is not base64url"))
        };
        let (fitting, material) = match text("kty") {
            Some("RSA") => (RSA, rsa(&bytes("n")?, &bytes("e")?)?),
            Some("EC") => {
                let (algorithms, length) = match text("crv") {
                    Some("P-256") => (P256, 32),
                    Some("P-384") => (P384, 48),
                    Some("P-521") => (P521, 66),
                    other => return Err(format!("its curve {} is not read", quoted(other))),
                };
                let (x, y) = (bytes("x")?, bytes("y")?);
                if x.len() != length || y.len() != length {
                    return Err(format!("`x` and `y` are not {length} bytes long"));
                }
                (algorithms, Material::Point([&[4], x.as_slice(), y.as_slice()].concat()))
            }
            Some("OKP") if text("crv") == Some("Ed25519") => {
                let x = bytes("x")?;
                if x.len() != 32 {
                    return Err("`x` is not 32 bytes long".to_owned());
                }
                (ED25519, Material::Ed25519(x))
            }
            Some("OKP") => return Err(format!("its curve {} is not read", quoted(text("crv")))),
            Some("oct") => return Err("it is a shared secret, which whoever verifies could sign with".to_owned()),
            other => return Err(format!("its `kty` {} is not read", quoted(other))),
        };
        let algorithms = match key.get("alg") {
            None => fitting,
            Some(name) => {
                let algorithm = name.as_str().and_then(Algorithm::parse);
                let position = fitting.iter().position(|one| Some(*one) == algorithm);
                let position = position.ok_or_else(|| format!("its `alg` {} is none for it", quoted(name.as_str())))?;
                fitting.get(position..=position).unwrap_or_default()
            }
        };
        Ok(Key { id: text("kid").map(str::to_owned), algorithms, material })
    }
}

const RSA: &[Algorithm] =
    &[Algorithm::Rs256, Algorithm::Rs384, Algorithm::Rs512, Algorithm::Ps256, Algorithm::Ps384, Algorithm::Ps512];
const P256: &[Algorithm] = &[Algorithm::Es256];
const P384: &[Algorithm] = &[Algorithm::Es384];
const P521: &[Algorithm] = &[Algorithm::Es512];
const ED25519: &[Algorithm] = &[Algorithm::EdDsa];

fn rsa(modulus: &[u8], exponent: &[u8]) -> Result<Material, String> {
    let bare = |bytes: &[u8]| bytes[bytes.iter().take_while(|byte| **byte == 0).count()..].to_vec();
    let (modulus, exponent) = (bare(modulus), bare(exponent));
    let bits = modulus.first().map_or(0, |first| modulus.len() * 8 - first.leading_zeros() as usize);
    if !RSA_BITS.contains(&bits) {
        return Err(format!("its modulus has {bits} bits, not {} to {}", RSA_BITS.start(), RSA_BITS.end()));
    }
    let odd = exponent.last().is_some_and(|last| last % 2 == 1);
    if !odd || exponent == [1] || exponent.len() > 4 {
        return Err("its exponent is not an odd number from 3 to 2^32".to_owned());
    }
    Ok(Material::Rsa { modulus, exponent })
}

impl Material {
    fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let rsa = |parameters: &RsaParameters| match self {
            Material::Rsa { modulus, exponent } => {
                let key = RsaPublicKeyComponents { n: modulus, e: exponent };
                key.verify(parameters, message, signature).is_ok()
            }
            Material::Point(_) | Material::Ed25519(_) => false,
        };
        let ecdsa = |algorithm: &'static EcdsaVerificationAlgorithm| match self {
            Material::Point(point) => UnparsedPublicKey::new(algorithm, point).verify(message, signature).is_ok(),
            Material::Rsa { .. } | Material::Ed25519(_) => false,
        };
        match algorithm {
            Algorithm::Rs256 => rsa(&signature::RSA_PKCS1_2048_8192_SHA256),
            Algorithm::Rs384 => rsa(&signature::RSA_PKCS1_2048_8192_SHA384),
            Algorithm::Rs512 => rsa(&signature::RSA_PKCS1_2048_8192_SHA512),
            Algorithm::Ps256 => rsa(&signature::RSA_PSS_2048_8192_SHA256),
            Algorithm::Ps384 => rsa(&signature::RSA_PSS_2048_8192_SHA384),
            Algorithm::Ps512 => rsa(&signature::RSA_PSS_2048_8192_SHA512),
            Algorithm::Es256 => ecdsa(&signature::ECDSA_P256_SHA256_FIXED),
            Algorithm::Es384 => ecdsa(&signature::ECDSA_P384_SHA384_FIXED),
            Algorithm::Es512 => ecdsa(&signature::ECDSA_P521_SHA512_FIXED),
            Algorithm::EdDsa => match self {
                Material::Ed25519(key) => {
                    UnparsedPublicKey::new(&signature::ED25519, key).verify(message, signature).is_ok()
                }
                Material::Rsa { .. } | Material::Point(_) => false,
            },
        }
    }
}

fn quoted(text: Option<&str>) -> String {
    text.map_or_else(|| "(none)".to_owned(), |text| format!("{:?}", shortened(text)))
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}
