//! An issuer of tokens: real keys of every kind and real signatures, made while a test runs. The pure tests of
//! `outrigger-api` include this file, so that both make the same tokens.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

/// A key pair with its `kid`.
pub struct SigningKey {
    id: Option<String>,
    pair: Pair,
}

enum Pair {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair, &'static str, usize),
    Ed25519(Ed25519KeyPair),
}

impl SigningKey {
    /// `kind`: `RSA` (2048 bits), `P-256`, `P-384`, `P-521` or `Ed25519`. Without a kid: an empty text.
    pub fn new(kind: &str, id: &str) -> SigningKey {
        let ec = |algorithm, curve, length| Pair::Ec(EcdsaKeyPair::generate(algorithm).unwrap(), curve, length);
        let pair = match kind {
            "RSA" => Pair::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
            "P-256" => ec(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "P-256", 32),
            "P-384" => ec(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "P-384", 48),
            "P-521" => ec(&signature::ECDSA_P521_SHA512_FIXED_SIGNING, "P-521", 66),
            "Ed25519" => Pair::Ed25519(Ed25519KeyPair::generate().unwrap()),
            other => panic!("no kind of key: {other}"),
        };
        SigningKey { id: (!id.is_empty()).then(|| id.to_owned()), pair }
    }

    /// The public key, as it stands in a key set, without `alg` and `use`.
    pub fn jwk(&self) -> Value {
        let mut jwk = match &self.pair {
            Pair::Rsa(pair) => {
                let (modulus, exponent) = rsa_numbers(pair.public_key().as_ref());
                json!({"kty": "RSA", "n": encoded(modulus), "e": encoded(exponent)})
            }
            Pair::Ec(pair, curve, length) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(*length);
                json!({"kty": "EC", "crv": curve, "x": encoded(x), "y": encoded(y)})
            }
            Pair::Ed25519(pair) => json!({"kty": "OKP", "crv": "Ed25519", "x": encoded(pair.public_key().as_ref())}),
        };
        if let Some(id) = &self.id {
            jwk["kid"] = json!(id);
        }
        jwk
    }

    /// The algorithm that its tokens have by default.
    pub fn algorithm(&self) -> &'static str {
        match &self.pair {
            Pair::Rsa(_) => "RS256",
            Pair::Ec(_, "P-256", _) => "ES256",
            Pair::Ec(_, "P-384", _) => "ES384",
            Pair::Ec(..) => "ES512",
            Pair::Ed25519(_) => "EdDSA",
        }
    }

    /// A token of these claims.
    pub fn token(&self, claims: &Value) -> String {
        let mut header = json!({"alg": self.algorithm(), "typ": "JWT"});
        if let Some(id) = &self.id {
            header["kid"] = json!(id);
        }
        self.token_with(&header, claims)
    }

    /// A token with a header of one's own. What signs is what `alg` says, or, where that is nothing for this key, its
    /// default.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", encoded(header.to_string().as_bytes()), encoded(claims.to_string().as_bytes()));
        let signature = self.sign(header["alg"].as_str().unwrap_or_default(), signed.as_bytes());
        format!("{signed}.{}", encoded(&signature))
    }

    pub fn sign(&self, algorithm: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Rsa(pair) => {
                let encoding: &'static dyn signature::RsaEncoding = match algorithm {
                    "RS384" => &signature::RSA_PKCS1_SHA384,
                    "RS512" => &signature::RSA_PKCS1_SHA512,
                    "PS256" => &signature::RSA_PSS_SHA256,
                    "PS384" => &signature::RSA_PSS_SHA384,
                    "PS512" => &signature::RSA_PSS_SHA512,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut bytes = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &random, message, &mut bytes).unwrap();
                bytes
            }
            Pair::Ec(pair, ..) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Pair::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }
}

/// A key set of these keys.
pub fn key_set(keys: &[Value]) -> String {
    json!({"keys": keys}).to_string()
}

pub fn encoded(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Modulus and exponent of an RSAPublicKey (RFC 8017, appendix A.1.1): a sequence of two integers.
fn rsa_numbers(der: &[u8]) -> (&[u8], &[u8]) {
    let (sequence, _) = der_value(der, 0x30);
    let (modulus, rest) = der_value(sequence, 0x02);
    let (exponent, _) = der_value(rest, 0x02);
    (modulus.strip_prefix(&[0]).unwrap_or(modulus), exponent)
}

/// The value that begins here, and what is behind it.
fn der_value(der: &[u8], tag: u8) -> (&[u8], &[u8]) {
    assert_eq!(der[0], tag);
    let (length, behind) = match der[1] {
        short @ 0..0x80 => (usize::from(short), &der[2..]),
        long => {
            let count = usize::from(long & 0x7f);
            let length = der[2..2 + count].iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
            (length, &der[2 + count..])
        }
    };
    behind.split_at(length)
}
