//! S3 and compatible stores, through `object_store`.
//!
//! `create` is one PUT with `If-None-Match: *`, never a multipart upload, so that the store itself
//! refuses an existing name. The store's answer is trusted only after [`probe`](crate::probe()) has
//! seen it refuse. Retries of writes are left to [`Retrying`](super::Retrying), which asks before
//! it decides; a client that retries a create by itself cannot tell its own object from another's.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::Timestamp;
use dr_core::guard::Guard;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder, Checksum};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::{
    Certificate, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
};

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Silence after which a transfer counts as dead; a whole transfer has no limit, links are slow.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// How a bucket is reached.
#[derive(Clone, Default)]
pub struct S3Config {
    /// The bucket.
    pub bucket: String,
    /// A prefix for all names; empty for none.
    pub prefix: String,
    /// The server's address; `None`: AWS.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// The bucket is part of the path.
    pub path_style: bool,
    /// Allow a connection without TLS.
    pub allow_http: bool,
    /// Certificates (PEM) to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// The access key; `None`: the environment's, the instance's or the web identity.
    pub access_key: Option<String>,
    /// The secret key.
    pub secret_key: Option<String>,
    /// The session token of temporary credentials.
    pub session_token: Option<String>,
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Config(s3://{}/{})", self.bucket, self.prefix)
    }
}

/// A bucket, or a part of one, as a target.
#[derive(Debug)]
pub struct S3Target {
    reads: AmazonS3,
    writes: AmazonS3,
    prefix: String,
    location: String,
}

type Source = Box<dyn std::error::Error + Send + Sync>;

impl S3Target {
    /// Sets the client up; nothing is sent yet.
    pub fn open(config: S3Config) -> Result<Self, StorageError> {
        let location = format!("s3://{}/{}", config.bucket, config.prefix);
        let invalid = |reason: String| StorageError::Invalid { target: location.clone(), reason };
        if !config.allow_http && config.endpoint.as_deref().is_some_and(|url| url.starts_with("http://")) {
            let reason = "its endpoint has no TLS (http://), and repository.allow_http does not allow that";
            return Err(invalid(reason.into()));
        }
        let reads = builder(&config, 3).map_err(&invalid)?;
        let writes = builder(&config, 0).map_err(&invalid)?;
        let build = |b: AmazonS3Builder| b.build().map_err(|error| invalid(error.to_string()));
        let prefix = if config.prefix.is_empty() { String::new() } else { format!("{}/", config.prefix) };
        Ok(S3Target { reads: build(reads)?, writes: build(writes)?, prefix, location: location.clone() })
    }

    fn path(&self, key: &Key) -> Path {
        Path::from(format!("{}{key}", self.prefix))
    }

    fn info(&self, meta: &object_store::ObjectMeta) -> Option<ObjectInfo> {
        let name = meta.location.as_ref().strip_prefix(&self.prefix)?;
        let modified = Timestamp::from_second(meta.last_modified.timestamp()).ok()?;
        Some(ObjectInfo { key: Key::new(name).ok()?, size: meta.size, modified })
    }

    fn explain(&self, operation: &'static str, key: &str, error: object_store::Error) -> StorageError {
        let (key, target) = (key.to_owned(), self.location.clone());
        if chain(&error).contains("NoSuchBucket") {
            return StorageError::Invalid { target, reason: "the bucket does not exist".into() };
        }
        match error {
            object_store::Error::NotFound { .. } => StorageError::NotFound { key, target },
            object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
                StorageError::AlreadyExists { key, target }
            }
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                StorageError::Denied { operation, key, target, source: Box::new(error) }
            }
            object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. } => {
                StorageError::Unsupported { target, reason: error.to_string() }
            }
            error => {
                let text = chain(&error);
                let source: Source = text.clone().into();
                // 501: the server says that it does not know conditional writes.
                if text.contains("status code: 501") {
                    return StorageError::Unsupported {
                        target,
                        reason: "it does not know conditional writes".into(),
                    };
                }
                let nothing_sent = operation != "create" || never_arrived(&error);
                if nothing_sent {
                    StorageError::Unavailable { operation, key, target, source }
                } else {
                    StorageError::Indeterminate { operation, key, target, source }
                }
            }
        }
    }
}

fn builder(config: &S3Config, retries: usize) -> Result<AmazonS3Builder, String> {
    let mut client = ClientOptions::new()
        .with_timeout_disabled()
        .with_read_timeout(SILENCE_LIMIT)
        .with_connect_timeout(CONNECT_LIMIT)
        .with_allow_http(config.allow_http);
    if let Some(path) = &config.ca_file {
        let pem = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        for certificate in Certificate::from_pem_bundle(&pem).map_err(|error| error.to_string())? {
            client = client.with_root_certificate(certificate);
        }
    }
    let retry = RetryConfig { max_retries: retries, ..RetryConfig::default() };
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(&config.bucket)
        .with_virtual_hosted_style_request(!config.path_style)
        .with_allow_http(config.allow_http)
        .with_client_options(client)
        .with_retry(retry);
    if let Some(region) = &config.region {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_endpoint(endpoint);
        // Over TLS the payload is not hashed twice; a checksum goes with it instead. Plain HTTP
        // keeps the signed payload, which the server checks.
        if endpoint.starts_with("https://") {
            builder = builder.with_unsigned_payload(true).with_checksum_algorithm(Checksum::SHA256);
        }
    } else {
        builder = builder.with_unsigned_payload(true).with_checksum_algorithm(Checksum::SHA256);
    }
    if let (Some(access), Some(secret)) = (&config.access_key, &config.secret_key) {
        builder = builder.with_access_key_id(access).with_secret_access_key(secret);
    }
    if let Some(token) = &config.session_token {
        builder = builder.with_token(token);
    }
    Ok(builder)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

/// Whether the request certainly never reached the server.
fn never_arrived(error: &dyn std::error::Error) -> bool {
    let mut next = error.source();
    while let Some(cause) = next {
        if let Some(http) = cause.downcast_ref::<HttpError>() {
            return matches!(http.kind(), HttpErrorKind::Connect);
        }
        next = cause.source();
    }
    false
}

#[async_trait]
impl StorageTarget for S3Target {
    fn location(&self) -> String {
        self.location.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { create_only: true, local: false }
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        let body: PutPayload = payload.pieces().iter().cloned().collect();
        let mode = if Guard::CreateOnly.holds() { PutMode::Create } else { PutMode::Overwrite };
        let options = PutOptions { mode, ..PutOptions::default() };
        let done = self.writes.put_opts(&self.path(key), body, options).await;
        done.map(|_| ()).map_err(|error| self.explain("create", key.as_str(), error))
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        let failed = |error| self.explain("read", key.as_str(), error);
        let wanted = range.clone().map(|r| r.end - r.start);
        if wanted == Some(0) {
            return Ok(Bytes::new());
        }
        let needed = range.as_ref().map(|r| r.end);
        let options = GetOptions { range: range.map(GetRange::Bounded), ..GetOptions::default() };
        match self.reads.get_opts(&self.path(key), options).await {
            Ok(answer) => {
                let size = answer.meta.size;
                let bytes = answer.bytes().await.map_err(failed)?;
                match (wanted, needed) {
                    (Some(wanted), Some(needed)) if bytes.len() as u64 != wanted => {
                        let (key, target) = (key.to_string(), self.location());
                        Err(StorageError::Truncated { key, target, size, needed })
                    }
                    _ => Ok(bytes),
                }
            }
            // A range that begins beyond the end is refused by the server: say how long it is.
            Err(error) => match (needed, self.head(key).await) {
                (Some(needed), Ok(info)) if info.size < needed => {
                    let (key, target) = (key.to_string(), self.location());
                    Err(StorageError::Truncated { key, target, size: info.size, needed })
                }
                _ => Err(failed(error)),
            },
        }
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        let meta = self.reads.head(&self.path(key)).await;
        let meta = meta.map_err(|error| self.explain("look at", key.as_str(), error))?;
        self.info(&meta)
            .ok_or_else(|| StorageError::NotFound { key: key.to_string(), target: self.location() })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        let path = Path::from(format!("{}{}", self.prefix, prefix.trim_end_matches('/')));
        let listed = match after {
            Some(after) => self.reads.list_with_offset(Some(&path), &self.path(after)),
            None => self.reads.list(Some(&path)),
        };
        listed
            .map_err(move |error| self.explain("list", prefix, error))
            .try_filter_map(move |meta| std::future::ready(Ok(self.info(&meta))))
            .boxed()
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let path = Path::from(format!("{}{}", self.prefix, prefix.trim_end_matches('/')));
        let listed = self.reads.list_with_delimiter(Some(&path)).await;
        let listed = listed.map_err(|error| self.explain("list", prefix, error))?;
        let objects = listed.objects.iter().map(|meta| &meta.location);
        let part = |path: &Path| path.parts().next_back().map(|part| part.as_ref().to_owned());
        let mut parts: Vec<String> = listed.common_prefixes.iter().chain(objects).filter_map(part).collect();
        parts.sort_unstable();
        parts.dedup();
        Ok(parts)
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        match self.reads.delete(&self.path(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.explain("delete", key.as_str(), error)),
        }
    }
}

impl S3Target {
    /// The target as the port, for wiring.
    pub fn shared(self) -> Arc<dyn StorageTarget> {
        Arc::new(self)
    }
}
