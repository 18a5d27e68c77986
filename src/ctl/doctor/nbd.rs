//! Whether the hub's NBD port can be reached, and negotiates.

use super::Finding;
use crate::capture::list_exports;
use crate::ctl::http::Api;
use crate::ctl::output::each;

/// Port of NBD where nobody says otherwise.
const PORT: u16 = 10809;
const WHAT: &str = "nbd";

pub(super) fn port(api: &Api, given: Option<&str>) -> Finding {
    let address = given.map(str::to_owned).or_else(|| told(api));
    let address = address.unwrap_or_else(|| format!("{}:{PORT}", api.host()));
    match list_exports(&address) {
        Ok(exports) => {
            Finding::good(WHAT, format!("{address} negotiates, and has {} exports", exports.len()))
        }
        Err(error) => Finding::bad(
            WHAT,
            error.to_string(),
            "check nbd.listen of the hub, and that the tunnel forwards the port; --nbd HOST:PORT \
             looks elsewhere",
        ),
    }
}

/// Where the last backup was told to go.
fn told(api: &Api) -> Option<String> {
    let list = api.get("/backups").ok()?;
    let targets = each(&list, "backups").find_map(|b| b["nbd_targets_string"].as_str())?;
    let (_, address) = targets.split(',').next()?.split_once("nbd://")?;
    Some(address.rsplit_once('/')?.0.to_owned())
}
