//! Who asks, and what they may do.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::error::body;
use super::{Api, Door};
use crate::backup::{Failure, FailureKind};
use crate::model::{Role, random_hex};

/// What every token begins with, so that it is known for what it is.
const PREFIX: &str = "sendense_";
/// Random bytes of a token.
const BYTES: usize = 24;

/// A new token. Only its hash is kept.
pub fn new_token() -> String {
    format!("{PREFIX}{}", random_hex(BYTES))
}

/// What is kept of a token. It is long and random: nothing slower is needed.
pub fn hash_token(token: &str) -> Vec<u8> {
    Sha256::digest(token).to_vec()
}

/// Whoever asks, by a valid token.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) name: String,
    role: Role,
}

/// An answer that refuses.
pub(super) struct Refused(StatusCode, Failure);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
        match self.0 {
            StatusCode::UNAUTHORIZED => (self.0, challenge, body(&self.1)).into_response(),
            status => (status, body(&self.1)).into_response(),
        }
    }
}

impl Caller {
    fn may(&self, needed: Role) -> Result<(), Refused> {
        if self.role >= needed {
            return Ok(());
        }
        let text = format!("token '{}' has role {}, this needs {needed}", self.name, self.role);
        let failure = Failure::new(FailureKind::Invalid, text, "");
        Err(Refused(StatusCode::FORBIDDEN, failure))
    }
}

async fn identify(parts: &Parts, api: &Api) -> Result<Caller, Refused> {
    let unknown = |text: &str| {
        let next = "send 'Authorization: Bearer TOKEN'; `sendense-ctl token create` makes one";
        Refused(StatusCode::UNAUTHORIZED, Failure::new(FailureKind::Invalid, text, next))
    };
    let token = parts
        .headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .ok_or_else(|| unknown("a token is needed"))?;
    let hash = hash_token(token.trim());
    let found = api.blocking(move |backups| Ok(backups.catalog().use_token(&hash)?)).await;
    match found {
        Ok(Some(token)) => Ok(Caller { name: token.name, role: token.role }),
        Ok(None) => Err(unknown("this token is not valid")),
        Err(error) => Err(Refused(StatusCode::INTERNAL_SERVER_ERROR, error.0)),
    }
}

macro_rules! roles {
    ($($(#[$doc:meta])* $name:ident = $role:expr),* $(,)?) => {$(
        $(#[$doc])*
        #[allow(dead_code, reason = "not every handler asks who it is")]
        pub(super) struct $name(pub(super) Caller);

        impl FromRequestParts<Api> for $name {
            type Rejection = Refused;

            async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Refused> {
                let caller = identify(parts, api).await?;
                caller.may($role)?;
                Ok(Self(caller))
            }
        }
    )*};
}

roles! {
    /// May look.
    Viewer = Role::Viewer,
    /// May work.
    Operator = Role::Operator,
    /// May manage.
    Admin = Role::Admin,
}

/// A capture agent: anybody at the agents' door, an operator elsewhere.
pub(super) struct Agent;

impl FromRequestParts<Api> for Agent {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Refused> {
        if api.door == Door::Admin {
            identify(parts, api).await?.may(Role::Operator)?;
        }
        Ok(Self)
    }
}
