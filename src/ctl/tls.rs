//! Whom to trust when the hub is spoken to over TLS.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use super::error::{CtlError, CtlResult};

/// Where systems keep the certificates that they trust.
const SYSTEM: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// TLS that trusts the certificates in `ca`, or those that the system trusts.
///
/// # Errors
/// Where there are none.
pub(super) fn config(ca: Option<&Path>) -> CtlResult<TlsConfig> {
    let system = || SYSTEM.iter().map(PathBuf::from).find(|path| path.exists());
    let next = "give the certificate of whoever signed the hub's: --ca FILE (PEM)";
    let path = ca.map(Path::to_owned).or_else(system).ok_or_else(|| {
        CtlError::usage("this system has no list of certificates that it trusts", next)
    })?;
    let failed = |what: String| CtlError::usage(format!("'{}' {what}", path.display()), next);
    let text = std::fs::read(&path).map_err(|e| failed(format!("cannot be read: {e}")))?;
    let mut roots = Vec::new();
    for item in parse_pem(&text) {
        match item.map_err(|e| failed(format!("is no PEM: {e}")))? {
            PemItem::Certificate(certificate) => roots.push(certificate),
            _ => continue,
        }
    }
    if roots.is_empty() {
        return Err(failed("holds no certificate".into()));
    }
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
        .build())
}
