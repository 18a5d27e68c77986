//! What this machine tells: its SSH server, and the hub's data directory.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use super::Finding;

/// Where an SSH server may be.
const SSHD: [&str; 3] = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd"];
/// The hub's key, inside the data directory.
const KEY: &str = "secret.key";

/// Whether the SSH server lets the capture appliances' tunnel through.
pub(super) fn tunnel(user: &str) -> Vec<Finding> {
    const WHAT: &str = "tunnel";
    let Some(sshd) = SSHD.iter().find(|path| Path::new(path).exists()) else {
        return vec![Finding::skipped(WHAT, "there is no sshd here")];
    };
    let of = format!("user={user},host=localhost,addr=127.0.0.1");
    let output = Command::new(sshd).args(["-T", "-C", &of]).output();
    match output {
        Ok(output) if output.status.success() => {
            judge(user, &String::from_utf8_lossy(&output.stdout))
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            let first = text.lines().next().unwrap_or("it failed");
            vec![Finding::skipped(WHAT, format!("`sshd -T` says: {first}; try again as root"))]
        }
        Err(error) => vec![Finding::skipped(WHAT, format!("`sshd -T` cannot be run: {error}"))],
    }
}

/// Judges the settings that `sshd -T` tells for a user.
fn judge(user: &str, settings: &str) -> Vec<Finding> {
    const WHAT: &str = "tunnel";
    let find = |key: &str| {
        let mut lines = settings.lines().filter_map(|line| line.trim().split_once(' '));
        lines.find(|(name, _)| name.eq_ignore_ascii_case(key)).map_or("", |(_, value)| value.trim())
    };
    let mut findings = Vec::new();
    match (find("allowtcpforwarding"), find("disableforwarding")) {
        (_, "yes") => findings.push(Finding::bad(
            WHAT,
            format!("sshd forwards nothing for {user}: DisableForwarding yes"),
            format!("DisableForwarding no in sshd_config, in a Match block for {user}"),
        )),
        ("yes" | "all", _) => {
            findings.push(Finding::good(WHAT, format!("sshd forwards both ways for {user}")));
        }
        (value @ ("local" | "remote" | "no"), _) => findings.push(Finding::bad(
            WHAT,
            format!(
                "sshd does not forward both ways for {user}: AllowTcpForwarding {value}; the hub's \
                 ports go one way, the appliance's API the other"
            ),
            format!("AllowTcpForwarding yes in sshd_config, in a Match block for {user}"),
        )),
        _ => findings.push(Finding::skipped(WHAT, "sshd does not tell AllowTcpForwarding")),
    }
    match find("permitopen") {
        "" | "any" => {}
        "none" => findings.push(Finding::bad(
            "permitopen",
            format!("sshd lets {user} reach no port of this machine"),
            "PermitOpen 127.0.0.1:8082 127.0.0.1:10809 in sshd_config",
        )),
        places => findings.push(Finding::good(
            "permitopen",
            format!("{user} reaches only {places}: the hub's API and NBD ports must be among them"),
        )),
    }
    findings
}

/// Whether only the hub's user can read what it keeps.
pub(super) fn data_directory(directory: &Path) -> Vec<Finding> {
    vec![private(directory, 0o700), private(&directory.join(KEY), 0o600)]
}

fn private(path: &Path, wanted: u32) -> Finding {
    const WHAT: &str = "data";
    let shown = path.display();
    let mode = match fs::metadata(path) {
        Ok(meta) => meta.permissions().mode() & 0o7777,
        Err(error) => {
            let next = "check --data-dir, and run this as the hub's user";
            return Finding::bad(WHAT, format!("'{shown}' cannot be looked at: {error}"), next);
        }
    };
    if mode & !wanted & 0o777 == 0 {
        return Finding::good(WHAT, format!("'{shown}' is private (mode {mode:o})"));
    }
    let text = format!("others can use '{shown}' (mode {mode:o})");
    Finding::bad(WHAT, text, format!("chmod {wanted:o} '{shown}'"))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn states(settings: &str) -> Vec<State> {
        judge("vma_tunnel", settings).iter().map(|finding| finding.state).collect()
    }

    #[test]
    fn a_tunnel_needs_both_ways_and_a_place_to_go() {
        let open = "port 22\nallowtcpforwarding yes\npermitopen any\ndisableforwarding no\n";
        assert_eq!(states(open), [State::Good]);
        assert_eq!(states("allowtcpforwarding local\n"), [State::Bad]);
        assert_eq!(states("allowtcpforwarding yes\ndisableforwarding yes\n"), [State::Bad]);
        assert_eq!(states("allowtcpforwarding yes\npermitopen none\n"), [State::Good, State::Bad]);
        let some = "allowtcpforwarding yes\npermitopen 127.0.0.1:10809 127.0.0.1:8082\n";
        assert_eq!(states(some), [State::Good, State::Good]);
        assert_eq!(states(""), [State::Skipped]);
    }

    #[test]
    fn what_others_can_read_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join(KEY);
        fs::write(&key, [0; 32]).unwrap();
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let found = || -> Vec<State> {
            data_directory(directory.path()).iter().map(|finding| finding.state).collect()
        };
        set(directory.path(), 0o700);
        set(&key, 0o600);
        assert_eq!(found(), [State::Good, State::Good]);
        set(directory.path(), 0o755);
        set(&key, 0o640);
        assert_eq!(found(), [State::Bad, State::Bad]);
    }
}
