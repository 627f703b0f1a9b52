//! age recipients and identities: escrow keys that never need to be on a database host.

use std::path::Path;

use async_trait::async_trait;
use dr_core::port::{KeyError, KeyProvider};

use super::bad;

/// An age X25519 recipient (seals) or identity (seals and opens).
#[derive(Clone)]
pub struct AgeKey {
    recipient: age::x25519::Recipient,
    identity: Option<age::x25519::Identity>,
}

impl std::fmt::Debug for AgeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AgeKey({})", self.recipient)
    }
}

impl AgeKey {
    /// A recipient as text: `age1…`.
    pub fn recipient(text: &str) -> Result<Self, KeyError> {
        let place = Path::new("the age recipient");
        let recipient = text.trim().parse().map_err(|reason: &str| bad(place, reason))?;
        Ok(AgeKey { recipient, identity: None })
    }

    /// An identity file as `age-keygen` writes it; the first identity in it is used.
    pub fn read_identity(path: &Path) -> Result<Self, KeyError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| KeyError::Unreadable { path: path.display().to_string(), source })?;
        let line = text.lines().map(str::trim).find(|line| line.starts_with("AGE-SECRET-KEY-"));
        let line = line.ok_or_else(|| bad(path, "it has no line that begins with AGE-SECRET-KEY-"))?;
        let identity: age::x25519::Identity = line.parse().map_err(|reason: &str| bad(path, reason))?;
        Ok(AgeKey { recipient: identity.to_public(), identity: Some(identity) })
    }
}

#[async_trait]
impl KeyProvider for AgeKey {
    fn id(&self) -> String {
        let text = self.recipient.to_string();
        format!("age-{}", text.get(text.len().saturating_sub(12)..).unwrap_or_default())
    }

    async fn wrap(&self, material: &[u8]) -> Result<Vec<u8>, KeyError> {
        age::encrypt(&self.recipient, material).map_err(|_| KeyError::WrongKey { provider: self.id() })
    }

    async fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, KeyError> {
        let Some(identity) = &self.identity else {
            return Err(KeyError::CannotUnwrap { provider: self.id() });
        };
        age::decrypt(identity, wrapped).map_err(|_| KeyError::WrongKey { provider: self.id() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_recipient_seals_and_only_its_identity_opens() {
        let identity = age::x25519::Identity::generate();
        let recipient = AgeKey::recipient(&identity.to_public().to_string()).expect("a recipient");
        let wrapped = recipient.wrap(b"material").await.expect("wrapping");
        assert!(matches!(recipient.unwrap(&wrapped).await, Err(KeyError::CannotUnwrap { .. })));
        let own = AgeKey { recipient: identity.to_public(), identity: Some(identity) };
        assert_eq!(own.unwrap(&wrapped).await.expect("unwrapping"), b"material");
        let other = age::x25519::Identity::generate();
        let other = AgeKey { recipient: other.to_public(), identity: Some(other) };
        assert!(matches!(other.unwrap(&wrapped).await, Err(KeyError::WrongKey { .. })));
    }
}
