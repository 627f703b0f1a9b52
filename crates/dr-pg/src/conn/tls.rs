//! TLS towards a server, as libpq's `sslmode` has it (manual, "SSL Support").

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme, version,
};

/// How much TLS must give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// No TLS.
    Disable,
    /// Without TLS, and with it if the server refuses that.
    Allow,
    /// With TLS if the server has it.
    Prefer,
    /// Only with TLS; whoever answers is believed.
    Require,
    /// Only a server with a certificate of a trusted authority.
    VerifyCa,
    /// And the certificate must be for the host's name.
    VerifyFull,
}

impl TlsMode {
    pub(super) const WORDS: [TlsMode; 6] = [
        TlsMode::Disable,
        TlsMode::Allow,
        TlsMode::Prefer,
        TlsMode::Require,
        TlsMode::VerifyCa,
        TlsMode::VerifyFull,
    ];

    pub(super) fn word(self) -> &'static str {
        match self {
            TlsMode::Disable => "disable",
            TlsMode::Allow => "allow",
            TlsMode::Prefer => "prefer",
            TlsMode::Require => "require",
            TlsMode::VerifyCa => "verify-ca",
            TlsMode::VerifyFull => "verify-full",
        }
    }

    /// The ways to try in turn; `true` is without TLS. A server's rules (`hostssl`, `hostnossl`)
    /// may let in the one and not the other.
    pub(crate) fn ways(self) -> &'static [bool] {
        match self {
            TlsMode::Disable => &[true],
            TlsMode::Allow => &[true, false],
            TlsMode::Prefer => &[false, true],
            _ => &[false],
        }
    }

    /// Whether a connection without TLS is refused.
    pub fn is_demanded(self) -> bool {
        matches!(self, TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull)
    }
}

/// How TLS begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Negotiation {
    /// The server is asked for TLS first.
    Postgres,
    /// With the first byte (PostgreSQL 17 and later).
    Direct,
}

/// What is wanted of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsOptions {
    /// How much it must give.
    pub mode: TlsMode,
    /// A file with trusted authorities.
    pub root: Option<PathBuf>,
    /// Trust the authorities of the operating system.
    pub system_roots: bool,
    /// The client's certificate chain.
    pub certificate: Option<PathBuf>,
    /// The client's key.
    pub key: Option<PathBuf>,
    /// How it begins.
    pub negotiation: Negotiation,
    /// TLS 1.3 and later only.
    pub newest_only: bool,
}

/// The ALPN word that direct negotiation demands (`src/include/libpq/pqcomm.h`).
const ALPN: &[u8] = b"postgresql";

/// Builds the client's side. Errors name the file.
pub(super) fn client(options: &TlsOptions) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let versions: &[_] =
        if options.newest_only { &[&version::TLS13] } else { &[&version::TLS13, &version::TLS12] };
    let verifier = verifier(options, provider.clone())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match (&options.certificate, &options.key) {
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate)?;
            let private = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("the key {} cannot be read: {error}", key.display()))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| {
                format!("{} and {} do not fit: {error}", certificate.display(), key.display())
            })?
        }
        (Some(certificate), None) => {
            return Err(format!("the certificate {} has no key (sslkey)", certificate.display()));
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |why: String| format!("the certificate file {} cannot be read: {why}", path.display());
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?.collect();
    let chain = chain.map_err(|error| wrong(error.to_string()))?;
    if chain.is_empty() { Err(wrong("it has no certificate".into())) } else { Ok(chain) }
}

fn verifier(
    options: &TlsOptions,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ServerCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    if options.system_roots {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
    }
    if let Some(path) = &options.root {
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
        }
    }
    let check = match options.mode {
        TlsMode::VerifyCa => Check::Authority,
        TlsMode::VerifyFull => Check::Name,
        _ => Check::Nothing,
    };
    if check == Check::Nothing {
        return Ok(Arc::new(Verifier { inner: None, check, provider }));
    }
    if roots.is_empty() {
        let word = options.mode.word();
        return Err(format!(
            "sslmode={word} needs sslrootcert=FILE, sslrootcert=system or ~/.postgresql/root.crt"
        ));
    }
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Arc::new(Verifier { inner: Some(inner), check, provider }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Nothing,
    Authority,
    Name,
}

/// Checks as much of a certificate as `sslmode` asks for; signatures of the handshake always.
struct Verifier {
    inner: Option<Arc<WebPkiServerVerifier>>,
    check: Check,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier({:?})", self.check)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(inner) = &self.inner else { return Ok(ServerCertVerified::assertion()) };
        match inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The chain is checked before the name (`webpki` verifier), so only the name is wrong.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.check == Check::Authority => Ok(ServerCertVerified::assertion()),
            answer => answer,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The server's end point for channel binding: the digest of its certificate by the algorithm of
/// the certificate's signature, where SHA-1 and MD5 are replaced by SHA-256 (RFC 5929 section 4.1).
/// `None` when the algorithm has no digest of its own (Ed25519), which PostgreSQL refuses too.
pub(super) fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    use tokio_rustls::rustls::crypto::hash::HashAlgorithm;
    let wanted = match signature_oid(certificate)? {
        // sha256WithRSA, ecdsa-with-SHA256; sha1WithRSA, md5WithRSA, ecdsa-with-SHA1
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0B | 0x05 | 0x04]
        | [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x02]
        | [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x01] => HashAlgorithm::SHA256,
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0C]
        | [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x03] => HashAlgorithm::SHA384,
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0D]
        | [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x04] => HashAlgorithm::SHA512,
        _ => return None,
    };
    let suites = aws_lc_rs::default_provider().cipher_suites;
    let hash = suites.iter().find_map(|suite| {
        let hash = suite.tls13()?.common.hash_provider;
        (hash.algorithm() == wanted).then_some(hash)
    });
    match hash {
        Some(hash) => Some(hash.hash(certificate).as_ref().to_vec()),
        None => Some(sha512(certificate)),
    }
}

/// No TLS 1.3 suite uses SHA-512, so the suites do not offer it.
fn sha512(bytes: &[u8]) -> Vec<u8> {
    ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA512, bytes).as_ref().to_vec()
}

/// `Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE { OID, … }, … }` (RFC 5280).
fn signature_oid(certificate: &[u8]) -> Option<&[u8]> {
    let (whole, _) = element(certificate, 0x30)?;
    let (_, after_body) = element(whole, 0x30)?;
    let (algorithm, _) = element(after_body, 0x30)?;
    element(algorithm, 0x06).map(|(oid, _)| oid)
}

/// The content of a DER element of this type, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let (length, mut rest) = rest.split_first()?;
    let mut len = usize::from(*length);
    if len >= 0x80 {
        let count = len & 0x7F;
        if count == 0 || count > 4 || rest.len() < count {
            return None;
        }
        len = rest[..count].iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
        rest = &rest[count..];
    }
    (*first == tag && len <= rest.len()).then(|| rest.split_at(len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(mode: TlsMode) -> TlsOptions {
        TlsOptions {
            mode,
            root: None,
            system_roots: false,
            certificate: None,
            key: None,
            negotiation: Negotiation::Postgres,
            newest_only: false,
        }
    }

    #[test]
    fn a_verifying_mode_without_authorities_says_what_it_needs() {
        assert!(client(&options(TlsMode::VerifyFull)).unwrap_err().contains("sslrootcert"));
        assert!(client(&options(TlsMode::Require)).is_ok());
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.pem");
        std::fs::write(&empty, "nothing").unwrap();
        let mut wrong = options(TlsMode::VerifyCa);
        wrong.root = Some(empty.clone());
        assert!(client(&wrong).unwrap_err().contains("empty.pem"));
        let mut wrong = options(TlsMode::Require);
        wrong.certificate = Some(empty.clone());
        assert!(client(&wrong).unwrap_err().contains("sslkey"));
        wrong.key = Some(empty);
        assert!(client(&wrong).unwrap_err().contains("empty.pem"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_certificate_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = end_point(&bytes);
        }
    }
}
