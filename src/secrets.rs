//! Passwords at rest: encrypted with a key that only the hub's user can read.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

/// Bytes of the key.
const KEY: usize = 32;
/// Bytes of a nonce, which comes before each ciphertext.
const NONCE: usize = 24;

/// Encrypts and decrypts secrets (XChaCha20-Poly1305).
pub struct Secrets {
    cipher: XChaCha20Poly1305,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets")
    }
}

fn random<const N: usize>() -> io::Result<Zeroizing<[u8; N]>> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(bytes.as_mut_slice()).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

impl Secrets {
    /// Reads the key file at `path`, which is made with mode 0600 where it is not there.
    ///
    /// # Errors
    /// Those of the file; `PermissionDenied` where others may read it; `InvalidData` where it is no
    /// key.
    pub fn open(path: &Path) -> io::Result<Self> {
        if !path.exists() {
            let key = random::<KEY>()?;
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(key.as_slice())?;
            file.sync_all()?;
        }
        let mode = fs::metadata(path)?.mode();
        if mode & 0o077 != 0 {
            let text = format!(
                "others may read the key file '{}' (mode {:o}): chmod 600 it, and change the \
                 passwords that it protects",
                path.display(),
                mode & 0o777
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let bytes = Zeroizing::new(fs::read(path)?);
        if bytes.len() != KEY {
            let text = format!("'{}' is no key: it has {} bytes", path.display(), bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { cipher: XChaCha20Poly1305::new(Key::from_slice(&bytes)) })
    }

    /// Encrypts `secret`. What it belongs to must be told again to decrypt it.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn seal(&self, secret: &str, belongs_to: &str) -> io::Result<Vec<u8>> {
        let nonce = random::<NONCE>()?;
        let payload = Payload { msg: secret.as_bytes(), aad: belongs_to.as_bytes() };
        let sealed = self
            .cipher
            .encrypt(XNonce::from_slice(nonce.as_slice()), payload)
            .map_err(|_| io::Error::other("a secret could not be encrypted"))?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    /// Decrypts what [`seal`](Self::seal) gave.
    ///
    /// # Errors
    /// `InvalidData` where it was changed, belongs to something else, or the key is another.
    pub fn open_sealed(&self, sealed: &[u8], belongs_to: &str) -> io::Result<Zeroizing<String>> {
        let wrong = || {
            let text = "a stored secret cannot be decrypted: the key file is not the one it was \
                        encrypted with; enter the credential again";
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let (nonce, rest) = sealed.split_at_checked(NONCE).ok_or_else(wrong)?;
        let payload = Payload { msg: rest, aad: belongs_to.as_bytes() };
        let plain = self.cipher.decrypt(XNonce::from_slice(nonce), payload).map_err(|_| wrong())?;
        String::from_utf8(plain).map(Zeroizing::new).map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_opens_with_its_key_and_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let secrets = Secrets::open(&path).unwrap();
        let sealed = secrets.seal("pa\u{df}word", "vcenter-1").unwrap();
        assert!(!sealed.windows(4).any(|w| w == b"word"));
        let again = Secrets::open(&path).unwrap();
        assert_eq!(again.open_sealed(&sealed, "vcenter-1").unwrap().as_str(), "pa\u{df}word");
        assert!(again.open_sealed(&sealed, "vcenter-2").is_err());
        let other = Secrets::open(&dir.path().join("other")).unwrap();
        assert!(other.open_sealed(&sealed, "vcenter-1").is_err());
        assert!(again.open_sealed(&sealed[..10], "vcenter-1").is_err());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Secrets::open(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(Secrets::open(&path).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
