//! The hub's API, as a client uses it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;

use crate::app::Reachable;

/// Time for a call; completing a disk waits for the disk.
const CALL: Duration = Duration::from_secs(300);

/// A client of the hub.
pub(super) struct Api {
    agent: ureq::Agent,
    base: String,
    token: String,
    nbd: SocketAddr,
}

impl Api {
    pub(super) fn new(hub: &Reachable) -> io::Result<Self> {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(CALL))
            .http_status_as_error(false)
            .build();
        let missing = || io::Error::other("the hub told no address or token");
        Ok(Self {
            agent: config.into(),
            base: format!("http://{}/api/v1", hub.agent),
            token: hub.first_token.clone().ok_or_else(missing)?,
            nbd: hub.nbd.first().copied().ok_or_else(missing)?,
        })
    }

    pub(super) fn nbd(&self) -> SocketAddr {
        self.nbd
    }

    fn call(&self, method: &str, path: &str, body: &str) -> io::Result<Value> {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/{path}", self.base))
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {}", self.token))
            .body(body.to_owned())
            .map_err(io::Error::other)?;
        let mut answer = self.agent.run(request).map_err(io::Error::other)?;
        let value: Value = answer.body_mut().read_json().map_err(io::Error::other)?;
        if answer.status().is_success() {
            return Ok(value);
        }
        Err(io::Error::other(format!("{method} {path}: {}", value["error"])))
    }

    pub(super) fn get(&self, path: &str) -> io::Result<Value> {
        self.call("GET", path, "")
    }

    /// The body of an answer as it comes.
    pub(super) fn read(&self, path: &str) -> io::Result<impl io::Read> {
        let request = self.agent.get(format!("{}/{path}", self.base));
        let request = request.header("authorization", format!("Bearer {}", self.token));
        let answer = request.call().map_err(io::Error::other)?;
        if !answer.status().is_success() {
            return Err(io::Error::other(format!("GET {path}: {}", answer.status())));
        }
        Ok(answer.into_body().into_reader())
    }

    pub(super) fn put(&self, path: &str, body: &Value) -> io::Result<Value> {
        self.call("PUT", path, &body.to_string())
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> io::Result<Value> {
        self.call("POST", path, &body.to_string())
    }

    pub(super) fn delete(&self, path: &str) -> io::Result<Value> {
        self.call("DELETE", path, "")
    }
}
