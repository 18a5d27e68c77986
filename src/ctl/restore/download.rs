//! A file's bytes from a mount, to wherever they go; on after a cut where it broke off.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::time::Duration;

use serde_json::Value;

use super::files::address_of;
use crate::ctl::Context;
use crate::ctl::error::{CtlError, CtlResult};
use crate::ctl::output::number;
use crate::ctl::progress::Display;

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;
/// Cuts in a row without a byte in between, after which it is given up.
const CUTS: u32 = 3;
/// Time before it is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// A file that can be downloaded.
pub(super) struct Download {
    address: String,
    /// Entity tag of its content.
    pub(super) tag: String,
    /// Bytes in all.
    pub(super) size: u64,
}

impl Download {
    /// Of the file at `path`, of which the hub told this.
    pub(super) fn new(mount: &str, path: &OsStr, info: &Value) -> CtlResult<Self> {
        let tag = info["etag"].as_str().ok_or_else(|| {
            let note = info["note"].as_str().map_or(String::new(), |note| format!(": {note}"));
            let kind = info["type"].as_str().unwrap_or("thing without a type");
            let cause = format!("'{}' is a {kind}, no file{note}", path.to_string_lossy());
            CtlError::usage(cause, "")
        })?;
        let address = address_of(mount, "download", path);
        Ok(Self { address, tag: tag.to_owned(), size: number(info, "size") })
    }

    /// Writes the file from byte `at` on into `out`.
    pub(super) fn run(&self, context: &Context, mut at: u64, out: &mut dyn Write) -> CtlResult<()> {
        let progress = Display::new(context.out);
        let mut cuts = 0;
        let mut buffer = vec![0; BUFFER];
        let mut go = || -> CtlResult<()> {
            while at < self.size {
                let before = at;
                let cut = match context.api.version(&self.address, &self.tag, at) {
                    Err(error) if error.is_passing() => error.cause,
                    Err(error) => return Err(error),
                    Ok(mut body) => loop {
                        match body.read(&mut buffer) {
                            Ok(0) => break "the connection ended".to_owned(),
                            Err(error) => break error.to_string(),
                            Ok(count) => {
                                out.write_all(buffer.get(..count).unwrap_or_default()).map_err(
                                    |e| CtlError::failed(format!("cannot write: {e}"), ""),
                                )?;
                                at += count as u64;
                                progress.at("downloading", at, self.size);
                            }
                        }
                    },
                };
                if at >= self.size {
                    break;
                }
                cuts = if at > before { 1 } else { cuts + 1 };
                if cuts > CUTS {
                    let cause = format!("broken off at byte {at} of {}: {cut}", self.size);
                    return Err(CtlError::failed(cause, "the same command goes on from there"));
                }
                progress.say(&format!("broken off at byte {at}, going on: {cut}"));
                std::thread::sleep(PAUSE);
            }
            Ok(())
        };
        let result = go();
        progress.end();
        result
    }
}
