//! Sealing and opening. All primitives come from aws-lc-rs and `hpke`; this file only composes them
//! as `docs/formats/repository-v1.md` says.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};

use crate::error::RepoError;

/// Bytes of an AES-GCM tag.
pub(crate) const TAG_LEN: usize = 16;

/// Bytes of a sealed data key: encapsulated key 32, ciphertext 32, tag 16.
pub(crate) const SEALED_DEK_LEN: usize = 80;

/// A symmetric key. It never shows itself.
#[derive(Clone)]
pub(crate) struct Secret(pub [u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Random bytes from the operating system.
///
/// # Panics
/// When the operating system has none, which Linux does not do after boot.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    getrandom::fill(&mut out).expect("the operating system gives random bytes");
    out
}

/// A random number, for names.
pub fn random_u32() -> u32 {
    u32::from_le_bytes(random())
}

struct Len32;

impl KeyType for Len32 {
    fn len(&self) -> usize {
        32
    }
}

/// HKDF-SHA-256 with an empty salt.
pub(crate) fn derive(secret: &Secret, info: &[&[u8]]) -> Secret {
    let mut out = [0; 32];
    let prk = Salt::new(HKDF_SHA256, &[]).extract(&secret.0);
    // Expanding 32 bytes cannot fail: the limit is 255 times the digest's length.
    let filled = prk.expand(info, Len32).and_then(|okm| okm.fill(&mut out));
    debug_assert!(filled.is_ok());
    Secret(out)
}

/// AES-256-GCM under one key, for one object.
pub(crate) struct Aead(LessSafeKey);

impl std::fmt::Debug for Aead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Aead(…)")
    }
}

impl Aead {
    pub fn new(key: &Secret) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, &key.0).expect("the key has 32 bytes");
        Aead(LessSafeKey::new(key))
    }

    /// Seals in place and appends the tag. A nonce is used once under a key: callers pass the
    /// position in an object that is written once.
    pub fn seal(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut Vec<u8>) -> Result<(), RepoError> {
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), bytes)
            .map_err(|_| RepoError::Bug { what: "sealing failed".into() })
    }

    /// Opens in place and answers the plaintext.
    pub fn open<'a>(&self, nonce: [u8; 12], aad: &[u8], bytes: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.0.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), bytes).ok()
    }
}

/// Randomness for `hpke`.
struct OsRandom;

impl hpke::rand_core::RngCore for OsRandom {
    fn next_u32(&mut self) -> u32 {
        u32::from_le_bytes(random())
    }

    fn next_u64(&mut self) -> u64 {
        u64::from_le_bytes(random())
    }

    fn fill_bytes(&mut self, dst: &mut [u8]) {
        getrandom::fill(dst).expect("the operating system gives random bytes");
    }
}

impl hpke::rand_core::CryptoRng for OsRandom {}

/// A new key pair: private key, public key.
pub(crate) fn key_pair() -> (Secret, [u8; 32]) {
    let (private, public) = X25519HkdfSha256::gen_keypair(&mut OsRandom);
    (Secret(private.to_bytes().into()), public.to_bytes().into())
}

/// Seals a data key to a public key (RFC 9180, base mode, X25519, HKDF-SHA256, AES-256-GCM).
pub(crate) fn seal_dek(
    public: &[u8; 32],
    info: &[u8],
    dek: &Secret,
) -> Result<[u8; SEALED_DEK_LEN], RepoError> {
    let bug = |_| RepoError::Bug { what: "sealing a data key failed".into() };
    let public = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(public).map_err(bug)?;
    let (encapped, sealed) = hpke::single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256, _>(
        &OpModeS::Base,
        &public,
        info,
        &dek.0,
        &[],
        &mut OsRandom,
    )
    .map_err(bug)?;
    let mut out = [0; SEALED_DEK_LEN];
    out[..32].copy_from_slice(&encapped.to_bytes());
    out[32..].copy_from_slice(&sealed);
    Ok(out)
}

/// Opens a sealed data key; `None` when it was sealed to another key or altered.
pub(crate) fn open_dek(private: &Secret, info: &[u8], sealed: &[u8; SEALED_DEK_LEN]) -> Option<Secret> {
    let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(&private.0).ok()?;
    let encapped = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(&sealed[..32]).ok()?;
    let opened = hpke::single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &private,
        &encapped,
        info,
        &sealed[32..],
        &[],
    );
    opened.ok()?.try_into().ok().map(Secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_data_key_opens_only_with_its_private_key_and_its_purpose() {
        let (private, public) = key_pair();
        let dek = Secret(random());
        let mut sealed = seal_dek(&public, b"purpose", &dek).expect("sealing");
        assert_eq!(open_dek(&private, b"purpose", &sealed).map(|k| k.0), Some(dek.0));
        assert!(open_dek(&private, b"other", &sealed).is_none());
        assert!(open_dek(&key_pair().0, b"purpose", &sealed).is_none());
        sealed[40] ^= 1;
        assert!(open_dek(&private, b"purpose", &sealed).is_none());
    }

    #[test]
    fn secrets_do_not_show_themselves() {
        assert_eq!(format!("{:?}", Secret([7; 32])), "Secret(…)");
    }
}
