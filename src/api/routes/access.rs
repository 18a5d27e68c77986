//! Tokens and credentials. Secrets are told once, or never.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Api;
use super::super::auth::{Admin, hash_token, new_token};
use super::super::error::{ApiResult, Body};
use super::super::views::Done;
use crate::backup::{Failure, FailureKind};
use crate::catalog::{Credential, Token};
use crate::model::{Role, Timestamp};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(add_token, list_tokens))
        .routes(routes!(remove_token))
        .routes(routes!(put_credential, list_credentials))
        .routes(routes!(remove_credential))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewToken {
    /// A name for it.
    name: String,
    /// What its holder may do.
    role: Role,
}

#[derive(Debug, Serialize, ToSchema)]
struct TokenView {
    id: String,
    name: String,
    role: Role,
    #[schema(value_type = String)]
    created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    last_used_at: Option<Timestamp>,
    /// The token itself: told when it is made, and never again.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

impl From<Token> for TokenView {
    fn from(token: Token) -> Self {
        let Token { id, name, role, created_at, last_used_at } = token;
        Self { id, name, role, created_at, last_used_at, token: None }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct TokenList {
    tokens: Vec<TokenView>,
    total: usize,
}

/// Makes a token.
#[utoipa::path(post, path = "/tokens", tag = "access", request_body = NewToken,
    responses((status = 201, body = TokenView)))]
async fn add_token(
    Admin(caller): Admin,
    State(api): State<Api>,
    Body(new): Body<NewToken>,
) -> ApiResult<(StatusCode, Json<TokenView>)> {
    let added = api.blocking(move |backups| {
        if new.name.is_empty() {
            return Err(Failure::new(FailureKind::Invalid, "a token needs a name", ""));
        }
        let token = new_token();
        let id = backups.catalog().add_token(&new.name, new.role, &hash_token(&token))?;
        let text = format!("token '{}' with role {}", new.name, new.role);
        backups.catalog().event(&caller.name, "token.created", &id, &text)?;
        Ok(TokenView {
            id,
            name: new.name,
            role: new.role,
            created_at: Timestamp::now(),
            last_used_at: None,
            token: Some(token),
        })
    });
    Ok((StatusCode::CREATED, Json(added.await?)))
}

/// Lists the tokens, without what is secret of them.
#[utoipa::path(get, path = "/tokens", tag = "access",
    responses((status = 200, body = TokenList)))]
async fn list_tokens(_admin: Admin, State(api): State<Api>) -> ApiResult<Json<TokenList>> {
    let tokens = api.blocking(|backups| Ok(backups.catalog().tokens()?)).await?;
    let tokens: Vec<_> = tokens.into_iter().map(TokenView::from).collect();
    Ok(Json(TokenList { total: tokens.len(), tokens }))
}

/// Revokes a token, by id or name.
#[utoipa::path(delete, path = "/tokens/{id}", tag = "access", params(("id" = String, Path)),
    responses((status = 200, body = Done)))]
async fn remove_token(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| {
        if !backups.catalog().remove_token(&id)? {
            return Err(Failure::not_found("token", &id));
        }
        Ok(backups.catalog().event(&caller.name, "token.revoked", &id, "revoked")?)
    })
    .await?;
    Ok(Json(Done::new("the token is revoked")))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewCredential {
    /// A name for it.
    name: String,
    /// The vCenter.
    vcenter_host: String,
    /// The user there.
    username: String,
    /// The password; stored encrypted, and never told.
    password: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct CredentialView {
    id: String,
    name: String,
    vcenter_host: String,
    username: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct CredentialList {
    credentials: Vec<CredentialView>,
    total: usize,
}

/// Enters a login of vCenter, or changes the one of that name.
#[utoipa::path(post, path = "/credentials", tag = "access", request_body = NewCredential,
    responses((status = 201, body = CredentialView)))]
async fn put_credential(
    Admin(caller): Admin,
    State(api): State<Api>,
    Body(new): Body<NewCredential>,
) -> ApiResult<(StatusCode, Json<CredentialView>)> {
    let entered = api.blocking(move |backups| {
        let password = zeroize::Zeroizing::new(new.password);
        let secret = backups.secrets().seal(&password, &new.name).map_err(|e| {
            Failure::new(FailureKind::Internal, e.to_string(), "the password was not stored")
        })?;
        let credential = Credential {
            id: String::new(),
            name: new.name.clone(),
            vcenter_host: new.vcenter_host.clone(),
            username: new.username.clone(),
            secret,
        };
        let id = backups.catalog().put_credential(&credential)?;
        backups.catalog().event(&caller.name, "credential.entered", &id, &new.name)?;
        let (name, vcenter_host, username) = (new.name, new.vcenter_host, new.username);
        Ok(CredentialView { id, name, vcenter_host, username })
    });
    Ok((StatusCode::CREATED, Json(entered.await?)))
}

/// Lists the logins, without passwords.
#[utoipa::path(get, path = "/credentials", tag = "access",
    responses((status = 200, body = CredentialList)))]
async fn list_credentials(
    _admin: Admin,
    State(api): State<Api>,
) -> ApiResult<Json<CredentialList>> {
    let found = api.blocking(|backups| Ok(backups.catalog().credentials()?)).await?;
    let view = |credential: Credential| {
        let Credential { id, name, vcenter_host, username, .. } = credential;
        CredentialView { id, name, vcenter_host, username }
    };
    let credentials: Vec<_> = found.into_iter().map(view).collect();
    Ok(Json(CredentialList { total: credentials.len(), credentials }))
}

/// Removes a login that no VM uses, by id or name.
#[utoipa::path(delete, path = "/credentials/{id}", tag = "access", params(("id" = String, Path)),
    responses((status = 200, body = Done)))]
async fn remove_credential(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| {
        if !backups.catalog().remove_credential(&id)? {
            return Err(Failure::not_found("credential", &id));
        }
        Ok(backups.catalog().event(&caller.name, "credential.removed", &id, "removed")?)
    })
    .await?;
    Ok(Json(Done::new("the credential is removed")))
}
