//! Talking to the hub's API.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::Agent;
use ureq::http::{Method, Request, Response};

use super::error::{CtlError, CtlResult, Kind};
use super::tls;

/// Time for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Time for an answer that the hub has at once.
const SOON: Duration = Duration::from_secs(60);
/// Time for an answer that the hub has to read or write disks for.
pub(super) const LONG: Duration = Duration::from_secs(12 * 3600);
/// Longest silence of a stream; the hub gives a sign of life each 15 seconds.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest answer that is read, in bytes.
const LONGEST: u64 = 256 << 20;
/// How long a hub may take to be started again: for so long calls that can be repeated are.
pub(super) const HUB_RESTART: Duration = Duration::from_secs(120);
/// Time between two such calls.
const PAUSE: Duration = Duration::from_millis(500);
/// What to do about a failed TLS handshake.
const NO_TRUST: &str = "is it https there? --ca FILE names a certificate to trust";
/// Where the API begins.
const API: &str = "/api/v1";

/// The API of a hub.
#[derive(Clone)]
pub(super) struct Api {
    base: String,
    token: Option<String>,
    agent: Agent,
}

impl Api {
    /// For the hub at `url`.
    ///
    /// # Errors
    /// `Usage` where the address is none, or `ca` holds no certificates.
    pub(super) fn new(url: &str, token: Option<String>, ca: Option<&Path>) -> CtlResult<Self> {
        let base = url.trim_end_matches('/');
        let base = base.strip_suffix(API).unwrap_or(base);
        let secure = base.starts_with("https://");
        if !secure && !base.starts_with("http://") {
            let cause = format!("'{url}' is no address of a hub");
            return Err(CtlError::usage(cause, "such as --url http://127.0.0.1:8082"));
        }
        // The hub is near, or at the end of a tunnel: a proxy for the web is not meant.
        let config = Agent::config_builder()
            .timeout_connect(Some(CONNECT))
            .http_status_as_error(false)
            .proxy(None);
        let config = match secure {
            true => config.tls_config(tls::config(ca)?),
            false => config,
        };
        let agent = config.build().into();
        Ok(Self { base: base.to_owned(), token, agent })
    }

    /// The address of the hub.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Host of that address, as it stands in it.
    pub(super) fn host(&self) -> &str {
        let rest = self.base.split_once("://").map_or("", |(_, rest)| rest);
        let authority = rest.split('/').next().unwrap_or(rest);
        match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => authority,
        }
    }

    pub(super) fn get(&self, path: &str) -> CtlResult<Value> {
        self.call(Method::GET, path, None, SOON)
    }

    /// Waits `time` at most.
    pub(super) fn get_within(&self, path: &str, time: Duration) -> CtlResult<Value> {
        self.call(Method::GET, path, None, time)
    }

    pub(super) fn delete(&self, path: &str) -> CtlResult<Value> {
        self.call(Method::DELETE, path, None, LONG)
    }

    pub(super) fn put(&self, path: &str, body: &Value) -> CtlResult<Value> {
        self.call(Method::PUT, path, Some(body), SOON)
    }

    /// Waits `time` at most.
    pub(super) fn post(&self, path: &str, body: &Value, time: Duration) -> CtlResult<Value> {
        self.call(Method::POST, path, Some(body), time)
    }

    fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        time: Duration,
    ) -> CtlResult<Value> {
        let mut answer = self.ask(method, path, body, Some(time), &[])?;
        let read = answer.body_mut().with_config().limit(LONGEST).read_to_string();
        let text = read.map_err(|error| self.unreachable(&error))?;
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).map_err(|e| {
            let cause = format!("{}{path} is not answered in JSON: {e}", self.base);
            CtlError::failed(cause, "check that --url is the address of a hub")
        })
    }

    /// Opens a stream of server-sent events, or of bytes; with the length that was told.
    pub(super) fn stream(&self, path: &str) -> CtlResult<(Option<u64>, impl Read + use<>)> {
        let answer = self.ask(Method::GET, path, None, None, &[])?;
        let length = answer.headers().get("content-length");
        let length = length.and_then(|text| text.to_str().ok()?.parse().ok());
        Ok((length, answer.into_body().into_reader()))
    }

    /// Opens a file's bytes from `offset` on, of the version that has this entity tag.
    ///
    /// # Errors
    /// `Conflict` where it is another version.
    pub(super) fn version(
        &self,
        path: &str,
        tag: &str,
        offset: u64,
    ) -> CtlResult<impl Read + use<>> {
        let range = [("range", format!("bytes={offset}-")), ("if-range", tag.to_owned())];
        let headers = if offset == 0 { &[][..] } else { &range[..] };
        let answer = self.ask(Method::GET, path, None, None, headers)?;
        let same = answer.headers().get("etag").is_some_and(|found| found == tag);
        if !same || (answer.status().as_u16() == 206) != (offset > 0) {
            let cause = "the file is not the one that the download began with";
            return Err(CtlError::new(Kind::Conflict, cause, "start again"));
        }
        Ok(answer.into_body().into_reader())
    }

    /// An answer that is no error, its body not read yet.
    fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        time: Option<Duration>,
        headers: &[(&str, String)],
    ) -> CtlResult<Response<ureq::Body>> {
        let mut request =
            Request::builder().method(method).uri(format!("{}{API}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let invalid = |e: ureq::http::Error| {
            CtlError::usage(format!("the request cannot be made: {e}"), "check --url and the token")
        };
        let answered = match body {
            None => {
                let request = request.body(()).map_err(invalid)?;
                let request = self.agent.configure_request(request).timeout_global(time);
                let silence = time.is_none().then_some(SILENCE);
                self.agent.run(request.timeout_per_read(silence).build())
            }
            Some(body) => {
                let request = request.header("content-type", "application/json");
                let request = request.body(body.to_string()).map_err(invalid)?;
                self.agent.run(self.agent.configure_request(request).timeout_global(time).build())
            }
        };
        let mut answer = answered.map_err(|error| self.unreachable(&error))?;
        let status = answer.status().as_u16();
        if answer.status().is_success() {
            return Ok(answer);
        }
        let text = answer.body_mut().with_config().limit(LONGEST).read_to_string();
        Err(self.refused(status, &text.unwrap_or_default()))
    }

    fn unreachable(&self, error: &ureq::Error) -> CtlError {
        let cause = format!("cannot reach the hub at {}: {error}", self.base);
        let next = match error {
            _ if cause.contains("CaUsedAsEndEntity") => {
                "the hub's certificate is an authority's: give the hub one of its own (openssl req \
                 -x509 -addext basicConstraints=critical,CA:FALSE)"
            }
            ureq::Error::Rustls(_) | ureq::Error::Tls(_) | ureq::Error::Pem(_) => NO_TRUST,
            ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => NO_TRUST,
            _ => {
                "check that `sendense-hub serve` runs, that the tunnel is up, and --url \
                 (SENDENSE_URL)"
            }
        };
        CtlError::new(Kind::Unreachable, cause, next)
    }

    fn refused(&self, status: u16, text: &str) -> CtlError {
        let kind = Kind::of_status(status);
        let body: Value = serde_json::from_str(text).unwrap_or_default();
        let Some(cause) = body["error"].as_str() else {
            let cause = format!("{} answered {status}", self.base);
            return CtlError::new(kind, cause, "check that --url is the address of a hub");
        };
        let details = body["details"].as_str().unwrap_or_default();
        let next = match kind {
            Kind::Unauthorized if self.token.is_none() => {
                "give a token: --token-file FILE, or SENDENSE_TOKEN; an admin makes one with \
                 `sendense-ctl token create`"
            }
            Kind::Unauthorized if status == 401 => {
                "check --token-file or SENDENSE_TOKEN; an admin makes a new token with \
                 `sendense-ctl token create`"
            }
            Kind::Unauthorized => "use a token of that role",
            _ => details,
        };
        CtlError::new(kind, cause, next)
    }

    /// Repeats a call that can be repeated while the hub does not answer, for `most` such as
    /// [`HUB_RESTART`]. `wait` is told how long to wait, and what for; it may give up.
    pub(super) fn patiently<T>(
        &self,
        most: Duration,
        call: impl Fn(&Self) -> CtlResult<T>,
        mut wait: impl FnMut(Duration, &CtlError) -> CtlResult<()>,
    ) -> CtlResult<T> {
        let since = Instant::now();
        loop {
            match call(self) {
                Err(error) if error.is_passing() && since.elapsed() < most => {
                    wait(PAUSE, &error)?;
                }
                result => return result,
            }
        }
    }
}

/// `text` as a part of an address.
pub(super) fn encode(text: &str) -> String {
    encode_bytes(text.as_bytes())
}

/// Any bytes as a part of an address.
pub(super) fn encode_bytes(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(*byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// A query of those that are given: `?a=b&c=d`, or nothing.
pub(super) fn query(pairs: &[(&str, Option<&str>)]) -> String {
    let given = pairs.iter().filter_map(|(key, value)| Some((key, (*value)?)));
    let parts: Vec<String> = given.map(|(key, value)| format!("{key}={}", encode(value))).collect();
    if parts.is_empty() { String::new() } else { format!("?{}", parts.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_addresses() {
        assert_eq!(encode("web 1/\u{e9}"), "web%201%2F%C3%A9");
        assert_eq!(query(&[("a", Some("x&y")), ("b", None), ("c", Some("1"))]), "?a=x%26y&c=1");
        assert_eq!(query(&[("a", None)]), "");
    }

    #[test]
    fn addresses_may_have_the_api_s_path_and_must_have_a_scheme() {
        for (url, base, host) in [
            ("http://hub:8082/", "http://hub:8082", "hub"),
            ("http://hub:8082/api/v1", "http://hub:8082", "hub"),
            ("http://[::1]:8082/api/v1/", "http://[::1]:8082", "[::1]"),
            ("http://hub", "http://hub", "hub"),
            ("http://[::1]", "http://[::1]", "[::1]"),
        ] {
            let api = Api::new(url, None, None).unwrap();
            assert_eq!((api.base(), api.host()), (base, host));
        }
        assert_eq!(Api::new("hub:8082", None, None).err().map(|e| e.kind), Some(Kind::Usage));
    }

    #[test]
    fn what_the_hub_refuses_is_told_with_its_next_step() {
        let api = Api::new("http://hub", None, None).unwrap();
        let error = api.refused(409, r#"{"error": "it runs", "details": "cancel it"}"#);
        assert_eq!(
            (error.kind, error.to_string().as_str()),
            (Kind::Conflict, "it runs\n  cancel it")
        );
        let error = api.refused(401, r#"{"error": "a token is needed", "details": "x"}"#);
        assert!(error.next.contains("SENDENSE_TOKEN"), "{error}");
        assert!(api.refused(404, "<html>").cause.contains("404"));
    }
}
